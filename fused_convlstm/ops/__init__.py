"""The operators that autograd, torch.compile and torch.export see: one per cell and direction, a sequence each."""

from .conv_lstm2d import conv_lstm2d
from .pooled_gate_conv_lstm2d import pooled_gate_conv_lstm2d

__all__ = ["conv_lstm2d", "pooled_gate_conv_lstm2d"]
