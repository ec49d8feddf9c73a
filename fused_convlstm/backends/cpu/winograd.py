"""When 3x3 convolutions are computed by Winograd's F(2x2, 3x3) or F(4x4, 3x3), with fewer products."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import ConvLSTMOptions
from ..settings import Settings

NEVER, AUTO, ALWAYS = MODES = ("never", "auto", "always")
TILES = (2, 4)
ENVIRONMENT_VARIABLE = "FUSED_CONVLSTM_WINOGRAD"

_setting: Settings[tuple[str, int]] = Settings()  # mode and tile, by use_winograd


def _check(mode: str, where: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{where}: unknown mode {mode!r}; choose one of {', '.join(map(repr, MODES))}")
    return mode


@contextmanager
def use_winograd(mode: str = AUTO, tile: int = 2) -> Iterator[None]:
    """Within the block, the CPU kernels may compute 3x3 convolutions by Winograd's F(2x2, 3x3) (Lavin & Gray 2016).

    It takes 16 products where a direct convolution takes 36, so it is up to twice as fast, but it rounds more: each
    output is made of sums and differences of neighbouring inputs, so the error is relative to the largest input of a
    4x4 window. On ordinary data it is one to two and a half times that of plain PyTorch; where one pixel is far larger
    than its neighbours, it may be more (docs/cpu.md). A NaN or an infinity reaches all outputs of the 2x2 tiles whose
    windows hold it. So it is off unless asked for.

    ``tile=4`` allows F(4x4, 3x3) as well: 36 products instead of 144, up to three times as fast as the direct
    convolution. Its windows are 6x6 pixels, its tiles 4x4, and its error on ordinary data is three to fifteen times
    that of plain PyTorch.

    It serves ``ConvLSTM2d`` in float32 with both kernels 3x3, stride 1, dilation 1, one group and zero padding; all
    other calls are computed directly, whatever the mode. Holds for the whole process, and for backward passes that run
    within the block.

    Args:
        mode: ``"auto"``, where it is expected to be faster; ``"always"``, wherever it can be computed; ``"never"``.
            Outside any block, the environment variable ``FUSED_CONVLSTM_WINOGRAD`` decides, with tiles of 2x2, else
            ``"never"``.
        tile: size of the largest tiles: 2 or 4. ``"auto"`` takes for each product what is expected to be fastest of
            those allowed, which depends on the size of the call and on the number of threads, so that the last bits of
            results do, too; ``"always"`` takes this tile.

    Raises:
        ValueError: ``mode`` or ``tile`` is none of these.
    """
    if tile not in TILES:
        raise ValueError(f"use_winograd: tile {tile!r}; choose one of {', '.join(map(str, TILES))}")
    with _setting.set((_check(mode, "use_winograd"), tile)):
        yield


def _current() -> tuple[str, int]:
    setting = _setting.current()
    if setting is not None:
        return setting
    mode = os.environ.get(ENVIRONMENT_VARIABLE, NEVER)
    return _check(mode, f"environment variable {ENVIRONMENT_VARIABLE}"), 2


def describe() -> str:
    """Mode and tiles in words."""
    mode, tile = _current()
    return mode if mode == NEVER else f"{mode}, {filter_name(tile)}"


def filter_name(tile: int) -> str:
    return f"F({tile}x{tile}, 3x3)"


# The cost model counts multiply-adds of vectors of 16 lanes in a call; what else takes time, in the same unit, was
# fitted to measurements (docs/cpu.md).
class _Cost(NamedTuple):
    output: float  # for each tile and vector of outputs: transformed sums through memory, inverse transform
    input: float  # for each tile and vector of inputs
    weight: float  # for each vector of weights
    stream: float  # for each vector of transformed weights, or their gradients, that a piece of tiles goes through
    from_memory: float  # added to that where no cache keeps them
    piece: int  # tiles


_LANES = 16
_TAP_COST, _LONGEST_CHAIN = 6.0, 400  # csrc/cpu/cell.h: sums through memory tap by tap, or all taps in one chain
_OUTPUTS = {2: _Cost(130.0, 105.0, 220.0, 0.3, 3.0, 48), 4: _Cost(260.0, 360.0, 650.0, 1.1, 3.0, 24)}
_GRADIENTS = {
    2: _Cost(20.0, 20.0, 280.0, 0.0, 10.0, 256),
    4: _Cost(240.0, 240.0, 1100.0, 0.0, 10.0, 256),
}  # of the weights
_CALL = 40e3  # of each thread: memory for the transform
_LARGE = 24 * 2**20 // 64  # vectors that no cache keeps
_UNIT_TILES = 6  # csrc/cpu/winograd.h: a piece's least
_MARGIN = 1.02  # the direct product is exact where the transform rounds, so it is taken when they are equally fast


class _Product(NamedTuple):
    """One of a call's products; inputs, weights and outputs in vectors."""

    direct: float  # cost of the direct product for an image
    size: tuple[int, int]  # of the maps that are cut into tiles
    images: int
    together: int  # images whose tiles are laid end to end
    blocks: int  # of outputs that threads can take
    inputs: int
    weights: int
    outputs: int

    def fastest(self, costs: dict[int, _Cost], largest: int, threads: int) -> int:
        """The tile that is expected to take the least time, or 0 for the direct product."""
        fastest, least = 0, self.images * self.direct / threads
        for tile, cost in costs.items():
            taken = _MARGIN * self.transformed(tile, cost, threads)
            if tile <= largest and taken < least:
                fastest, least = tile, taken
        return fastest

    def transformed(self, tile: int, cost: _Cost, threads: int) -> float:
        """Cost for the thread that has most to do."""
        tiles = self.together * -(-self.size[0] // tile) * -(-self.size[1] // tile)
        pieces = -(-tiles // cost.piece)
        if pieces * self.blocks < 4 * threads and pieces * self.blocks % threads:
            pieces = min(-(-tiles // _UNIT_TILES), -(-pieces // threads) * threads)
        parts = -(-pieces * self.blocks // threads)  # of pieces * blocks, for a thread
        weights = (tile + 2) ** 2 * self.weights
        stream = cost.stream + (cost.from_memory if weights > _LARGE else 0.0)
        products = weights * (tiles + pieces * stream) + tiles * self.outputs * cost.output
        windows = tiles * self.inputs * cost.input  # a thread transforms those of all pieces that it has part of
        taken = products * parts / (pieces * self.blocks) + windows * -(-parts // self.blocks) / pieces
        return _CALL * threads + self.weights * cost.weight / threads + self.images / self.together * taken


def _vectors(channels: int) -> int:
    return -(-channels // _LANES)


def _connections(out_size: tuple[int, int], in_size: tuple[int, int], top: int, left: int) -> int:
    """Pairs of an output pixel and an input pixel that one of nine taps connects."""

    def along(outputs: int, inputs: int, padding: int) -> int:
        return sum(max(0, min(outputs, inputs + padding - tap) - max(0, padding - tap)) for tap in range(3))

    return along(out_size[0], in_size[0], top) * along(out_size[1], in_size[1], left)


def _by_taps(channels: int, connections: int) -> float:
    """Cost of a vector of outputs of a direct convolution."""
    return connections * (channels + _TAP_COST)


def _by_taps_or_at_once(channels: int, connections: int, pixels: int) -> float:
    at_once = 9 * pixels * (channels + 0.5) if 9 * channels <= _LONGEST_CHAIN else math.inf
    return min(at_once, _by_taps(channels, connections))


def _products(
    input: torch.Size, channels: int, top: int, left: int, state_size: tuple[int, int]
) -> tuple[_Product, _Product, _Product, _Product]:
    """Gates, gradients of h, of the input, of the weights."""
    steps, batch, in_channels, height, width = input
    images, pixels, size = steps * batch, state_size[0] * state_size[1], (height, width)
    x, h = _connections(state_size, size, top, left), _connections(state_size, state_size, 1, 1)
    x_vectors, h_vectors, gates = _vectors(in_channels), _vectors(channels), 4 * channels
    inputs, dz = x_vectors + h_vectors, _vectors(gates)
    chunk = max(1, steps // 4) * batch  # images whose gradients are summed at once, roughly
    direct = 4 * h_vectors * (_by_taps_or_at_once(in_channels, x, pixels) + _by_taps_or_at_once(channels, h, pixels))
    weights = 4 * h_vectors * (in_channels + channels)
    x_blocks, h_blocks, panels = -(-x_vectors // 4), -(-h_vectors // 4), -(-gates // 6)
    dz_x, dz_h = x_vectors * gates, h_vectors * gates  # weights
    return (
        _Product(direct, state_size, images, batch, h_vectors, inputs, weights, 4 * h_vectors),
        _Product(h_vectors * _by_taps(gates, h), state_size, images - batch, batch, h_blocks, dz, dz_h, h_vectors),
        _Product(x_vectors * _by_taps(gates, x), size, images, chunk, x_blocks, dz, dz_x, x_vectors),
        _Product(
            gates * (x_vectors * x + h_vectors * h), state_size, images, chunk, panels, inputs, gates * inputs, dz
        ),
    )


def _applies(dtype: torch.dtype, kernels: tuple[torch.Size, ...], options: ConvLSTMOptions) -> bool:
    return (
        dtype == torch.float32
        and all(kernel[2:] == (3, 3) for kernel in kernels)
        and options.stride == options.dilation == options.recurrent_dilation == (1, 1)
        and options.groups == 1
        and options.padding_mode == "zeros"
    )


class Choice(NamedTuple):
    """The tiles of each product of a call: 2, 4, or 0 where it is computed directly."""

    gates: int
    to_h: int = 0  # in the backward pass: gradient of h
    to_input: int = 0
    to_weights: int = 0  # both weights' gradients, if both are wanted

    def gradients(self) -> str:
        """Which gradients are transformed, in words."""
        names = zip(("h", "the input", "the weights"), self[1:], strict=True)
        return ", ".join(f"of {name} by {filter_name(tile)}" for name, tile in names if tile)


@lru_cache(maxsize=256)
def _choose(
    mode: str,
    tile: int,
    threads: int,
    dtype: torch.dtype,
    input: torch.Size,  # (T, B, Cin, H, W)
    weight_ih: torch.Size,
    weight_hh: torch.Size,
    options: ConvLSTMOptions,
    state_size: tuple[int, int],
) -> Choice:
    if mode == NEVER or input.numel() == 0 or not _applies(dtype, (weight_ih, weight_hh), options):
        return Choice(0)
    if mode == ALWAYS:
        return Choice(tile, tile, tile, tile)
    gates, to_h, to_input, to_weights = _products(
        input, weight_hh[1], options.padding[0], options.padding[2], state_size
    )
    return Choice(
        gates.fastest(_OUTPUTS, tile, threads),
        to_h.fastest(_OUTPUTS, tile, threads),
        to_input.fastest(_OUTPUTS, tile, threads),
        to_weights.fastest(_GRADIENTS, tile, threads),
    )


def choose(
    input: Tensor, weight_ih: Tensor, weight_hh: Tensor, options: ConvLSTMOptions, state_size: tuple[int, int]
) -> Choice:
    """What to compute so in this call, by the mode and the cost model."""
    mode, tile = _current()
    threads = torch.get_num_threads()
    return _choose(mode, tile, threads, input.dtype, input.shape, weight_ih.shape, weight_hh.shape, options, state_size)
