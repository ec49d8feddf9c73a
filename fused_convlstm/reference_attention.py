"""The specification of the cells with attention, in a few lines of plain PyTorch each: any device, any dtype.

Sources:

* "Variants (b) to (d)": Zhang et al., "Attention in Convolutional LSTM for Gesture Recognition", eq. (17) to (24). The
  paper writes convolutions in the attention; with the parameter counts of its table 1 they are depthwise-separable.
* ALSTM, ConvALSTM and motion attention: Li et al., "VideoLSTM convolves, attends and flows for action recognition".

Shapes: B batch, Cin and C input and hidden channels, A attention channels, H x W frame and state size. Every cell
returns h, c and its attention. Gate order i, f, g, o. For half-precision inputs the cell state is float32.
:func:`fused_convlstm.reference.sequence` runs a cell over a sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.call import ConvLSTMOptions, same_padding
from .reference import GATE_ACTIVATIONS, conv_lstm2d_cell, convolution, pooled_gate_conv_lstm2d_cell


def spatial_softmax(z: Tensor) -> Tensor:  # (B, K, H, W) -> (B, K, H, W)
    """Softmax over the pixels of each channel: sums to one (Zhang et al., eq. 18)."""
    return torch.softmax(z.flatten(2), dim=2).view_as(z)


def max_gate(z: Tensor) -> Tensor:  # (B, K, H, W) -> (B, K, H, W)
    """exp(z) over its largest value in each channel: from 0 to 1, 1 somewhere (Zhang et al., eq. 22).

    The maximum is taken off before exp, so that nothing overflows.
    """
    return torch.exp(z - z.amax(dim=(2, 3), keepdim=True))


def same_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """(B, Cin, H, W) -> (B, K, H, W): a convolution that keeps the size."""
    padding = same_padding((weight.shape[2], weight.shape[3]), (1, 1))
    y = convolution(x, weight, padding, "zeros", groups=groups)
    return y if bias is None else y + bias[:, None, None]


def separable_convolution(
    x: Tensor,  # (B, Cin, H, W)
    depthwise: Tensor,  # (Cin, 1, kh, kw)
    pointwise: Tensor,  # (K, Cin)
    bias: Tensor | None = None,  # (K,)
) -> Tensor:  # (B, K, H, W)
    """A depthwise-separable convolution that keeps the size."""
    return F.conv2d(same_convolution(x, depthwise, groups=x.shape[1]), pointwise[:, :, None, None], bias)


def pooled_gates(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    weight_ih: Tensor,  # (G * C, Cin)
    weight_hh: Tensor,  # (G * C, C)
    bias: Tensor | None,  # (G * C,)
    gate_activation: str,
) -> list[Tensor]:  # G gates, (B, C, 1, 1) each
    """Gates from the mean of x and h over the pixels (Zhang et al., eq. 8 to 12)."""
    z = F.linear(x.mean(dim=(2, 3)), weight_ih, bias) + F.linear(h.mean(dim=(2, 3)), weight_hh)
    return [GATE_ACTIVATIONS[gate_activation](gate)[:, :, None, None] for gate in z.split(h.shape[1], dim=1)]


# --- variant (b): attention on the input ---------------------------------------------------------------------------


def input_attention(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    depthwise_hh: Tensor,  # (C, 1, kh, kw)
    pointwise_ih: Tensor,  # (C, Cin)
    pointwise_hh: Tensor,  # (C, C)
    bias: Tensor | None,  # (C,)
    weight: Tensor,  # (1, C, kh, kw)
) -> Tensor:  # (B, 1, H, W)
    """A map over the pixels that sums to one (Zhang et al., eq. 17, 18)."""
    z = separable_convolution(x, depthwise_ih, pointwise_ih, bias)
    z = z + separable_convolution(h, depthwise_hh, pointwise_hh)
    return spatial_softmax(same_convolution(torch.tanh(z), weight))


def input_attention_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    gate_weight_ih: Tensor,  # (3 * C, Cin), gate order i, f, o
    gate_weight_hh: Tensor,  # (3 * C, C)
    gate_bias: Tensor | None,  # (3 * C,)
    depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    depthwise_hh: Tensor,  # (C, 1, kh, kw)
    pointwise_ih: Tensor,  # (C, Cin)
    pointwise_hh: Tensor,  # (C, C)
    bias: Tensor | None,  # (C,)
    attention_depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    attention_depthwise_hh: Tensor,  # (C, 1, kh, kw)
    attention_pointwise_ih: Tensor,  # (C, Cin)
    attention_pointwise_hh: Tensor,  # (C, C)
    attention_bias: Tensor | None,  # (C,)
    attention_weight: Tensor,  # (1, C, kh, kw)
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """ "Variant (b)": a step of variant (a) on A o x. Returns h, c and A (B, 1, H, W)."""
    attention = input_attention(
        x, h, attention_depthwise_ih, attention_depthwise_hh, attention_pointwise_ih, attention_pointwise_hh,
        attention_bias, attention_weight,
    )  # fmt: skip
    h, c = pooled_gate_conv_lstm2d_cell(
        attention * x, h, c, gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih,
        pointwise_hh, bias, options,
    )  # eq. 19  # fmt: skip
    return h, c, attention


# --- variants (c) and (d): attention as a gate ---------------------------------------------------------------------


def gate_attention(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    depthwise_hh: Tensor,  # (C, 1, kh, kw)
    pointwise_ih: Tensor,  # (C, Cin)
    pointwise_hh: Tensor,  # (C, C)
    bias: Tensor | None,  # (C,)
    depthwise: Tensor,  # (C, 1, kh, kw)
    pointwise: Tensor,  # (C, C)
) -> Tensor:  # (B, C, H, W)
    """A gate for every channel and pixel, 1 somewhere in each channel (Zhang et al., eq. 21 to 23)."""
    z = separable_convolution(x, depthwise_ih, pointwise_ih, bias)
    z = z + separable_convolution(h, depthwise_hh, pointwise_hh)
    return max_gate(separable_convolution(torch.tanh(z), depthwise, pointwise))


def input_gate_attention_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    gate_weight_ih: Tensor,  # (2 * C, Cin), gate order f, o
    gate_weight_hh: Tensor,  # (2 * C, C)
    gate_bias: Tensor | None,  # (2 * C,)
    depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    depthwise_hh: Tensor,  # (C, 1, kh, kw)
    pointwise_ih: Tensor,  # (C, Cin)
    pointwise_hh: Tensor,  # (C, C)
    bias: Tensor | None,  # (C,)
    attention_depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    attention_depthwise_hh: Tensor,  # (C, 1, kh, kw)
    attention_pointwise_ih: Tensor,  # (C, Cin)
    attention_pointwise_hh: Tensor,  # (C, C)
    attention_bias: Tensor | None,  # (C,)
    attention_depthwise: Tensor,  # (C, 1, kh, kw)
    attention_pointwise: Tensor,  # (C, C)
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """ "Variant (c)": variant (a) with attention as the input gate. Returns h, c and the gate (B, C, H, W)."""
    i = gate_attention(
        x, h, attention_depthwise_ih, attention_depthwise_hh, attention_pointwise_ih, attention_pointwise_hh,
        attention_bias, attention_depthwise, attention_pointwise,
    )  # fmt: skip
    f, o = pooled_gates(x, h, gate_weight_ih, gate_weight_hh, gate_bias, options.gate_activation)
    z_g = separable_convolution(x, depthwise_ih, pointwise_ih, bias)
    z_g = z_g + separable_convolution(h, depthwise_hh, pointwise_hh)
    c = f * c + i * torch.tanh(z_g)
    return (o * torch.tanh(c)).to(h.dtype), c, i


def output_gate_attention_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    gate_weight_ih: Tensor,  # (2 * C, Cin), gate order i, f
    gate_weight_hh: Tensor,  # (2 * C, C)
    gate_bias: Tensor | None,  # (2 * C,)
    depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    depthwise_hh: Tensor,  # (C, 1, kh, kw)
    pointwise_ih: Tensor,  # (C, Cin)
    pointwise_hh: Tensor,  # (C, C)
    bias: Tensor | None,  # (C,)
    attention_depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    attention_depthwise_hh: Tensor,  # (C, 1, kh, kw)
    attention_pointwise_ih: Tensor,  # (C, Cin)
    attention_pointwise_hh: Tensor,  # (C, C)
    attention_bias: Tensor | None,  # (C,)
    attention_depthwise: Tensor,  # (C, 1, kh, kw)
    attention_pointwise: Tensor,  # (C, C)
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """ "Variant (d)": variant (a) with attention as the output gate. Returns h, c and the gate (B, C, H, W)."""
    o = gate_attention(
        x, h, attention_depthwise_ih, attention_depthwise_hh, attention_pointwise_ih, attention_pointwise_hh,
        attention_bias, attention_depthwise, attention_pointwise,
    )  # fmt: skip
    i, f = pooled_gates(x, h, gate_weight_ih, gate_weight_hh, gate_bias, options.gate_activation)
    z_g = separable_convolution(x, depthwise_ih, pointwise_ih, bias)
    z_g = z_g + separable_convolution(h, depthwise_hh, pointwise_hh)
    c = f * c + i * torch.tanh(z_g)
    return (o * torch.tanh(c)).to(h.dtype), c, o


# --- VideoLSTM -----------------------------------------------------------------------------------------------------


def soft_attention(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W), or (B, C, 1, 1) for one state vector
    weight_ih: Tensor,  # (A, Cin, ah, aw)
    weight_hh: Tensor,  # (A, C, ah, aw)
    bias: Tensor | None,  # (A,)
    weight: Tensor,  # (1, A, ah, aw)
) -> Tensor:  # (B, 1, H, W)
    """A map over the pixels that sums to one, from a network of two convolutions (VideoLSTM, Z_t and A_t)."""
    hidden = torch.tanh(same_convolution(x, weight_ih, bias) + same_convolution(h, weight_hh))
    return spatial_softmax(same_convolution(hidden, weight))


def conv_alstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    weight_ih: Tensor,  # (4 * C, Cin, kh, kw)
    weight_hh: Tensor,  # (4 * C, C, kh, kw)
    bias: Tensor | None,  # (4 * C,)
    attention_weight_ih: Tensor,  # (A, Cin, ah, aw)
    attention_weight_hh: Tensor,  # (A, C, ah, aw)
    attention_bias: Tensor | None,  # (A,)
    attention_weight: Tensor,  # (1, A, ah, aw)
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of the convolutional ALSTM: a ConvLSTM on A o x. Returns h, c and A (B, 1, H, W)."""
    attention = soft_attention(x, h, attention_weight_ih, attention_weight_hh, attention_bias, attention_weight)
    h, c = conv_lstm2d_cell(attention * x, h, c, weight_ih, weight_hh, bias, None, options)
    return h, c, attention


