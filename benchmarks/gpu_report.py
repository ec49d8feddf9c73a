"""``python benchmarks/gpu_report.py`` (``make gpu-report``): the GPU suite, and the benchmark against what people use.

One command of at most ``--minutes``: the tests marked ``gpu``, compute-sanitizer if there is one, then the benchmark,
the most important problems first. Writes JSON, Markdown and a chart into ``benchmarks/results/`` as it goes; what no
time was left for is listed, and measured by the next run, which goes on where this one stopped as long as device,
versions and code are the same. Without a CUDA device it says so and changes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gpu
import torch
from gpu import Problem
from torch import Tensor

from fused_convlstm.backends import registry

SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZED = """
import sys
sys.path.insert(0, "tests")
import torch
from dataclasses import replace
from cases import Case, make_tensors, run
for cell in ("conv_lstm2d", "pooled_gate_conv_lstm2d"):
    case = Case(cell=cell, hidden_channels=17, lengths=True, reset=True)
    for training in (True, False):
        run(case, make_tensors(case).to(torch.float16, "cuda"), sys.argv[1], training)
torch.cuda.synchronize()
"""


@dataclass(frozen=True)
class Result:
    """One implementation on one shape; times in milliseconds, memory in MiB."""

    cell: str
    task: str  # "inference", "training"
    precision: str
    shape: str
    implementation: str  # a backend, with "channels last", "recompute" or "CUDA graph" after it; or a peer
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_memory_mib: float | None  # None: a graph owns its memory for as long as it lives
    matmul_share: float  # of the measured matmul rate
    bandwidth_share: float  # of the measured copy bandwidth

    @property
    def is_peer(self) -> bool:
        return self.implementation in gpu.PEERS

    @property
    def key(self) -> tuple[str, ...]:
        return self.cell, self.task, self.precision, self.shape, self.implementation


@dataclass
class Report:
    """All that is known, as it stands in the JSON file."""

    machine: dict[str, str]
    suite: dict[str, str]  # "passed": "yes", "no" or "not run"; "summary"
    sanitizer: dict[str, str]
    matmul_flops: dict[str, float]
    copy_bandwidth: float
    launch_cost: float
    failures: dict[str, str]
    results: list[Result]

    @classmethod
    def load(cls, path: Path) -> Report:
        facts = json.loads(path.read_text())
        return cls(**{**facts, "results": [Result(**r) for r in facts["results"]]})

    def save(self, path: Path) -> None:
        text = json.dumps({**vars(self), "results": [asdict(r) for r in self.results]}, indent=1)
        path.with_suffix(".json").write_text(text + "\n")
        path.with_suffix(".md").write_text(self.text() + "\n")

    def to_do(self) -> list[tuple[Problem, list[str]]]:
        """What of the plan is not measured."""
        known = {r.key for r in self.results}
        left = [
            (
                p,
                [
                    n
                    for n in gpu.implementations(p.training)
                    if (p.cell, p.task, p.precision, p.shape.name, n) not in known
                ],
            )
            for p in gpu.plan()
        ]
        return [(problem, names) for problem, names in left if names]

    def text(self) -> str:
        rates = ", ".join(f"{precision} {rate / 1e12:.0f} TFLOP/s" for precision, rate in self.matmul_flops.items())
        text = [
            ", ".join(f"{key} {value}" for key, value in self.machine.items()),
            f"Suite: {self.suite['summary']}. Matmul {rates}; copy {self.copy_bandwidth / 1e9:.0f} GB/s; "
            f"launch {self.launch_cost * 1e6:.1f} us.",
            "\n".join(f"- {name}: {said}" for name, said in self.sanitizer.items()),
        ]
        if self.suite["passed"] != "yes":
            text.append("**The suite has not passed: the times below prove nothing.**")
        text += [tables(self.results), backend_table(self.results)]
        if self.failures:
            text.append("Failed:\n\n" + "\n".join(f"- {name}: {why}" for name, why in self.failures.items()))
        missing = [f"{p}, {name}" for p, names in self.to_do() for name in names if f"{p}, {name}" not in self.failures]
        if missing:
            text.append("Not measured, for want of time:\n\n" + "\n".join(f"- {name}" for name in missing))
        return "\n\n".join(part for part in text if part)


def measure(problem: Problem, name: str, report: Report, expected: list[Tensor]) -> Result:
    """``expected``: what the first implementation of the problem gave; it is put there."""
    function = gpu.prepare(problem, name)
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    given = function()
    torch.cuda.synchronize()
    peak = None if "CUDA graph" in name else (torch.cuda.max_memory_allocated() - before) / 2**20
    first = (given if isinstance(given, Tensor) else next(iter(given))).float()  # the output, or the input's gradient
    if not expected:
        expected.append(first)
    difference = float((first - expected[0]).norm() / expected[0].norm())
    if not difference <= gpu.AGREEMENT[problem.precision]:
        raise RuntimeError(f"differs from the first implementation by {difference:.2g} of its norm")
    del given, first
    median, low, high = gpu.time_ms(function)
    rate = problem.flops / median * 1e3 / report.matmul_flops[problem.precision]
    moved = problem.least_bytes / median * 1e3 / report.copy_bandwidth
    return Result(
        problem.cell, problem.task, problem.precision, problem.shape.name, name, median, low, high, peak, rate, moved
    )


def run_tests(seconds: float, log: Path) -> dict[str, str]:
    """The GPU suite: of the other files, not even the imports have to work."""
    files = [str(path) for path in sorted((gpu.ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    with log.open("w") as out:
        try:
            code = subprocess.run(command, cwd=gpu.ROOT, stdout=out, stderr=out, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            code = None
    said = log.read_text()
    print(said[-6000:], flush=True)
    if code is None:
        return {"passed": "no", "summary": f"not done within {seconds:.0f} s"}
    lines = [line.strip("= ") for line in said.strip().splitlines()] or ["no output"]
    return {"passed": "yes" if code == 0 and " passed" in lines[-1] else "no", "summary": lines[-1]}


def run_sanitizer(tool: str, backend: str, seconds: float) -> str:
    """What a tool of compute-sanitizer says about small calls of both cells."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: no compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, backend]
    try:
        done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:.0f} s"
    said = done.stdout + done.stderr
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
    if done.returncode != 0 or not found:
        print(said[-3000:], flush=True)
    return found[-1] if found else f"exit code {done.returncode}: {said[-300:]}"


