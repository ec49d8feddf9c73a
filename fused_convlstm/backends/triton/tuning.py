"""Tile shapes: a short list for each architecture and arithmetic, a choice by arithmetic, and measurement on request.

Without autotuning the choice depends on the sizes of the call and on the device's name alone, so results are the same
from run to run. With it (``FUSED_CONVLSTM_TRITON_AUTOTUNE=1`` or :func:`autotune`) each new problem is timed once per
process, and the fastest tile is kept; a captured CUDA graph is never interrupted by it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .launch import capability, multiprocessors
from .tile import Tile

ENVIRONMENT_VARIABLE = "FUSED_CONVLSTM_TRITON_AUTOTUNE"

FORWARD = "forward"  # a dot of (BM, BK) x (BK, 4 * BN)
BACKWARD = "backward"  # a dot of (BM, BK) x (BK, BN)
POOLED = "pooled"  # a dot of (BM, BK) x (BK, BN), its left side computed in registers


# 16-bit and tf32 arithmetic run on the tensor cores, fp32 ("ieee") on the others. Depth is in bytes, so that one list
# serves 2- and 4-byte elements: bk here counts 2-byte elements.
_HOPPER = {
    FORWARD: (
        Tile(128, 64, 64, 8, 3),
        Tile(128, 32, 64, 8, 4),
        Tile(64, 32, 64, 4, 4),
        Tile(64, 16, 64, 4, 4),
        Tile(32, 16, 64, 4, 4),
        Tile(16, 16, 64, 4, 4),
    ),
    BACKWARD: (
        Tile(128, 128, 64, 8, 3),
        Tile(128, 64, 64, 8, 4),
        Tile(64, 64, 64, 4, 4),
        Tile(64, 32, 64, 4, 4),
        Tile(32, 32, 64, 4, 4),
        Tile(16, 32, 64, 2, 4),
    ),
    POOLED: (
        Tile(128, 128, 32, 8, 2),
        Tile(64, 128, 32, 4, 2),
        Tile(64, 64, 32, 4, 2),
        Tile(32, 64, 32, 4, 2),
        Tile(16, 32, 32, 2, 2),
    ),
}
# sm_80, sm_86, sm_89 and sm_120: less shared memory, mma.sync.
_AMPERE = {
    FORWARD: (
        Tile(128, 32, 32, 8, 3),
        Tile(64, 32, 32, 4, 3),
        Tile(64, 16, 32, 4, 4),
        Tile(32, 16, 32, 4, 4),
        Tile(16, 16, 32, 4, 4),
    ),
    BACKWARD: (
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(64, 32, 32, 4, 4),
        Tile(32, 32, 32, 4, 4),
        Tile(16, 32, 32, 2, 4),
    ),
    POOLED: (
        Tile(64, 128, 32, 8, 2),
        Tile(64, 64, 32, 4, 2),
        Tile(32, 64, 32, 4, 2),
        Tile(16, 32, 32, 2, 2),
    ),
}
_IEEE = {
    FORWARD: (Tile(64, 16, 32, 8, 2), Tile(32, 16, 32, 4, 2), Tile(16, 16, 32, 4, 2)),
    BACKWARD: (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
    POOLED: (Tile(64, 64, 32, 8, 2), Tile(32, 32, 32, 4, 2), Tile(16, 32, 32, 4, 2)),
}

_autotuning: bool | None = None  # by autotune()
_timings: dict[tuple[object, ...], dict[Tile, float]] = {}


def autotune(enabled: bool | None = True) -> None:
    """Turns measurement on or off for this process; None: as the environment variable says."""
    global _autotuning
    _autotuning = enabled


def enabled() -> bool:
    """Whether new problems are measured."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "0") == "1" if _autotuning is None else _autotuning


def measured() -> dict[tuple[object, ...], Tile]:
    """What autotuning has chosen so far: (kernel, capability, element bytes, precision, problem) -> tile."""
    return {key: min(times, key=lambda tile: times[tile]) for key, times in _timings.items()}


def timings() -> dict[tuple[Any, ...], dict[Tile, float]]:
    """What autotuning has measured so far: the same keys -> milliseconds of a launch with each tile, infinite where it
    does not compile or does not fit the device."""
    return dict(_timings)


def tiles(kind: str, capability: int, precision: str) -> tuple[Tile, ...]:
    """The list for a compute capability (major * 10 + minor), largest tile first; ``bk`` in 2-byte elements."""
    if precision == "ieee-fp32":
        return _IEEE[kind]
    return (_HOPPER if capability // 10 in (9, 10) else _AMPERE)[kind]


def depth(tile: Tile, channels: int, element_bytes: int) -> int:
    """Elements of the dot's inner dimension a step takes: no more than ``channels`` need, 16 at least."""
    limit = max(16, tile.bk * 2 // element_bytes)
    needed = 16
    while needed < channels and needed < limit:
        needed *= 2
    return needed


def default(
    kind: str, images: int, rows: int, channels: int, groups: int, options: tuple[Tile, ...], processors: int
) -> Tile:
    """The tile with the least estimated time: waves of programs, times the time of one.

    A narrow tile reads its operands more often for the same arithmetic, hence the efficiency; measured lists replace
    this estimate where there are any."""

    def estimate(tile: Tile) -> float:
        width = tile.bn * (4 if kind == FORWARD else 1)
        programs = images * -(-rows // tile.bm) * -(-channels // tile.bn) * groups
        resident = 1 if tile.bm * width >= 128 * 128 else 2
        waves = -(-programs // (processors * resident))
        efficiency = tile.bm / (tile.bm + 64) * width / (width + 64)
        return waves * resident * tile.bm * width / efficiency

    return min(options, key=estimate)


def choose(
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    images: int,  # tiles do not reach from one to the next
    rows: int,  # of an image
    channels: int,
    groups: int,
    problem: tuple[object, ...],
    run: Callable[[Tile], Callable[[], object]] | None = None,
) -> Tile:
    """The tile for a call. ``run(tile)`` prepares a launch that autotuning may repeat."""
    if device.type != "cuda":  # the interpreter: small tiles, but more than one of them
        return Tile(32, 32, 128, 4, 1)
    arch = capability(device)
    fp32 = "ieee-fp32" if dtype == torch.float32 and precision == "ieee" else precision
    options = tiles(kind, arch, fp32)
    if not enabled() or run is None or len(options) == 1:
        return default(kind, images, rows, channels, groups, options, multiprocessors(device))
    key = (kind, arch, dtype.itemsize, fp32, images, rows, channels, groups, *problem)
    if key not in _timings:
        if torch.cuda.is_current_stream_capturing():
            return default(kind, images, rows, channels, groups, options, multiprocessors(device))
        times = _timings[key] = {}
        for tile in options:
            times[tile] = float("inf")  # it stays so if this tile leaves CUDA unusable
            times[tile] = _time(run(tile))
    return min(_timings[key], key=lambda tile: _timings[key][tile])


def _time(launch: Callable[[], object]) -> float:
    """Milliseconds of one launch; infinite if the tile does not compile or does not fit the device."""
    import triton
    from triton.runtime.errors import OutOfResources

    try:
        return float(triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return float("inf")
    except Exception as error:  # of the compiler, say: the other tiles may do
        torch.cuda.synchronize()  # raises if nothing runs any more
        warnings.warn(f"a tile fails: {error}", stacklevel=2)
        return float("inf")
