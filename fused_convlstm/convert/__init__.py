"""Converters between the weights of other ConvLSTM implementations and the fused layers."""

from .keras import KerasConvLSTM2D, from_keras, to_keras
from .layouts import LAYOUTS, POOLED_LAYOUTS, REFUSED_LAYOUTS, Layout
from .weights import from_weights, same_padding_strided, to_weights

__all__ = [
    "LAYOUTS",
    "POOLED_LAYOUTS",
    "REFUSED_LAYOUTS",
    "KerasConvLSTM2D",
    "Layout",
    "from_keras",
    "from_weights",
    "same_padding_strided",
    "to_keras",
    "to_weights",
]
