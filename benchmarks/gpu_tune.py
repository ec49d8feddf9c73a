"""``python benchmarks/gpu_tune.py``: every tile of both GPU backends on every problem of the GPU benchmark.

Of Triton, the time of a launch for each kernel and each tile of its list, beside the tile that is chosen without
autotuning; of the CUDA kernels, the time of a call for each way to run it. Writes
``results/tuning-DEVICE.json`` and ``.md`` as it goes; a run that was stopped goes on where it was, as long as
device, versions and code are the same. From it come the lists in ``backends/triton/tuning.py`` and the choices in
``csrc/cuda/conv_lstm.cuh`` and ``backends/cuda/measured.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import torch
from gpu import Problem

from fused_convlstm.backends import registry

# `Sequence.tile` of csrc/cuda/params.h; where all steps at once do not fit the device, the small tile runs.
CUDA_TILES = {"chosen": 0, "small": 1, "large": 2, "all steps at once": 3}
Rows = list[dict[str, Any]]


@contextmanager
def cuda_tile(number: int) -> Iterator[None]:
    """Within the block, the CUDA kernels run this way."""
    backend: Any = registry.get("cuda")
    before = backend._kernels
    backend._kernels = lambda input: replace(before(input), tile=number)
    try:
        yield
    finally:
        del backend._kernels


def cuda_row(problem: Problem) -> dict[str, Any]:
    """Milliseconds of a call for each way to run it; None where it cannot."""
    times: dict[str, float | None] = {}
    for name, number in CUDA_TILES.items():
        function = gpu.prepare(problem, "cuda, channels last")
        with cuda_tile(number):
            try:
                times[name] = gpu.time_ms(function)[0]
            except RuntimeError as error:
                print(f"{problem}, {name}: {error}", flush=True)
                times[name] = None
    return {"problem": str(problem), "times": times}


def triton_names(problem: Problem) -> list[str]:
    """The implementations that launch every kernel of a problem."""
    return [f"triton, channels last{more}" for more in (("", ", recompute") if problem.training else ("",))]


def triton_rows(problem: Problem, names: list[str]) -> Rows:
    """Milliseconds of a launch for each kernel of this problem and each tile, and the tile chosen without them."""
    from fused_convlstm.backends.triton import tuning

    rows: Rows = []
    seen = set(tuning.timings())
    tuning.autotune(True)
    for name in names:
        gpu.prepare(problem, name)()
    tuning.autotune(None)
    for key, times in tuning.timings().items():
        if key not in seen:
            kind, arch, element_bytes, precision, images, rows_of_image, channels, groups, *rest = key
            device = torch.device("cuda")
            chosen = tuning.default(
                kind, images, rows_of_image, channels, groups, tuple(times), tuning.multiprocessors(device)
            )
            rows.append(
                {
                    "problem": str(problem), "kernel": kind, "capability": arch, "element_bytes": element_bytes,
                    "precision": precision, "images": images, "rows": rows_of_image, "channels": channels,
                    "groups": groups, "rest": rest, "chosen": tile_name(chosen),
                    "times": {tile_name(tile): ms for tile, ms in times.items()},
                }
            )  # fmt: skip
    return rows


def tile_name(tile: Any) -> str:
    return f"{tile.bm}x{tile.bn}x{tile.bk}, {tile.num_warps} warps, {tile.num_stages} stages"


def table(rows: Rows, head: Callable[[dict[str, Any]], str]) -> str:
    """A line for each row: what was chosen, what would have been best, and what the choice lost."""
    lines = ["| call | chosen | ms | best | ms | lost |", "| --- | --- | ---: | --- | ---: | ---: |"]
    for row in rows:
        times = {name: ms for name, ms in row["times"].items() if ms is not None and ms != float("inf")}
        chosen = row.get("chosen", "chosen")
        if chosen in times:
            best = min(times, key=lambda name: times[name])
            lost = times[chosen] / times[best] - 1
            lines.append(f"| {head(row)} | {chosen} | {times[chosen]:.4f} | {best} | {times[best]:.4f} | {lost:.0%} |")
    return "\n".join(lines)


def save(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + "\n")
    text = [
        ", ".join(f"{key} {value}" for key, value in facts["machine"].items()),
        "Triton, a launch:",
        table(facts["triton"], lambda row: f"{row['problem']}, {row['kernel']} {row['rest']}"),
        "CUDA, a call:",
        table(facts["cuda"], lambda row: str(row["problem"])),
    ]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-tune: no CUDA device, so nothing was measured")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    gpu.RESULTS.mkdir(exist_ok=True)
    path = gpu.RESULTS / f"tuning-{gpu.slug()}.json"
    facts: dict[str, Any] = {"machine": gpu.machine(), "done": [], "triton": [], "cuda": []}
    if path.exists() and gpu.same_run((earlier := json.loads(path.read_text()))["machine"]):
        facts = earlier
    gpu.allow_everything()
    if "triton" in gpu.usable_backends():
        from fused_convlstm.backends.triton.tuning import ENVIRONMENT_VARIABLE

        os.environ[ENVIRONMENT_VARIABLE] = "1"  # for the processes that compile: every tile
        left = [problem for problem in gpu.plan() if f"{problem}, triton" not in facts["done"]]
        gpu.compile_ahead([(problem, triton_names(problem)) for problem in left], 0.4 * 60 * arguments.minutes)
        del os.environ[ENVIRONMENT_VARIABLE]
    for problem in gpu.plan():
        for backend in gpu.usable_backends():
            what = f"{problem}, {backend}"
            if what in facts["done"] or (backend == "cuda" and problem.cell != gpu.CELLS[0]):
                continue  # the pooled gates' CUDA kernels have one tile
            if time.monotonic() > deadline:
                print(f"no time left for {what} and what follows; run again to go on")
                save(path, facts)
                return 1
            if backend == "triton":
                facts["triton"] += triton_rows(problem, triton_names(problem))
            else:
                facts["cuda"].append(cuda_row(problem))
            facts["done"].append(what)
            save(path, facts)
            print(what, flush=True)
    print(path.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