def best(results: Sequence[Result]) -> Result:
    return min(results, key=lambda r: r.median_ms)


def groups(results: Sequence[Result]) -> dict[tuple[str, str, str], dict[str, list[Result]]]:
    found: dict[tuple[str, str, str], dict[str, list[Result]]] = {}
    for r in results:
        found.setdefault((r.cell, r.task, r.precision), {}).setdefault(r.shape, []).append(r)
    return found


def speed_ups(shapes: dict[str, list[Result]]) -> dict[str, float]:
    """By shape, the fastest of ours over the fastest peer."""
    ratios = {}
    for shape, results in shapes.items():
        peers, ours = [r for r in results if r.is_peer], [r for r in results if not r.is_peer]
        if peers and ours:
            ratios[shape] = best(peers).median_ms / best(ours).median_ms
    return ratios


def tables(results: Sequence[Result]) -> str:
    parts = []
    for (cell, task, precision), shapes in groups(results).items():
        lines = [
            f"{cell}, {task}, {precision}", "",
            "| shape | ours ms | which | strongest peer ms | which | ratio | of matmul rate | of bandwidth | memory |",
            "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
        ratios = speed_ups(shapes)
        for shape, ratio in ratios.items():
            peer = best([r for r in shapes[shape] if r.is_peer])
            ours = best([r for r in shapes[shape] if not r.is_peer])
            eager = [r.peak_memory_mib for r in shapes[shape] if r.implementation == "eager"]
            memory = []
            for word in ("", "recompute"):
                peaks = [
                    r.peak_memory_mib for r in shapes[shape]
                    if not r.is_peer and ("recompute" in r.implementation) == bool(word)
                    and r.peak_memory_mib is not None
                ]  # fmt: skip
                if task == "training" and peaks and eager and eager[0]:
                    memory.append(f"{min(peaks) / eager[0]:.2f} {word}".strip())
            lines.append(
                f"| {shape} | {ours.median_ms:.3f} | {ours.implementation} | {peer.median_ms:.3f} | "
                f"{peer.implementation} | {ratio:.2f} | {ours.matmul_share:.0%} | {ours.bandwidth_share:.0%} | "
                f"{', '.join(memory)} |"
            )
        if ratios:
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            lines.append(f"| geometric mean | | | | | {mean:.2f} | | | |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def backend_table(results: Sequence[Result]) -> str:
    """One backend beside the other, without a CUDA graph: what the automatic choice has to go by."""
    lines = []
    for (cell, task, precision), shapes in groups(results).items():
        for shape, its in shapes.items():
            triton, cuda = (
                min((r.median_ms for r in its if r.implementation in (b, f"{b}, channels last")), default=None)
                for b in ("triton", "cuda")
            )
            if triton is not None and cuda is not None:
                times = f"{triton:.3f} | {cuda:.3f} | {triton / cuda:.2f}"
                lines.append(f"| {cell} | {task} | {precision} | {shape} | {times} |")
    if not lines:
        return ""
    header = "| cell | task | precision | shape | triton ms | cuda ms | triton / cuda |"
    return "\n".join(
        ["The backends beside each other:", "", header, "| --- | --- | --- | --- | ---: | ---: | ---: |", *lines]
    )


def chart(results: Sequence[Result], path: Path) -> None:
    """Bars: how many times as fast as the strongest peer, a panel for each cell, task and precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {key: speed_ups(shapes) for key, shapes in groups(results).items()}
    panels = {key: ratios for key, ratios in panels.items() if ratios}
    if not panels:
        return
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 2.4 * len(panels)), squeeze=False, layout="constrained")
    for axis, (key, ratios) in zip(axes[:, 0], panels.items(), strict=True):
        axis.bar_label(axis.bar(list(ratios), list(ratios.values()), color="#3b6ea5"), fmt="%.2f", fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(", ".join(key), fontsize=9, loc="left")
        axis.set_ylabel("speed-up over peer", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def begin(path: Path) -> Report:
    """The report of an earlier run of the same code on the same device, or a new one."""
    if path.exists() and gpu.same_run((report := Report.load(path)).machine):
        report.machine = gpu.machine()
        print(f"going on with {path.name}: {len(report.results)} measured")
        return report
    suite = {"passed": "not run", "summary": "not run"}
    return Report(gpu.machine(), suite, {}, {}, 0.0, 0.0, {}, [])


def check(report: Report, path: Path, seconds: float) -> None:
    """Suite and sanitizer, as far as they have not passed yet; saved as they come."""
    if report.suite["passed"] != "yes":
        report.suite = run_tests(0.8 * seconds, path.with_suffix(".log"))
        report.save(path)
    for tool in SANITIZER_TOOLS:
        for backend in gpu.usable_backends():
            what = f"{tool}, {backend}"
            if " 0 " not in report.sanitizer.get(what, ""):
                report.sanitizer[what] = run_sanitizer(tool, backend, 0.1 * seconds)
                report.save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument(
        "--skip-tests", action="store_true", help="measure only; the report says that nothing is proven"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-report: no CUDA device, so nothing was tested or measured")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    gpu.RESULTS.mkdir(exist_ok=True)
    path = gpu.RESULTS / f"gpu-{gpu.slug()}.json"
    report = begin(path)
    if not arguments.skip_tests:
        check(report, path, 0.55 * 60 * arguments.minutes)
    print(f"GPU suite: {report.suite['summary']}", *(f"{k}: {v}" for k, v in report.sanitizer.items()), sep="\n")

    gpu.allow_everything()
    report.matmul_flops = {precision: gpu.matmul_rate(dtype) for precision, dtype in gpu.DTYPES.items()}
    report.copy_bandwidth, report.launch_cost = gpu.copy_bandwidth(), gpu.launch_cost()
    report.failures = {
        name: reason
        for name in gpu.BACKENDS
        if (reason := "not registered" if name not in registry.names() else registry.get(name).unavailable())
        is not None
    }
    left = report.to_do()
    gpu.compile_ahead([(p, gpu.compiled(names)) for p, names in left], 0.4 * (deadline - time.monotonic()))
    for problem, names in left:
        expected: list[Tensor] = []
        for name in names:
            if time.monotonic() > deadline - 15:
                break
            what = f"{problem}, {name}"
            try:
                report.results.append(measure(problem, name, report, expected))
            except Exception as error:  # one implementation's failure is a finding, reported with the others
                report.failures[what] = f"{type(error).__name__}: {str(error)[:200]}"
                print(f"{what}: {report.failures[what]}", flush=True)
            else:
                print(f"{what}: {report.results[-1].median_ms:.3f} ms", flush=True)
        report.save(path)
    report.save(path)
    if importlib.util.find_spec("matplotlib") is not None:
        chart(report.results, path.with_suffix(".png"))
    else:
        print("no chart: matplotlib is not installed")
    print(report.text())
    return 0 if report.suite["passed"] == "yes" and not report.failures else 1


if __name__ == "__main__":
    sys.exit(main())
