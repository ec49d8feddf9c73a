"""``fused_convlstm::conv_lstm2d``: a sequence of one ConvLSTM layer in one direction, and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends.call import SAVE_GATES, SAVE_NOTHING, ConvLSTMOptions, conv_output_size, kept_cells_dtype, state_dtype
from ._sequence import define_sequence_operator
from .layout import empty_frames_like, empty_state_like


def _fake(tensors: tuple[Any, ...], options: ConvLSTMOptions, save: str) -> tuple[Tensor, ...]:
    input, weight_ih, peephole = tensors[0], tensors[3], tensors[6]
    channels = weight_ih.size(0) // 4
    height, width = conv_output_size(
        (input.size(3), input.size(4)),
        (weight_ih.size(2), weight_ih.size(3)),
        options.stride,
        options.padding,
        options.dilation,
    )
    frames = (input.size(0), input.size(1), height, width)
    cells_dtype = kept_cells_dtype(input.dtype, peephole is not None)
    return (
        empty_frames_like(input, channels, height, width),
        empty_state_like(input, channels, height, width, input.dtype),
        empty_state_like(input, channels, height, width, state_dtype(input.dtype)),
        input.new_empty((*frames, 4 * channels) if save == SAVE_GATES else (0,)),
        input.new_empty((*frames, channels) if save != SAVE_NOTHING else (0,), dtype=cells_dtype),
    )


conv_lstm2d = define_sequence_operator(
    "conv_lstm2d",
    "Tensor input, Tensor? h_0, Tensor? c_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias, Tensor? peephole, "
    "Tensor? step_flags",
    saved=2,  # gates, cells
    fake=_fake,
)
