"""When 3x3 convolutions are computed by Winograd's F(2x2, 3x3), with 16 products instead of 36."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import ConvLSTMOptions

NEVER, AUTO, ALWAYS = MODES = ("never", "auto", "always")
ENVIRONMENT_VARIABLE = "FUSED_CONVLSTM_WINOGRAD"

_mode: str | None = None  # by use_winograd


def _check(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: unknown mode {mode!r}; choose one of {', '.join(map(repr, MODES))}")
    return mode


@contextmanager
def use_winograd(mode: str = AUTO) -> Iterator[None]:
    """Within the block, the CPU kernels may compute 3x3 convolutions by Winograd's F(2x2, 3x3) (Lavin & Gray 2016).

    It takes 16 products where a direct convolution takes 36, so it is up to twice as fast, but it rounds more: each
    output is made of sums and differences of neighbouring inputs, so the error is relative to the largest input of a
    4x4 window. On ordinary data it is one to two and a half times that of plain PyTorch; where one pixel is far larger
    than its neighbours, it may be more (docs/cpu.md). A NaN or an infinity reaches all outputs of the 2x2 tiles whose
    windows hold it. So it is off unless asked for.

    It serves ``ConvLSTM2d`` in float32 with both kernels 3x3, stride 1, dilation 1, one group and zero padding; all
    other calls are computed directly, whatever the mode. Holds for the whole process, and for backward passes that run
    within the block.

    Args:
        mode: ``"auto"``, where it is expected to be faster; ``"always"``, wherever it can be computed; ``"never"``.
            Outside any block, the environment variable ``FUSED_CONVLSTM_WINOGRAD`` decides, else ``"never"``.
    """
    global _mode
    before, _mode = _mode, _check(mode, "use_winograd")
    try:
        yield
    finally:
        _mode = before


def current_mode() -> str:
    if _mode is not None:
        return _mode
    return _check(os.environ.get(ENVIRONMENT_VARIABLE, NEVER), f"environment variable {ENVIRONMENT_VARIABLE}")


# The cost model counts multiply-adds of vectors of 16 lanes for one image at one step; what else takes time, in the
# same unit, was fitted to measurements (docs/cpu.md).
_LANES = 16
_TILE = 80.0  # for each tile and vector of outputs: transformed sums through memory, inverse transform
_WINDOW = 90.0  # for each tile and vector of inputs
_WEIGHT = 600.0  # for each input channel and vector of outputs, once a sequence
_WEIGHT_GRADIENT = 100.0  # for each input channel and output, once a sequence
_MARGIN = 1.05  # the direct product is exact where the transform rounds, so it is taken when they are equally fast


def _connections(out_size: int, in_size: int, padding: int) -> int:
    """Pairs of an output and an input that one of three taps connects, along one dimension."""
    return sum(max(0, min(out_size, in_size + padding - tap) - max(0, padding - tap)) for tap in range(3))


def _is_faster(
    inputs: tuple[tuple[int, ...], ...],  # channels, height, width, padding at the top and at the left of each
    vectors: int,  # of outputs
    out_size: tuple[int, int],
    images: int,  # of the whole sequence, which share the transformed weights
) -> bool:
    """Whether the sum of these convolutions is expected to take less time transformed than directly."""
    tiles = -(-out_size[0] // 2) * -(-out_size[1] // 2)
    direct, transformed = 0.0, tiles * vectors * _TILE
    for channels, height, width, top, left in inputs:
        connections = _connections(out_size[0], height, top) * _connections(out_size[1], width, left)
        direct += vectors * connections * channels
        transformed += tiles * (vectors * 16 * channels + _vectors(channels) * _WINDOW)
        transformed += vectors * channels * _WEIGHT / max(images, 1)
    return transformed * _MARGIN < direct


def _is_faster_for_weights(
    inputs: tuple[tuple[int, ...], ...], outputs: int, out_size: tuple[int, int], images: int
) -> bool:
    """The same for the gradients of their weights."""
    tiles = -(-out_size[0] // 2) * -(-out_size[1] // 2)
    depth = sum(channels for channels, *_ in inputs)
    direct = 0.0
    transformed = tiles * (16 * outputs * _vectors(depth) + _vectors(outputs) * _WINDOW)
    transformed += outputs * depth * _WEIGHT_GRADIENT / max(images, 1)
    for channels, height, width, top, left in inputs:
        connections = _connections(out_size[0], height, top) * _connections(out_size[1], width, left)
        direct += outputs * connections * _vectors(channels)
        transformed += tiles * _vectors(channels) * _WINDOW
    return transformed * _MARGIN < direct


def _vectors(channels: int) -> int:
    return -(-channels // _LANES)


def _applies(dtype: torch.dtype, kernels: tuple[torch.Size, ...], options: ConvLSTMOptions) -> bool:
    return (
        dtype == torch.float32
        and all(kernel[2:] == (3, 3) for kernel in kernels)
        and options.stride == options.dilation == options.recurrent_dilation == (1, 1)
        and options.groups == 1
        and options.padding_mode == "zeros"
    )


class Choice(NamedTuple):
    """Which products of a call are computed so."""

    gates: bool
    to_h: bool = False  # in the backward pass: gradient of h
    to_input: bool = False
    to_weights: bool = False  # both weights' gradients, if both are wanted


@lru_cache(maxsize=256)
def _choose(
    mode: str,
    dtype: torch.dtype,
    input: torch.Size,  # (T, B, Cin, H, W)
    weight_ih: torch.Size,
    weight_hh: torch.Size,
    options: ConvLSTMOptions,
    state_size: tuple[int, int],
) -> Choice:
    if mode == NEVER or not _applies(dtype, (weight_ih, weight_hh), options):
        return Choice(False)
    if mode == ALWAYS:
        return Choice(True, True, True, True)
    steps, batch, in_channels, *input_size = input
    channels, images = weight_hh[1], steps * batch
    top, left = options.padding[0], options.padding[2]
    x, h = (in_channels, *input_size, top, left), (channels, *state_size, 1, 1)
    dz_to_h, dz_to_input = (4 * channels, *state_size, 1, 1), (4 * channels, *state_size, 2 - top, 2 - left)
    return Choice(
        _is_faster((x, h), 4 * _vectors(channels), state_size, images),
        _is_faster((dz_to_h,), _vectors(channels), state_size, images),
        _is_faster((dz_to_input,), _vectors(in_channels), (input_size[0], input_size[1]), images),
        _is_faster_for_weights((x, h), 4 * channels, state_size, images),
    )


def choose(
    input: Tensor, weight_ih: Tensor, weight_hh: Tensor, options: ConvLSTMOptions, state_size: tuple[int, int]
) -> Choice:
    """What to compute so in this call, by the mode and the cost model."""
    return _choose(current_mode(), input.dtype, input.shape, weight_ih.shape, weight_hh.shape, options, state_size)
