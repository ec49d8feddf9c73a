"""The specification: every cell in a few lines of plain PyTorch, differentiable twice, any device, any dtype.

The kernels are tested against these functions in float64. Sources:

* ConvLSTM: Courtney & Sreenivas, "Using Deep Convolutional LSTM Networks for Learning Spatiotemporal
  Features", eq. (1); peepholes: Shi et al. 2015, eq. (3).
* Pooled gates, "variant (a)": Zhang et al., "Attention in Convolutional LSTM for Gesture Recognition",
  eq. (8) to (16).

Shapes: B batch, T steps, Cin and C input and hidden channels, H x W input size, Ho x Wo state size.
The gate order is i, f, g, o. For half-precision inputs the cell state is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends.call import FLAG_PAST_END, FLAG_RESET, ConvLSTMOptions, same_padding

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    # PyTorch, Keras 3. Not F.hardsigmoid: its gradient takes 1/6 in single precision, also for float64.
    "hard_sigmoid": lambda x: F.relu6(x + 3) / 6,
    "hard_sigmoid_keras2": lambda x: torch.clamp(0.2 * x + 0.5, 0.0, 1.0),  # Keras up to 2.15, Theano
}


def convolution(
    x: Tensor,  # (B, Cin, H, W)
    weight: Tensor,  # (K, Cin / groups, kh, kw)
    padding: tuple[int, int, int, int],  # top, bottom, left, right
    padding_mode: str,
    stride: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:  # (B, K, Ho, Wo)
    """``F.conv2d`` with padding that may differ from side to side and may be other than zeros."""
    top, bottom, left, right = padding
    if padding_mode == "zeros" and top == bottom and left == right:
        return F.conv2d(x, weight, None, stride, (top, left), dilation, groups)
    if any(padding):
        x = F.pad(x, (left, right, top, bottom), "constant" if padding_mode == "zeros" else padding_mode)
    return F.conv2d(x, weight, None, stride, 0, dilation, groups)


def gate_convolution(
    x: Tensor,  # (B, Cin, H, W)
    weight: Tensor,  # (4 * C, Cin / groups, kh, kw), gate-major
    padding: tuple[int, int, int, int],
    padding_mode: str,
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:  # (B, 4 * C, Ho, Wo), gate-major
    """One convolution per gate, each with ``groups`` groups."""
    if groups == 1:
        return convolution(x, weight, padding, padding_mode, stride, dilation)
    # conv2d wants the outputs of a group side by side; the weights have the gates outside the groups.
    per_group = weight.unflatten(0, (4, groups, -1)).transpose(0, 1).flatten(0, 2)
    z = convolution(x, per_group, padding, padding_mode, stride, dilation, groups)
    by_gate: Tensor = z.unflatten(1, (groups, 4, -1)).transpose(1, 2).flatten(1, 3)
    return by_gate


def conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, Ho, Wo)
    c: Tensor,  # (B, C, Ho, Wo)
    weight_ih: Tensor,  # (4 * C, Cin / groups, kh, kw)
    weight_hh: Tensor,  # (4 * C, C / groups, rh, rw)
    bias: Tensor | None,  # (4 * C,)
    peephole: Tensor | None,  # (3, C) or (3, C, Ho, Wo), order i, f, o
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor]:
    """One step of a convolutional LSTM: returns h and c of the step, each (B, C, Ho, Wo)."""
    o = options
    sigma = GATE_ACTIVATIONS[o.gate_activation]
    recurrent_padding = same_padding((weight_hh.shape[2], weight_hh.shape[3]), o.recurrent_dilation)
    z = gate_convolution(x, weight_ih, o.padding, o.padding_mode, o.stride, o.dilation, o.groups)
    z = z + gate_convolution(h, weight_hh, recurrent_padding, o.padding_mode, (1, 1), o.recurrent_dilation, o.groups)
    if bias is not None:
        z = z + bias[:, None, None]
    z_i, z_f, z_g, z_o = z.chunk(4, dim=1)
    if peephole is not None:
        w_ci, w_cf, w_co = (peephole if peephole.dim() == 4 else peephole[:, :, None, None]).unbind(0)
        z_i, z_f = z_i + w_ci * c, z_f + w_cf * c
    c = sigma(z_f) * c + sigma(z_i) * torch.tanh(z_g)
    if peephole is not None:
        z_o = z_o + w_co * c
    h = sigma(z_o) * torch.tanh(c)
    return h.to(x.dtype), c


def pooled_gate_conv_lstm2d_cell(
    x: Tensor,  # (B, Cin, H, W)
    h: Tensor,  # (B, C, Ho, Wo)
    c: Tensor,  # (B, C, Ho, Wo)
    gate_weight_ih: Tensor,  # (3 * C, Cin), gate order i, f, o
    gate_weight_hh: Tensor,  # (3 * C, C)
    gate_bias: Tensor | None,  # (3 * C,)
    depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
    depthwise_hh: Tensor,  # (C, 1, rh, rw)
    pointwise_ih: Tensor,  # (C, Cin)
    pointwise_hh: Tensor,  # (C, C)
    bias: Tensor | None,  # (C,)
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor]:
    """One step of "variant (a)": gates from globally pooled x and h, one value a channel and sample;
    candidate by depthwise-separable convolutions. Returns h and c of the step, each (B, C, Ho, Wo)."""
    o = options
    sigma = GATE_ACTIVATIONS[o.gate_activation]
    pooled_x, pooled_h = x.mean(dim=(2, 3)), h.mean(dim=(2, 3))  # (B, Cin), (B, C): eq. 8, 9
    z = F.linear(pooled_x, gate_weight_ih, gate_bias) + F.linear(pooled_h, gate_weight_hh)
    i, f, out = (sigma(gate)[:, :, None, None] for gate in z.chunk(3, dim=1))  # eq. 10 to 12
    recurrent_padding = same_padding((depthwise_hh.shape[2], depthwise_hh.shape[3]), o.recurrent_dilation)
    x = convolution(x, depthwise_ih, o.padding, o.padding_mode, o.stride, o.dilation, x.shape[1])
    y = convolution(h, depthwise_hh, recurrent_padding, o.padding_mode, (1, 1), o.recurrent_dilation, h.shape[1])
    z_g = F.conv2d(x, pointwise_ih[:, :, None, None], bias) + F.conv2d(y, pointwise_hh[:, :, None, None])
    c = f * c + i * torch.tanh(z_g)  # eq. 13, 14
    return (out * torch.tanh(c)).to(h.dtype), c  # eq. 15


def sequence(
    cell: Callable[..., tuple[Tensor, ...]],
    input: Tensor,  # (T, B, Cin, H, W)
    h: Tensor,  # (B, C, ...)
    c: Tensor,  # (B, C, ...)
    step_flags: Tensor | None,  # (T, B)
    reverse: bool,
    arguments: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """Runs a cell over the steps of a sequence: returns output, h_n, c_n, and whatever else the cell returns at each
    step, stacked over the steps."""
    outputs: list[tuple[Tensor, ...]] = []
    for t in reversed(range(input.shape[0])) if reverse else range(input.shape[0]):
        if step_flags is None:
            h, c, *others = cell(input[t], h, c, *arguments)
            outputs.append((h, *others))
            continue
        reset, past_end = step_flags[t] == FLAG_RESET, step_flags[t] == FLAG_PAST_END
        # The input is masked too: whatever stands in the padding must not reach a gradient.
        x = zero_where(past_end, input[t])
        h_new, c_new, *others = cell(x, zero_where(reset, h), zero_where(reset, c), *arguments)
        h, c = torch.where(_like(past_end, h), h, h_new), torch.where(_like(past_end, c), c, c_new)
        outputs.append(tuple(zero_where(past_end, value) for value in (h, *others)))
    output, *others = (torch.stack(values) for values in zip(*(outputs[::-1] if reverse else outputs), strict=True))
    return output, h, c, *others


def zero_where(mask: Tensor, value: Tensor) -> Tensor:
    """``value`` (B, ...) with the samples zeroed where ``mask`` (B,) is True."""
    return value.masked_fill(_like(mask, value), 0)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    """``mask`` (B,) as (B, 1, ...), with as many dimensions as ``value``."""
    return mask.view(-1, *(1,) * (value.dim() - 1))


def conv_lstm2d(
    input: Tensor,  # (T, B, Cin, H, W)
    h_0: Tensor,  # (B, C, Ho, Wo)
    c_0: Tensor,  # (B, C, Ho, Wo), float32 for half-precision inputs
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    step_flags: Tensor | None,  # (T, B) uint8: FLAG_RESET, FLAG_PAST_END
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence, one layer, one direction: returns output (T, B, C, Ho, Wo), h_n, c_n (B, C, Ho, Wo)."""
    arguments = (weight_ih, weight_hh, bias, peephole, options)
    output, h_n, c_n = sequence(conv_lstm2d_cell, input, h_0, c_0, step_flags, options.reverse, arguments)
    return output, h_n, c_n


def pooled_gate_conv_lstm2d(
    input: Tensor,  # (T, B, Cin, H, W)
    h_0: Tensor,  # (B, C, Ho, Wo)
    c_0: Tensor,  # (B, C, Ho, Wo), float32 for half-precision inputs
    gate_weight_ih: Tensor,
    gate_weight_hh: Tensor,
    gate_bias: Tensor | None,
    depthwise_ih: Tensor,
    depthwise_hh: Tensor,
    pointwise_ih: Tensor,
    pointwise_hh: Tensor,
    bias: Tensor | None,
    step_flags: Tensor | None,  # (T, B) uint8: FLAG_RESET, FLAG_PAST_END
    options: ConvLSTMOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence, one layer, one direction: returns output (T, B, C, Ho, Wo), h_n, c_n (B, C, Ho, Wo)."""
    arguments = (
        gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih, depthwise_hh, pointwise_ih, pointwise_hh, bias,
        options,
    )  # fmt: skip
    output, h_n, c_n = sequence(pooled_gate_conv_lstm2d_cell, input, h_0, c_0, step_flags, options.reverse, arguments)
    return output, h_n, c_n
