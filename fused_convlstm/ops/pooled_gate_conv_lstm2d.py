"""``fused_convlstm::pooled_gate_conv_lstm2d``: a sequence of one layer of "variant (a)" in one direction, and its
backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.call import SAVE_GATES, SAVE_NOTHING, ConvLSTMOptions, conv_output_size, state_dtype
from ._sequence import define_sequence_operator
from .layout import empty_frames_like, empty_state_like


def _fake(tensors: tuple[Any, ...], options: ConvLSTMOptions, save: str) -> tuple[Tensor, ...]:
    input, depthwise_ih, pointwise_ih = tensors[0], tensors[6], tensors[8]
    channels = pointwise_ih.size(0)
    height, width = conv_output_size(
        (input.size(3), input.size(4)),
        (depthwise_ih.size(2), depthwise_ih.size(3)),
        options.stride,
        options.padding,
        options.dilation,
    )
    steps, batch = input.size(0), input.size(1)
    frames = (steps, batch, height, width, channels)
    dtype = state_dtype(input.dtype)
    return (
        empty_frames_like(input, channels, height, width),
        empty_state_like(input, channels, height, width, input.dtype),
        empty_state_like(input, channels, height, width, dtype),
        input.new_empty((steps, batch, 3 * channels) if save != SAVE_NOTHING else (0,), dtype=dtype),
        input.new_empty(frames if save == SAVE_GATES else (0,)),
        input.new_empty(frames if save != SAVE_NOTHING else (0,)),
    )


pooled_gate_conv_lstm2d = define_sequence_operator(
    "pooled_gate_conv_lstm2d",
    "Tensor input, Tensor? h_0, Tensor? c_0, Tensor gate_weight_ih, Tensor gate_weight_hh, Tensor? gate_bias, "
    "Tensor depthwise_ih, Tensor depthwise_hh, Tensor pointwise_ih, Tensor pointwise_hh, Tensor? bias, "
    "Tensor? step_flags",
    saved=3,  # gates, candidate, cells
    fake=_fake,
)
