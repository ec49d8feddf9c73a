"""Drop-in ``nn.Module``s."""

from .attention import InputAttentionConvLSTM2d, InputGateAttentionConvLSTM2d, OutputGateAttentionConvLSTM2d
from .conv_lstm2d import ConvLSTM2d, ConvLSTM2dCell
from .pooled_gate_conv_lstm2d import PooledGateConvLSTM2d, PooledGateConvLSTM2dCell
from .video_lstm import ALSTM, ConvALSTM2d, MotionAttentionConvLSTM2d

__all__ = [
    "ALSTM",
    "ConvALSTM2d",
    "ConvLSTM2d",
    "ConvLSTM2dCell",
    "InputAttentionConvLSTM2d",
    "InputGateAttentionConvLSTM2d",
    "MotionAttentionConvLSTM2d",
    "OutputGateAttentionConvLSTM2d",
    "PooledGateConvLSTM2d",
    "PooledGateConvLSTM2dCell",
]
