"""``python benchmarks/gpu_profile.py``: where the time of a call goes, kernel by kernel, beside what it costs at least.

For training and inference of the most important problems and both GPU backends: the time of a call, how long the GPU
was busy, every kernel's share (PyTorch's profiler), and the floor (arithmetic at the measured matmul rate, bytes at the
measured copy rate, launches at their measured cost). ``--ncu`` adds, after all of these, what Nsight Compute says of
our kernels. Writes ``profile-DEVICE.json`` and ``.md`` into ``--results`` as it goes; a run that was stopped goes on
where it was, as long as device, versions and code are the same. Calls run in another process, which is ended if one
hangs.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu
import torch
from gpu import Problem

NAMES = ("lip24", "lip12", "lip6", "gesture", "nowcast")
CALLS = 3
NCU_SECONDS = 120.0  # for one implementation
KERNELS = 12  # lines of a table
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
METRICS = (
    "Duration", "Compute (SM) Throughput", "DRAM Throughput", "L2 Cache Throughput", "L1/TEX Cache Throughput",
    "Registers Per Thread", "Dynamic Shared Memory Per Block", "Waves Per SM", "Achieved Occupancy",
    "Warp Cycles Per Issued Instruction",
)  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A kernel on the GPU; microseconds."""

    name: str
    start: float
    end: float


def busy(launches: Sequence[Launch]) -> float:
    """Microseconds during which at least one kernel ran."""
    total, until = 0.0, float("-inf")
    for launch in sorted(launches, key=lambda k: k.start):
        total += max(0.0, launch.end - max(launch.start, until))
        until = max(until, launch.end)
    return total


def kernel_table(launches: Sequence[Launch], calls: int) -> str:
    """The kernels of a call, the longest first."""
    times: dict[str, list[float]] = {}
    for launch in launches:
        times.setdefault(launch.name, []).append(launch.end - launch.start)
    whole = sum(map(sum, times.values()))
    lines = ["| kernel | launches | us each | ms | share |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, its in sorted(times.items(), key=lambda item: -sum(item[1]))[:KERNELS]:
        short = name if len(name) <= 90 else f"{name[:60]}...{name[-27:]}"
        lines.append(
            f"| `{short}` | {len(its) / calls:g} | {sum(its) / len(its):.1f} | {sum(its) / calls / 1e3:.3f} | "
            f"{sum(its) / whole:.0%} |"
        )
    return "\n".join(lines)


def profiled(function: Callable[[], object]) -> list[Launch]:
    """What ran on the GPU during ``CALLS`` calls."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(CALLS):
            function()
        torch.cuda.synchronize()
    on_gpu = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [Launch(event.name, event.time_range.start, event.time_range.end) for event in on_gpu]


def section(problem: Problem, name: str, rate: float, bandwidth: float, launch_cost: float) -> str:
    """The text of one; runs in a child process."""
    function = gpu.prepare(problem, name)
    median = gpu.time_ms(function)[0]
    launches = profiled(function)
    count = len(launches) / CALLS
    floor = {
        "arithmetic": 1e3 * problem.flops / rate,
        "bytes": 1e3 * problem.least_bytes / bandwidth,
        "launches": 1e3 * count * launch_cost,
    }
    return "\n\n".join(
        [
            f"## {problem}, {name}",
            f"A call {median:.3f} ms; GPU busy {busy(launches) / CALLS / 1e3:.3f} ms in {count:g} launches; floor "
            + ", ".join(f"{what} {ms:.3f} ms" for what, ms in floor.items())
            + ".",
            kernel_table(launches, CALLS),
        ]
    )


def ncu_table(text: str) -> str:
    """A line for each kernel from ncu's CSV (``--page details``): the first launch of each."""
    begin = text.find('"ID"')
    kernels: dict[str, dict[str, str]] = {}
    first: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO(text[begin:])) if begin >= 0 else ():
        name = row["Kernel Name"]
        if first.setdefault(name, row["ID"]) == row["ID"] and row["Metric Name"] in METRICS:
            kernels.setdefault(name, {})[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    if not kernels:
        return f"ncu gave nothing: {text[-500:]}"
    lines = [f"| kernel | {' | '.join(METRICS)} |", "| --- " * (len(METRICS) + 1) + "|"]
    for name, metrics in kernels.items():
        lines.append(f"| `{name[:60]}` | {' | '.join(metrics.get(metric, '') for metric in METRICS)} |")
    return "\n".join(lines)


def ncu(problem: Problem, name: str) -> str:
    program = shutil.which("ncu")
    if program is None:
        return "ncu: not found"
    command: list[Any] = [
        program,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "details",
    ]
    command += [argument for title in SECTIONS for argument in ("--section", title)]
    command += ["--kernel-name", "regex:lstm|pooled_gate", "--launch-count", "8"]
    command += [sys.executable, __file__, "--once", str(problem), name]
    code, said = gpu.run_program(command, NCU_SECONDS)
    return f"ncu: not done within {NCU_SECONDS:.0f} s" if code is None else ncu_table(said)


def once(problem: Problem, name: str) -> None:
    """One call between cudaProfilerStart and cudaProfilerStop, for ncu."""
    function = gpu.prepare(problem, name)
    function()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    function()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def save(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=1) + "\n")
    matmul_flops, bandwidth, launch_cost = facts["rates"]
    text = [
        ", ".join(f"{key} {value}" for key, value in facts["machine"].items()),
        f"Matmul bf16 {matmul_flops['bf16'] / 1e12:.0f} TFLOP/s, copy {bandwidth / 1e9:.0f} GB/s, "
        f"launch {launch_cost * 1e6:.1f} us.",
    ]
    for what, section in facts["sections"].items():
        text += [section, *([facts["ncu"][what]] if what in facts["ncu"] else [])]
    path.with_suffix(".md").write_text("\n\n".join(text) + "\n")


