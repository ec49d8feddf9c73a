"""Memory layout of the outputs: that of the input, as with ``torch.nn.Conv2d``."""

from __future__ import annotations

import torch
from torch import Tensor


def frames_are_channels_last(input: Tensor) -> bool:
    """Whether the frames of ``input`` (T, B, C, H, W) have their channels innermost."""
    return input.size(2) > 1 and input.stride(2) == 1 and input.stride(4) >= input.size(2)


def is_batch_major(input: Tensor) -> bool:
    """Whether ``input`` (T, B, C, H, W) is a view of a (B, T, C, H, W) tensor."""
    return input.size(0) > 1 and input.size(1) > 1 and input.stride(1) > input.stride(0)


def empty_frames_like(
    input: Tensor,  # (T, B, Cin, H, W)
    channels: int,
    height: int,
    width: int,
) -> Tensor:  # (T, B, channels, height, width)
    """Uninitialised output frames in the layout of ``input``: batch- or time-major, channels first or last."""
    steps, batch = input.size(0), input.size(1)
    outer = (batch, steps) if is_batch_major(input) else (steps, batch)
    if frames_are_channels_last(input):
        frames = input.new_empty((*outer, height, width, channels)).permute(0, 1, 4, 2, 3)
    else:
        frames = input.new_empty((*outer, channels, height, width))
    return frames.transpose(0, 1) if is_batch_major(input) else frames


def empty_state_like(
    input: Tensor,  # (T, B, Cin, H, W)
    channels: int,
    height: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor:  # (B, channels, height, width)
    """Uninitialised state in the frame layout of ``input``."""
    if frames_are_channels_last(input):
        return input.new_empty((input.size(1), height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    return input.new_empty((input.size(1), channels, height, width), dtype=dtype)
