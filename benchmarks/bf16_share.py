"""How near the bfloat16 kernels come to the processor's multiply-adds.

python benchmarks/bf16_share.py [--training] [--threads N] [--shapes lip24,lip12,...]

Measures the peak, a loop of multiply-adds in registers, then prints for each shape its floor and the share of the peak
that is reached. Needs AVX512-BF16 and a C++ compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from shapes import SHAPES, Shape
from test_cpu import make_fused, make_input, make_runner

LARGE = "lip24,lip12,lip6,gesture,nowcast"


def peak_rate(threads: int) -> float:
    """Multiply-adds in 10^9 a second of ``threads`` threads that do nothing else."""
    rounds, seconds = 4_000_000, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(threads) as pool:
        library = Path(folder) / "peak.so"
        source = Path(__file__).with_name("bf16_peak.cpp")
        compiler = (os.environ.get("CXX") or "g++").split()
        subprocess.run([*compiler, "-O2", "-shared", "-fPIC", "-mavx512f", str(source), "-o", str(library)], check=True)
        multiply_add = ctypes.CDLL(str(library)).multiply_add
        multiply_add.argtypes, multiply_add.restype = [ctypes.c_int64], None
        for _ in range(10):
            start = time.perf_counter()
            list(pool.map(multiply_add, [rounds] * threads))
            seconds.append(time.perf_counter() - start)
    return threads * rounds * 24 * 32 / min(seconds) / 1e9


def copy_rate() -> float:
    """Bytes in 10^9 a second that a copy reads and writes."""
    source = torch.zeros(2**26)
    target = source.clone()
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), 0.5)) / 1e9


def multiply_adds(shape: Shape, training: bool) -> float:
    """Products of a forward pass or a training step, those with the zeros of the border left out."""

    def connections(size: int, stride: int) -> int:
        taps, pad = range(shape.kernel), (shape.kernel - 1) // 2
        return sum(0 <= k * stride - pad + tap < size for k in range(-(-size // stride)) for tap in taps)

    outputs = shape.batch * 4 * shape.hidden_channels
    x = outputs * shape.in_channels * connections(shape.height, shape.stride) * connections(shape.width, shape.stride)
    height, width = shape.state_size
    h = outputs * shape.hidden_channels * connections(height, 1) * connections(width, 1)
    if not training:
        return shape.steps * (x + h)
    return 3 * shape.steps * (x + h) - h  # the initial state needs no gradient


def least_bytes(shape: Shape, training: bool) -> float:
    """Bytes of the caller's tensors, each read or written once, and of what the backward needs."""
    height, width = shape.state_size
    state = shape.batch * shape.steps * shape.hidden_channels * height * width
    frames = shape.batch * shape.steps * shape.in_channels * shape.height * shape.width
    forward = 2 * (frames + state)
    saved = (4 + 1) * 2 * state  # gates and cell states
    return forward + 2 * saved + forward + 2 * (frames + state) if training else forward


def seconds_of(run: Callable[[], object], total: float) -> list[float]:
    run()
    times: list[float] = []
    while sum(times) < total or len(times) < 3:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", action="store_true", help="a training step instead of a forward pass")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", default=LARGE, help=f"names of benchmarks/shapes.py (default: {LARGE})")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    copy, peak, measured = copy_rate(), 0.0, {}
    for shape in (next(shape for shape in SHAPES if shape.name == name) for name in options.shapes.split(",")):
        peak = max(peak, peak_rate(options.threads))  # again and again: other programs disturb it, too
        layer = make_fused("conv_lstm2d", shape, torch.bfloat16, recompute=False)
        run = make_runner(layer, make_input(shape, torch.bfloat16, options.training), options.training)
        measured[shape] = 1e3 * statistics.median(seconds_of(run, 2.0))
    print(f"{options.threads} threads: {peak:.0f} * 10^9 multiply-adds/s, {copy:.1f} * 10^9 bytes/s\n")
    print(
        "| shape | multiply-adds, 10^9 | at peak, ms | bytes, 10^6 | at copy rate, ms | measured, ms | share of peak |"
    )
    print("| --- " + "| ---: " * 6 + "|")
    for shape, ms in measured.items():
        products, moved = multiply_adds(shape, options.training) / 1e9, least_bytes(shape, options.training) / 1e6
        print(
            f"| {shape.name} | {products:.2f} | {1e3 * products / peak:.3g} | {moved:.3g} | {moved / copy:.2g} "
            f"| {ms:.3g} | {1e3 * products / peak / ms:.0%} |"
        )


if __name__ == "__main__":
    main()