def run(arguments: argparse.Namespace, problems: Sequence[Problem]) -> int:
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"profile-{gpu.slug()}.json"
    facts = gpu.going_on(path, {"rates": None, "sections": {}, "ncu": {}, "failed": []})
    jobs = [
        (part, problem, f"{backend}, channels last")
        for part in (("sections", "ncu") if arguments.ncu else ("sections",))
        for problem in problems
        if problem.precision == "bf16" and problem.shape.name in arguments.shapes
        for backend in gpu.usable_backends()
    ]
    with gpu.Child() as child:
        facts["rates"] = facts["rates"] or child.call(gpu.WAIT, gpu.rates)
        matmul_flops, bandwidth, launch_cost = facts["rates"]
        for part, problem, name in jobs:
            what = f"{problem}, {name}"
            if what in facts[part]:
                continue
            if time.monotonic() > deadline:
                print(f"no time left for {what} ({part}) and what follows; run again to go on")
                return 1
            if part == "ncu":
                child.end()  # the GPU to ncu alone
                facts[part][what] = ncu(problem, name)
            else:
                try:
                    rates = matmul_flops["bf16"], bandwidth, launch_cost
                    facts[part][what] = child.call(gpu.WAIT, section, problem, name, *rates, kind=name)
                except gpu.ChildError as error:
                    facts[part][what] = f"## {what}\n\nFailed: {error}"
                    facts["failed"].append(what)
            save(path, facts)
            print(facts[part][what], flush=True)
    return 1 if facts["failed"] else 0


def main() -> int:
    parser = gpu.parser(__doc__)
    parser.add_argument("--ncu", action="store_true", help="with Nsight Compute's view of our kernels")
    parser.add_argument("--shapes", nargs="+", default=NAMES, help=f"of the benchmark; default: {' '.join(NAMES)}")
    parser.add_argument("--once", nargs=2, metavar=("PROBLEM", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-profile: no CUDA device, so nothing was measured")
        return 0
    problems = {str(problem): problem for problem in gpu.plan()}
    if arguments.once:
        gpu.allow_everything()
        once(problems[arguments.once[0]], arguments.once[1])
        return 0
    return run(arguments, list(problems.values()))


if __name__ == "__main__":
    sys.exit(main())