def alstm_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C)
    c: Tensor,  # (B, C)
    weight_ih: Tensor,  # (4 * C, Cin)
    weight_hh: Tensor,  # (4 * C, C)
    bias: Tensor | None,  # (4 * C,)
    attention_weight_ih: Tensor,  # (A, Cin)
    attention_weight_hh: Tensor,  # (A, C)
    attention_bias: Tensor | None,  # (A,)
    attention_weight: Tensor,  # (1, A)
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of the ALSTM: an LSTM on the sum of A o x over the pixels (soft attention of Xu et al. 2015).
    Returns h, c and A (B, 1, H, W)."""
    attention = soft_attention(
        x, h[:, :, None, None], attention_weight_ih[:, :, None, None], attention_weight_hh[:, :, None, None],
        attention_bias, attention_weight[:, :, None, None],
    )  # fmt: skip
    z = F.linear((attention * x).sum(dim=(2, 3)), weight_ih, bias) + F.linear(h, weight_hh)
    z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
    sigma = GATE_ACTIVATIONS[gate_activation]
    c = sigma(z_f) * c + sigma(z_i) * torch.tanh(z_g)
    return (sigma(z_o) * torch.tanh(c)).to(h.dtype), c, attention


def motion_attention_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    motion: Tensor,  # (B, Cm, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    h_motion: Tensor,  # (B, M, H, W)
    c_motion: Tensor,  # (B, M, H, W)
    weight_ih: Tensor,  # (4 * C, Cin, kh, kw)
    weight_hh: Tensor,  # (4 * C, C, kh, kw)
    bias: Tensor | None,  # (4 * C,)
    motion_weight_ih: Tensor,  # (4 * M, Cm, mh, mw)
    motion_weight_hh: Tensor,  # (4 * M, M, mh, mw)
    motion_bias: Tensor | None,  # (4 * M,)
    attention_weight_ih: Tensor,  # (A, Cin, ah, aw)
    attention_weight_hh: Tensor,  # (A, M, ah, aw)
    attention_bias: Tensor | None,  # (A,)
    attention_weight: Tensor,  # (1, A, ah, aw)
    options: ConvLSTMOptions,
    motion_options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A step of VideoLSTM: the state of a ConvLSTM on optical flow takes the place of h(t-1) in the attention of a
    convolutional ALSTM. Returns h, c, h_motion, c_motion and A (B, 1, H, W)."""
    attention = soft_attention(x, h_motion, attention_weight_ih, attention_weight_hh, attention_bias, attention_weight)
    h, c = conv_lstm2d_cell(attention * x, h, c, weight_ih, weight_hh, bias, None, options)
    h_motion, c_motion = conv_lstm2d_cell(
        motion, h_motion, c_motion, motion_weight_ih, motion_weight_hh, motion_bias, None, motion_options
    )
    return h, c, h_motion, c_motion, attention
