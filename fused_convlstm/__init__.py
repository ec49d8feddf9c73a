"""Fused convolutional LSTMs for PyTorch."""

from . import convert, functional
from .backends import BackendError, use_backend, use_winograd
from .explain import Explanation, explain
from .modules import (
    ALSTM,
    ConvALSTM2d,
    ConvLSTM2d,
    ConvLSTM2dCell,
    InputAttentionConvLSTM2d,
    InputGateAttentionConvLSTM2d,
    MotionAttentionConvLSTM2d,
    OutputGateAttentionConvLSTM2d,
    PooledGateConvLSTM2d,
    PooledGateConvLSTM2dCell,
)
from .swap import SwapReport, swap, unswap

__version__ = "0.1.0"

__all__ = [
    "ALSTM",
    "BackendError",
    "ConvALSTM2d",
    "ConvLSTM2d",
    "ConvLSTM2dCell",
    "Explanation",
    "InputAttentionConvLSTM2d",
    "InputGateAttentionConvLSTM2d",
    "MotionAttentionConvLSTM2d",
    "OutputGateAttentionConvLSTM2d",
    "PooledGateConvLSTM2d",
    "PooledGateConvLSTM2dCell",
    "SwapReport",
    "convert",
    "explain",
    "functional",
    "swap",
    "unswap",
    "use_backend",
    "use_winograd",
]
