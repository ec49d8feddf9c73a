"""Where use_winograd("auto") is slower than the better of "never" and "always".

python benchmarks/winograd_choice.py [--part 1/5] [--tile 4] [--benchmark]

Each call is timed in the modes in turn, and in "never" once more, which tells the noise: the fastest of several rounds
of each. Calls where "auto" loses are timed again for four times as long; if it still loses, but to a mode that computed
the same, that is noise, too. With tiles of 4x4, "auto" is held against "always" with tiles of either size. With
--benchmark, the times of all calls of the benchmark's shapes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

import torch
from shapes import SHAPES, Shape
from test_cpu import make_fused, make_input, make_runner
from torch import Tensor

from fused_convlstm import explain, use_winograd

TOLERANCE = 0.03
SECONDS = 0.06  # for each mode of a call
MOST_FLOPS = 3e9  # of a forward pass of the grid

BENCHMARK = [shape for shape in SHAPES if shape.kernel == 3]
BATCHES = [
    replace(shape, name=f"{shape.name}, batch {batch}", batch=batch)
    for shape in BENCHMARK
    for batch in (1, 2)
    if batch < shape.batch
]
GRID = [
    Shape(
        f"{size}x{size}, {inputs} -> {hidden}, batch {batch}, steps {steps}",
        batch,
        steps,
        inputs,
        hidden,
        size,
        size,
        3,
    )
    for size, (inputs, hidden), (batch, steps) in product(
        (3, 4, 5, 7, 9, 12, 16, 25, 48),
        ((8, 8), (16, 16), (1, 16), (32, 32), (3, 64), (64, 64), (128, 32), (128, 128), (256, 256)),
        ((1, 1), (1, 12), (8, 6)),
    )
]


class Call(NamedTuple):
    shape: Shape
    training: bool
    threads: int


def calls() -> list[Call]:
    shapes = [*BENCHMARK, *BATCHES, *(shape for shape in GRID if shape.flops <= MOST_FLOPS)]
    return [Call(*call) for call in product(shapes, (False, True), (1, 2))]


def fastest(runners: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """Of each, in turn, until all together have taken that long for each of them; at least two rounds."""
    times: list[list[float]] = [[] for _ in runners]
    begin = time.perf_counter()
    while len(times[0]) < 2 or time.perf_counter() - begin < seconds * len(runners):
        for runner, taken in zip(runners, times, strict=True):
            start = time.perf_counter()
            runner()
            taken.append(time.perf_counter() - start)
    return [min(taken) for taken in times]


def in_mode(mode: str, tile: int, runner: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with use_winograd(mode, tile):
            return runner()

    return run


class Times(NamedTuple):
    by_mode: dict[str, float]  # milliseconds; "again": "never" once more
    computed: dict[str, str]  # what, in words

    @property
    def best(self) -> str:
        others = {mode: taken for mode, taken in self.by_mode.items() if mode != "auto"}
        return min(others, key=others.__getitem__)

    @property
    def loss(self) -> float:
        """How much slower "auto" is than the best of the others."""
        return self.by_mode["auto"] / self.by_mode[self.best] - 1


def measure(call: Call, tile: int, seconds: float = SECONDS) -> Times:
    torch.set_num_threads(call.threads)
    fused = make_fused("conv_lstm2d", call.shape, torch.float32, False)
    runner = make_runner(fused, make_input(call.shape, torch.float32, call.training), call.training)
    modes = {"never": ("never", 2), "always": ("always", 2), "auto": ("auto", tile), "again": ("never", 2)}
    if tile == 4:
        modes["always, 4x4"] = ("always", 4)
    runners = {name: in_mode(*mode, runner) for name, mode in modes.items()}
    computed = {name: str(explain(run)) for name, run in runners.items()}
    times = fastest(list(runners.values()), seconds)
    return Times({name: 1000 * taken for name, taken in zip(modes, times, strict=True)}, computed)


def row(call: Call, times: Times) -> str:
    name = f"{'training' if call.training else 'inference'}, {call.shape.name}"
    shown = (f"{taken:.3g}" for mode, taken in times.by_mode.items() if mode != "again")
    return f"| {' | '.join([name, str(call.threads), *shown])} | {times.loss:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="1/1", help="K/N: every N-th call, from the K-th")
    parser.add_argument("--tile", type=int, default=2, help="the largest tiles (default: 2)")
    parser.add_argument(
        "--benchmark", action="store_true", help="only the shapes of the benchmark, and all their times"
    )
    arguments = parser.parse_args()
    first, step = map(int, arguments.part.split("/"))
    part = [call for call in calls() if call.shape in BENCHMARK or not arguments.benchmark][first - 1 :: step]
    noise, wins, losses = [], 0, 0
    modes = [name for name in measure(part[0], arguments.tile).by_mode if name != "again"]
    print(f"| call | threads | {' | '.join(f'{name} ms' for name in modes)} | loss |")
    print(f"| --- |{' ---: |' * (len(modes) + 2)}")
    for call in part:
        times = measure(call, arguments.tile)
        never, again, auto = (times.by_mode[mode] for mode in ("never", "again", "auto"))
        noise.append(abs(again / never - 1))
        wins += auto < (1 - TOLERANCE) * never
        if times.loss > TOLERANCE:
            times = measure(call, arguments.tile, 4 * SECONDS)
        lost = times.loss > TOLERANCE and times.computed["auto"] != times.computed[times.best]
        losses += lost
        if arguments.benchmark or lost:
            print(row(call, times), flush=True)
    noise.sort()
    print(
        f"\n{len(part)} calls, auto faster than never by more than {TOLERANCE:.0%} in {wins}, slower than the best of "
        f'the others by more than that in {losses}; "never" against itself: median {noise[len(noise) // 2]:.1%}, '
        f"95th percentile {noise[len(noise) * 95 // 100]:.1%}"
    )


if __name__ == "__main__":
    main()
