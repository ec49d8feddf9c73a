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

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class GateWeights(NamedTuple):
    """Weights of G gates that are pooled over the pixels."""

    weight_ih: Tensor  # (G * C, Cin)
    weight_hh: Tensor  # (G * C, C)
    bias: Tensor | None  # (G * C,)


class SeparableWeights(NamedTuple):
    """Weights of two depthwise-separable convolutions, of x and of h, whose results are added."""

    depthwise_ih: Tensor  # (Cin, 1, kh, kw)
    depthwise_hh: Tensor  # (C, 1, kh, kw)
    pointwise_ih: Tensor  # (C, Cin)
    pointwise_hh: Tensor  # (C, C)
    bias: Tensor | None  # (C,)


class VariantWeights(NamedTuple):
    """Weights of a variant: those of variant (a), of which (c) and (d) have two gates, and those of its attention.

    ``outer`` is the convolution behind the attention's tanh: (1, C, kh, kw) in (b), a depthwise (C, 1, kh, kw) and a
    pointwise (C, C) kernel in (c) and (d).
    """

    gates: GateWeights
    candidate: SeparableWeights
    attention: SeparableWeights
    outer: tuple[Tensor, ...]

    @classmethod
    def of(cls, weights: Sequence[Any]) -> VariantWeights:
        """From the parameters of a layer, in their order."""
        candidate, attention = SeparableWeights(*weights[3:8]), SeparableWeights(*weights[8:13])
        return cls(GateWeights(*weights[:3]), candidate, attention, tuple(weights[13:]))

    @property
    def pooled_gate(self) -> list[Any]:
        """Those of variant (a), in the order of its cell."""
        return [*self.gates, *self.candidate]


def pooled_gates(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    weights: GateWeights,
    gate_activation: str,
) -> list[Tensor]:  # G gates, (B, C, 1, 1) each
    """Gates from the mean of x and h over the pixels (Zhang et al., eq. 8 to 12)."""
    z = F.linear(x.mean(dim=(2, 3)), weights.weight_ih, weights.bias) + F.linear(h.mean(dim=(2, 3)), weights.weight_hh)
    return [GATE_ACTIVATIONS[gate_activation](gate)[:, :, None, None] for gate in z.split(h.shape[1], dim=1)]


def separable_sum(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    weights: SeparableWeights,
) -> Tensor:  # (B, C, H, W)
    """Depthwise-separable convolutions of x and of h, added."""
    z = separable_convolution(x, weights.depthwise_ih, weights.pointwise_ih, weights.bias)
    return z + separable_convolution(h, weights.depthwise_hh, weights.pointwise_hh)


# --- variants (b) to (d) of Zhang et al. ---------------------------------------------------------------------------


def input_attention(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    weights: VariantWeights,
) -> Tensor:  # (B, 1, H, W)
    """A map over the pixels that sums to one (eq. 17, 18)."""
    (outer,) = weights.outer
    return spatial_softmax(same_convolution(torch.tanh(separable_sum(x, h, weights.attention)), outer))


def gate_attention(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    weights: VariantWeights,
) -> Tensor:  # (B, C, H, W)
    """A gate for every channel and pixel, 1 somewhere in each channel (eq. 21 to 23)."""
    return max_gate(separable_convolution(torch.tanh(separable_sum(x, h, weights.attention)), *weights.outer))


def input_attention_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    weights: VariantWeights,  # gate order i, f, o
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """ "Variant (b)": a step of variant (a) on A o x. Returns h, c and A (B, 1, H, W)."""
    attention = input_attention(x, h, weights)
    h, c = pooled_gate_conv_lstm2d_cell(attention * x, h, c, *(*weights.pooled_gate, options))  # eq. 19
    return h, c, attention


