"""``python benchmarks/gpu_tune.py``: every tile of both GPU backends on every problem of the GPU benchmark.

Of Triton, the time of a launch for each kernel and each tile of its list, beside the tile that is chosen without
autotuning; of the CUDA kernels, the time of a call for each way to run it. Writes ``tuning-DEVICE.json`` and ``.md``
into ``--results`` as it goes; a run that was stopped goes on where it was, as long as device, versions and code are the
same. Calls run in another process, which is ended if one hangs. From it come the lists in
``backends/triton/tuning.py`` and the choices in ``csrc/cuda/conv_lstm.cuh`` and ``backends/cuda/measured.py``.
"""

from __future__ import annotations

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
TRITON_SECONDS = 180.0  # for the kernels of one problem, every tile
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


def cuda_time(problem: Problem, number: int) -> float:
    """Milliseconds of a call; runs in a child process."""
    function = gpu.prepare(problem, "cuda, channels last")
    with cuda_tile(number):
        return gpu.time_ms(function)[0]


def cuda_row(problem: Problem, child: gpu.Child) -> tuple[dict[str, Any], str]:
    """Milliseconds of a call for each way to run it, None where it cannot, and what went wrong there."""
    times: dict[str, float | None] = {}
    wrong = []
    for name, number in CUDA_TILES.items():
        try:
            times[name] = child.call(gpu.WAIT, cuda_time, problem, number, kind=name)
        except gpu.ChildError as error:
            times[name] = None
            wrong.append(f"{name}: {error}")
    return {"problem": str(problem), "times": times}, "; ".join(wrong)


def triton_names(problem: Problem) -> list[str]:
    """The implementations that launch every kernel of a problem."""
    return [f"triton, channels last{more}" for more in (("", ", recompute") if problem.training else ("",))]


def triton_rows(problem: Problem, names: list[str]) -> tuple[Rows, str]:
    """Milliseconds of a launch for each kernel of this problem and each tile, the tile chosen without them, and what
    went wrong: then the last tile of the last row did, and others are missing. Runs in a child process."""
    from fused_convlstm.backends.triton import tuning

    rows: Rows = []
    seen = set(tuning.timings())
    wrong = ""
    tuning.autotune(True)
    try:
        for name in names:
            gpu.prepare(problem, name)()
        torch.cuda.synchronize()
    except Exception as error:
        wrong = gpu.said(error)
    tuning.autotune(None)
    for key, times in tuning.timings().items():
        if key not in seen:
            kind, arch, element_bytes, precision, images, rows_of_image, channels, groups, *rest = key
            processors = tuning.multiprocessors(torch.device("cuda"))
            options = tuning.tiles(kind, arch, precision)
            chosen = tuning.default(kind, images, rows_of_image, channels, groups, options, processors)
            rows.append(
                {
                    "problem": str(problem), "kernel": kind, "capability": arch, "element_bytes": element_bytes,
                    "precision": precision, "images": images, "rows": rows_of_image, "channels": channels,
                    "groups": groups, "rest": rest, "chosen": tile_name(chosen),
                    "times": {tile_name(tile): ms for tile, ms in times.items()},
                }
            )  # fmt: skip
    return rows, wrong


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
        *(f"- {what} failed: {why}" for what, why in facts["failed"].items()),
    ]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")


def main() -> int:
    arguments = gpu.parser(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("gpu-tune: no CUDA device, so nothing was measured")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"tuning-{gpu.slug()}.json"
    facts = gpu.going_on(path, {"done": [], "failed": {}, "triton": [], "cuda": []})
    if "triton" in gpu.usable_backends():
        from fused_convlstm.backends.triton.tuning import ENVIRONMENT_VARIABLE

        os.environ[ENVIRONMENT_VARIABLE] = "1"  # for the processes that compile: every tile
        left = [problem for problem in gpu.plan() if f"{problem}, triton" not in facts["done"]]
        jobs = [(problem, name) for problem in left for name in triton_names(problem)]
        gpu.compile_ahead(jobs, 0.4 * 60 * arguments.minutes)
        del os.environ[ENVIRONMENT_VARIABLE]
    with gpu.Child() as child:
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
                    try:
                        names = triton_names(problem)
                        rows, wrong = child.call(TRITON_SECONDS, triton_rows, problem, names, kind=backend)
                    except gpu.ChildError as error:
                        rows, wrong = [], str(error)
                    facts["triton"] += rows
                else:
                    row, wrong = cuda_row(problem, child)
                    facts["cuda"].append(row)
                facts["done"].append(what)
                facts["failed"] |= {what: wrong} if wrong else {}
                save(path, facts)
                print(what, wrong, flush=True)
    print(path.with_suffix(".md").read_text())
    return 1 if facts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
