"""The machine's peaks, and the memory of a training step."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache
def matmul_gflops(dtype: torch.dtype) -> float:
    """The highest rate of a square matrix product on this machine, GFLOP/s."""
    best = 0.0
    for size in (1024, 2048, 3072):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        torch.mm(a, b)
        for _ in range(6):
            start = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start) / 1e9)
    return best


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def peak_memory_mib(function: Callable[[], object]) -> float | None:
    """Highest resident memory while ``function`` runs, above what was resident before; None where unknown (not Linux).

    Resident memory, not an allocator's count, so that scratch memory of kernels is in it.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or freed memory of an earlier run would be used again, uncounted
    before = _status_mib("VmRSS")
    reset.write_text("5")  # sets the high-water mark back
    function()
    return _status_mib("VmHWM") - before