def input_gate_attention_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    weights: VariantWeights,  # gate order f, o
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """ "Variant (c)": variant (a) with attention as the input gate. Returns h, c and the gate (B, C, H, W)."""
    i = gate_attention(x, h, weights)
    f, o = pooled_gates(x, h, weights.gates, options.gate_activation)
    c = f * c + i * torch.tanh(separable_sum(x, h, weights.candidate))
    return (o * torch.tanh(c)).to(h.dtype), c, i


def output_gate_attention_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    weights: VariantWeights,  # gate order i, f
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """ "Variant (d)": variant (a) with attention as the output gate. Returns h, c and the gate (B, C, H, W)."""
    o = gate_attention(x, h, weights)
    i, f = pooled_gates(x, h, weights.gates, options.gate_activation)
    c = f * c + i * torch.tanh(separable_sum(x, h, weights.candidate))
    return (o * torch.tanh(c)).to(h.dtype), c, o


# --- VideoLSTM -----------------------------------------------------------------------------------------------------


class SoftAttentionWeights(NamedTuple):
    """Weights of the attention's network of two convolutions, the first of x and of h; of ALSTM without (ah, aw)."""

    weight_ih: Tensor  # (A, Cin, ah, aw)
    weight_hh: Tensor  # (A, C, ah, aw)
    bias: Tensor | None  # (A,)
    weight: Tensor  # (1, A, ah, aw)


def soft_attention(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W), or (B, C, 1, 1) for one state vector
    weights: SoftAttentionWeights,
) -> Tensor:  # (B, 1, H, W)
    """A map over the pixels that sums to one (VideoLSTM, Z_t and A_t)."""
    hidden = torch.tanh(same_convolution(x, weights.weight_ih, weights.bias) + same_convolution(h, weights.weight_hh))
    return spatial_softmax(same_convolution(hidden, weights.weight))


def conv_alstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, H, W)
    c: Tensor,  # (B, C, H, W)
    weight_ih: Tensor,  # (4 * C, Cin, kh, kw)
    weight_hh: Tensor,  # (4 * C, C, kh, kw)
    bias: Tensor | None,  # (4 * C,)
    attention_weights: SoftAttentionWeights,
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of the convolutional ALSTM: a ConvLSTM on A o x. Returns h, c and A (B, 1, H, W)."""
    attention = soft_attention(x, h, attention_weights)
    h, c = conv_lstm2d_cell(attention * x, h, c, weight_ih, weight_hh, bias, None, options)
    return h, c, attention


def alstm_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C)
    c: Tensor,  # (B, C)
    weight_ih: Tensor,  # (4 * C, Cin)
    weight_hh: Tensor,  # (4 * C, C)
    bias: Tensor | None,  # (4 * C,)
    attention_weights: SoftAttentionWeights,
    gate_activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A step of the ALSTM: an LSTM on the sum of A o x over the pixels (soft attention of Xu et al. 2015).
    Returns h, c and A (B, 1, H, W)."""
    inner_ih, inner_hh, inner_bias, outer = attention_weights
    maps = SoftAttentionWeights(
        inner_ih[:, :, None, None], inner_hh[:, :, None, None], inner_bias, outer[:, :, None, None]
    )
    attention = soft_attention(x, h[:, :, None, None], maps)
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
    attention_weights: SoftAttentionWeights,  # weight_hh (A, M, ah, aw)
    options: ConvLSTMOptions,
    motion_options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A step of VideoLSTM: the state of a ConvLSTM on optical flow takes the place of h(t-1) in the attention of a
    convolutional ALSTM. Returns h, c, h_motion, c_motion and A (B, 1, H, W)."""
    attention = soft_attention(x, h_motion, attention_weights)
    h, c = conv_lstm2d_cell(attention * x, h, c, weight_ih, weight_hh, bias, None, options)
    h_motion, c_motion = conv_lstm2d_cell(
        motion, h_motion, c_motion, motion_weight_ih, motion_weight_hh, motion_bias, None, motion_options
    )
    return h, c, h_motion, c_motion, attention
