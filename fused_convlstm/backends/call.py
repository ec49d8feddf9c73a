"""What a backend has to know about one call before it may serve it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ConvLSTMOptions:
    """Everything about a sequence call that is not a tensor.

    ``padding`` is that of the input convolution, as (top, bottom, left, right). The recurrent
    convolution always keeps the size of the state (see :func:`same_padding`).
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    recurrent_dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding_mode: str = "zeros"
    gate_activation: str = "sigmoid"
    reverse: bool = False


# What the forward pass keeps for the backward pass.
SAVE_NOTHING = "nothing"  # inference
SAVE_CELLS = "cells"  # cell states only; the gates are computed again in backward
SAVE_GATES = "gates"  # gates and cell states

# Bits of `step_flags`, one byte a step and sample, (T, B).
FLAG_RESET = 1  # the state of the sample is zero before the step
FLAG_PAST_END = 2  # the step lies past the sample's length: state kept, output zero


@dataclass(frozen=True)
class Call:
    """One sequence call, described by the properties that decide which backend can serve it."""

    cell: str  # "conv_lstm2d" or "pooled_gate_conv_lstm2d"
    device: torch.device
    dtype: torch.dtype
    steps: int  # T
    batch: int  # B
    in_channels: int
    hidden_channels: int
    input_size: tuple[int, int]  # (H, W)
    state_size: tuple[int, int]  # (H_out, W_out)
    kernel_size: tuple[int, int]
    recurrent_kernel_size: tuple[int, int]
    options: ConvLSTMOptions
    peephole: str = "none"  # "none", "channel" or "pixel"
    step_flags: bool = False
    save: str = SAVE_NOTHING
    transformed: bool = False  # within torch.func.grad, vjp or jvp, or with tangents of torch.autograd.forward_ad


def same_padding(kernel_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int, int, int]:
    """Padding (top, bottom, left, right) that keeps the size at stride 1.

    An even kernel has one more row or column of padding at the end, as in ``torch.nn.Conv2d`` and Keras.
    """
    total_h, total_w = dilation[0] * (kernel_size[0] - 1), dilation[1] * (kernel_size[1] - 1)
    top, left = total_h // 2, total_w // 2
    return top, total_h - top, left, total_w - left


def conv_output_size(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    top, bottom, left, right = padding
    height = (size[0] + top + bottom - dilation[0] * (kernel_size[0] - 1) - 1) // stride[0] + 1
    width = (size[1] + left + right - dilation[1] * (kernel_size[1] - 1) - 1) // stride[1] + 1
    return height, width


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the cell state: float32 for half-precision inputs, else that of the input."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def kept_cells_dtype(dtype: torch.dtype, peepholes: bool) -> torch.dtype:
    """Type in which the cells are kept for backward: that of the input; with peepholes, which make gates of them, that
    of the state, or gates that are computed again would not be those of the forward pass."""
    return state_dtype(dtype) if peepholes else dtype
