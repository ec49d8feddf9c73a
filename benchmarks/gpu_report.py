"""``python benchmarks/gpu_report.py`` (``make gpu-report``): the GPU suite, and the benchmark against what people use.

One command of at most ``--minutes``: the tests marked ``gpu``, then the benchmark, the most important problems first,
then compute-sanitizer if there is one. Writes JSON, Markdown and a chart into ``--results`` as it goes; what no
time was left for is listed, and measured by the next run, which goes on where this one stopped as long as device,
versions and code are the same. Implementations run in another process, which is ended if one hangs. Fails if a test,
an implementation or the sanitizer has failed. Without a CUDA device it says so and changes nothing.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import gpu
import torch
from gpu import Problem
from torch import Tensor

from fused_convlstm.backends import registry

TEST_SECONDS = 90  # for one test
SANITIZER_SECONDS = 90.0  # for one tool and backend
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
    tests: dict[str, str]  # those that did not pass, and why
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
        """What of the plan is not measured and has not failed."""
        known = {", ".join([" ".join(r.key[:-1]), r.implementation]) for r in self.results} | self.failures.keys()
        left = [(p, [n for n in gpu.implementations(p.training) if f"{p}, {n}" not in known]) for p in gpu.plan()]
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
        text.append("\n".join(f"- `{test}`: {why.splitlines()[-1][:200]}" for test, why in self.tests.items()))
        text += [tables(self.results), backend_table(self.results)]
        if self.failures:
            text.append("Failed:\n\n" + "\n".join(f"- {name}: {why}" for name, why in self.failures.items()))
        missing = [f"{p}, {name}" for p, names in self.to_do() for name in names]
        if missing:
            text.append("Not measured, for want of time:\n\n" + "\n".join(f"- {name}" for name in missing))
        return "\n\n".join(part for part in text if part)


def first_output(given: object) -> Tensor:
    """The output, or the gradient of the input."""
    return (given if isinstance(given, Tensor) else next(iter(given))).float()


@lru_cache(maxsize=1)
def expected(problem: Problem) -> Tensor:
    """What plain PyTorch gives."""
    return first_output(gpu.prepare(problem, "eager")())


def measure(problem: Problem, name: str, matmul_flops: float, copy_bandwidth: float) -> Result:
    """Runs in a child process."""
    right = expected(problem)
    function = gpu.prepare(problem, name)
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    given = function()
    torch.cuda.synchronize()
    peak = None if "CUDA graph" in name else (torch.cuda.max_memory_allocated() - before) / 2**20
    difference = float((first_output(given) - right).norm() / right.norm())
    if not difference <= gpu.AGREEMENT[problem.precision]:
        raise RuntimeError(f"differs from plain PyTorch by {difference:.2g} of its norm")
    del given
    median, low, high = gpu.time_ms(function)
    rate = problem.flops / median * 1e3 / matmul_flops
    moved = problem.least_bytes / median * 1e3 / copy_bandwidth
    return Result(
        problem.cell, problem.task, problem.precision, problem.shape.name, name, median, low, high, peak, rate, moved
    )


def outcomes(log: Path) -> dict[str, tuple[str, str]]:
    """By test, how its last run ended ("started": it did not) and what was said, first, from what tests/conftest.py
    writes."""
    found: dict[str, tuple[str, str]] = {}
    for line in log.read_text().splitlines()[1:] if log.exists() else ():
        with contextlib.suppress(ValueError):  # a line cut off
            facts = json.loads(line)
            test, outcome = facts["test"], facts["outcome"]
            if outcome == "started" or found.get(test, ("", ""))[0] != "failed":
                found[test] = outcome, facts["said"]
    return found


def run_tests(seconds: float, log: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The GPU suite, less what an earlier run of the same code has passed; what came of it, and of each test that did
    not pass why. Of the other files, not even the imports have to work. ``log`` gets pytest's output; each test's
    outcome stands beside it in a .jsonl file."""
    lines = log.with_suffix(".jsonl")
    if not lines.exists() or lines.read_text().partition("\n")[0] != gpu.code():
        lines.write_text(gpu.code() + "\n")
    files = [str(path) for path in sorted((gpu.ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", *files, "-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
        command += ["-o", f"faulthandler_timeout={0.9 * TEST_SECONDS}"]  # prints where it hangs
    # --deselect goes by how a name begins: one that ends in its parameters begins no other.
    passed = [test for test, (outcome, _) in outcomes(lines).items() if outcome == "passed" and test.endswith("]")]
    command += [f"--deselect={test}" for test in passed]
    code, printed = gpu.run_program(command, seconds, log, FUSED_CONVLSTM_TEST_LOG=str(lines))
    print(printed[-6000:], flush=True)
    found = outcomes(lines)
    wrong = {
        test: said[-600:].strip() or "began and did not end"
        for test, (outcome, said) in found.items()
        if outcome in ("started", "failed")
    }
    count = [f"{n} {what}" for what, n in sorted(Counter(outcome for outcome, _ in found.values()).items())]
    end = f"not done within {seconds:.0f} s" if code is None else f"exit code {code}"
    # 5: there was nothing left to run.
    good = code in (0, 5) and not wrong and any(outcome == "passed" for outcome, _ in found.values())
    return {"passed": "yes" if good else "no", "summary": ", ".join([*count, *([] if good else [end])])}, wrong


def run_sanitizer(tool: str, backend: str, seconds: float) -> str:
    """What a tool of compute-sanitizer says about small calls of both cells."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: no compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, backend]
    code, said = gpu.run_program(command, seconds)
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", said)
    if code == 0 and found and all(map(clean, found)):
        return found[-1]
    print(said[-3000:], flush=True)
    dirty = [line for line in found if not clean(line)]
    how = f"not done within {seconds:.0f} s" if code is None else f"exit code {code}"
    return dirty[0] if dirty else f"{how}: {said[-300:]}"


def clean(said: str) -> bool:
    """Whether a tool's last word was that it found nothing."""
    return re.match(r"(ERROR|RACECHECK) SUMMARY: 0 ", said) is not None


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
    """The report of an earlier run of the same code on the same device, or a new one with what it knew of the peers."""
    report = Report(gpu.machine(), {"passed": "not run", "summary": "not run"}, {}, {}, {}, 0.0, 0.0, {}, [])
    if not path.exists():
        return report
    earlier = Report.load(path)
    ours, peers = (gpu.same_run(earlier.machine, whose) for whose in ("code", "peers"))
    if ours:
        report = replace(earlier, machine=report.machine)
    peers_failures = tuple(f", {name}" for name in gpu.PEERS)
    report.results = [r for r in earlier.results if (peers if r.is_peer else ours)]
    report.failures = {
        what: why for what, why in earlier.failures.items() if (peers if what.endswith(peers_failures) else ours)
    }
    print(f"going on with {path.name}: {len(report.results)} measured")
    return report


def benchmark(report: Report, path: Path, deadline: float) -> None:
    """What is not measured yet, saved as it comes."""
    for name in gpu.BACKENDS:
        reason = "not registered" if name not in registry.names() else registry.get(name).unavailable()
        report.failures.pop(name, None)
        report.failures |= {} if reason is None else {name: reason}
    left = report.to_do()
    jobs = [(problem, name) for problem, names in left for name in gpu.compiled(names)]
    gpu.compile_ahead(jobs, 0.4 * (deadline - time.monotonic()))
    with gpu.Child() as child:
        report.matmul_flops, report.copy_bandwidth, report.launch_cost = child.call(gpu.WAIT, gpu.rates)
        for problem, names in left:
            for name in names:
                if time.monotonic() > deadline - 15:
                    return
                what = f"{problem}, {name}"
                rates = report.matmul_flops[problem.precision], report.copy_bandwidth
                # A peer does not hang, but may have to be compiled.
                seconds, kind = (2 * gpu.WAIT, "") if name in gpu.PEERS else (gpu.WAIT, name.partition(",")[0])
                try:
                    report.results.append(child.call(seconds, measure, problem, name, *rates, kind=kind))
                    print(f"{what}: {report.results[-1].median_ms:.3f} ms", flush=True)
                except gpu.ChildError as error:  # a finding, reported with the others
                    report.failures[what] = str(error)
                    print(f"{what}: {error}", flush=True)
                report.save(path)


def sanitize(report: Report, path: Path, deadline: float) -> None:
    """The sanitizer, as far as it has not come to an end yet."""
    for tool in SANITIZER_TOOLS:
        for backend in gpu.usable_backends():
            what, seconds = f"{tool}, {backend}", min(SANITIZER_SECONDS, deadline - time.monotonic())
            if "SUMMARY" in report.sanitizer.setdefault(what, "not run: no time") or seconds < 30:
                continue
            report.sanitizer[what] = run_sanitizer(tool, backend, seconds)
            report.save(path)
    report.save(path)


def main() -> int:
    parser = gpu.parser(__doc__)
    parser.add_argument(
        "--skip-tests", action="store_true", help="measure only; the report says that nothing is proven"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-report: no CUDA device, so nothing was tested or measured")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    arguments.results.mkdir(parents=True, exist_ok=True)
    path = arguments.results / f"gpu-{gpu.slug()}.json"
    report = begin(path)
    if not arguments.skip_tests and report.suite["passed"] != "yes":
        report.suite, report.tests = run_tests(0.55 * 60 * arguments.minutes, path.with_suffix(".log"))
        report.save(path)
    print(f"GPU suite: {report.suite['summary']}", *report.tests, sep="\n", flush=True)

    benchmark(report, path, deadline)
    report.save(path)
    if not arguments.skip_tests:
        sanitize(report, path, deadline)
    if importlib.util.find_spec("matplotlib") is not None:
        chart(report.results, path.with_suffix(".png"))
    else:
        print("no chart: matplotlib is not installed")
    print(report.text())
    found = [what for what, said in report.sanitizer.items() if not clean(said) and not said.startswith("not run")]
    return 0 if report.suite["passed"] == "yes" and not report.failures and not found else 1


if __name__ == "__main__":
    sys.exit(main())
