"""``python benchmarks/gpu_report.py`` (``make gpu-report``): the GPU suite, and the benchmark against what people use.

One command of at most ``--minutes``: the tests marked ``gpu``, compute-sanitizer if there is one, then the benchmark,
the most important shapes first; what no time was left for is listed. Writes JSON, Markdown and a chart into
``benchmarks/results/``. Without a CUDA device it says so and changes nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from shapes import GPU_SHAPES, Shape
from test_cpu import forward, make_fused, make_input, make_peer
from torch import Tensor, nn

from fused_convlstm.backends import registry, use_backend

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
BACKENDS = ("triton", "cuda")
PEERS = ("eager", "channels_last", "compile", "compile, CUDA graph")
CELLS = ("conv_lstm2d", "pooled_gate_conv_lstm2d")
# In float32, tf32 is allowed to both sides.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
# In the order in which they are measured.
NAMES = ("lip24", "gesture", "lip12", "lip6", "lip3", "skip", "nowcast", "moving-digits", "k5", "stream")
POOLED_GATE_NAMES = ("gesture", "lip24", "lip12", "lip6")

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
    peak_memory_mib: float
    matmul_share: float  # of the measured matmul rate
    bandwidth_share: float  # of the measured copy bandwidth

    @property
    def is_peer(self) -> bool:
        return self.implementation in PEERS


def time_ms(function: Callable[[], object], seconds: float = 0.2) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the time of a call, by CUDA events."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    count = max(5, min(300, int(seconds / max(1e-6, time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([begin.elapsed_time(end) for begin, end in events])
    median, low, high = torch.quantile(times, torch.tensor([0.5, 0.2, 0.8])).tolist()
    return median, low, high


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    return 2.0 * size**3 / time_ms(lambda: a @ b)[0] * 1e3


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2.0 * a.numel() / time_ms(lambda: b.copy_(a))[0] * 1e3


def least_bytes(shape: Shape, training: bool, size: int) -> float:
    """Bytes that have to move: frames in and out once, and in training their gradients, gates and cells too."""
    height, width = shape.state_size
    states = shape.steps * shape.batch * height * width * shape.hidden_channels
    frames = shape.steps * shape.batch * shape.height * shape.width * shape.in_channels
    once = (frames + states) * size
    return once if not training else 2 * once + 2 * states * (4 * size + 4)


def runner(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], training: bool) -> Callable[[], object]:
    """A forward pass, or a training step without the optimiser."""
    input, h, c = inputs
    output_gradient: list[Tensor] = []

    def inference() -> object:
        with torch.no_grad():
            return forward(module, input, h, c)

    def step() -> object:
        output = forward(module, input, h, c)
        if not output_gradient:
            output_gradient.append(torch.ones_like(output))
        return torch.autograd.grad(output, [input, *module.parameters()], output_gradient[0])

    return step if training else inference


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """``function`` captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def variants(training: bool) -> list[str]:
    fused = []
    for backend in BACKENDS:
        fused += [backend, f"{backend}, channels last", f"{backend}, channels last, CUDA graph"]
        fused += [f"{backend}, channels last, recompute"] if training else []
    return [*PEERS, *fused]


def prepare(cell: str, shape: Shape, dtype: torch.dtype, training: bool, name: str) -> Callable[[], object]:
    """What is timed for an implementation."""
    torch._dynamo.reset()
    fused = make_fused(cell, shape, dtype, "recompute" in name)
    module = fused if name not in PEERS else make_peer(cell, shape, fused, name.partition(",")[0])
    module.cuda()
    input, h, c = (x.detach().cuda() for x in make_input(shape, dtype, False))
    if "channels_last" in name or "channels last" in name:
        input = input.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
        h, c = (x.contiguous(memory_format=torch.channels_last) for x in (h, c))
        if name == "channels_last":
            module.to(memory_format=torch.channels_last)
    if name not in PEERS:
        c = c.float()
    function = runner(module, (input.requires_grad_(training), h, c), training)
    if name not in PEERS:
        plain, backend = function, name.partition(",")[0]

        def function() -> object:
            with use_backend(backend):
                return plain()

    return graphed(function) if "CUDA graph" in name else function


def measure(
    cell: str, shape: Shape, precision: str, training: bool, name: str, rate: float, bandwidth: float
) -> Result:
    dtype = DTYPES[precision]
    gc.collect()
    torch.cuda.empty_cache()
    function = prepare(cell, shape, dtype, training, name)
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    # A graph owns its memory for as long as it lives: its peak is not one of a call.
    peak = float("nan") if "CUDA graph" in name else (torch.cuda.max_memory_allocated() - before) / 2**20
    median, low, high = time_ms(function)
    flops = shape.flops if cell == "conv_lstm2d" else shape.pooled_gate_flops
    flops *= 3 if training else 1
    moved = least_bytes(shape, training, dtype.itemsize)
    task = "training" if training else "inference"
    return Result(
        cell, task, precision, shape.name, name, median, low, high, peak, flops / median * 1e3 / rate,
        moved / median * 1e3 / bandwidth,
    )  # fmt: skip


def plan() -> list[tuple[str, Shape, str, bool]]:
    """What is measured, most important first: cell, shape, precision, whether training."""
    shapes = {shape.name: shape for shape in GPU_SHAPES}
    order = []
    for precision, names in (("bf16", NAMES), ("fp16", NAMES[:3]), ("tf32", NAMES[:3])):
        order += [("conv_lstm2d", shapes[n], precision, training) for n in names for training in (True, False)]
        if precision == "bf16":
            pooled = [shapes[n] for n in POOLED_GATE_NAMES]
            order += [(CELLS[1], shape, precision, training) for shape in pooled for training in (True, False)]
    return order


def run_tests(seconds: float) -> tuple[bool, str]:
    """The GPU suite; whether it passed, and its last line."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False, f"not done within {seconds:.0f} s"
    print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    return done.returncode == 0 and "passed" in lines[-1], lines[-1]


def run_sanitizer(tool: str, backend: str, seconds: float) -> str:
    """What a tool of compute-sanitizer says about small calls of both cells."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "not run: no compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED, backend]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:.0f} s"
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", done.stdout + done.stderr)
    return found[-1] if found else f"exit code {done.returncode}: {(done.stdout + done.stderr)[-300:]}"


def best(results: list[Result]) -> Result:
    return min(results, key=lambda r: r.median_ms)


def groups(results: list[Result]) -> dict[tuple[str, str, str], dict[str, list[Result]]]:
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


def tables(results: list[Result]) -> str:
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
                    if not r.is_peer and ("recompute" in r.implementation) == bool(word) and r.peak_memory_mib >= 0
                ]  # fmt: skip
                if task == "training" and peaks and eager:
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


def chart(results: list[Result], path: Path) -> None:
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


def machine() -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
    return {"device": torch.cuda.get_device_name(), **versions, "date": date.today().isoformat()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything together")
    parser.add_argument("--skip-tests", action="store_true", help="measure only, when the suite has just passed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-report: no CUDA device, so nothing was tested or measured")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    passed, summary = True, "skipped on request"
    sanitizer: dict[str, str] = {}
    if not arguments.skip_tests:
        passed, summary = run_tests(0.45 * 60 * arguments.minutes)
        sanitizer = {
            f"{tool}, {backend}": run_sanitizer(tool, backend, 0.04 * 60 * arguments.minutes)
            for tool in SANITIZER_TOOLS
            for backend in BACKENDS
        }
    print(f"GPU suite: {summary}", *(f"{name}: {text}" for name, text in sanitizer.items()), sep="\n")

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True  # the peers at their best
    rates = {precision: matmul_rate(dtype) for precision, dtype in DTYPES.items()}
    bandwidth = copy_bandwidth()
    results: list[Result] = []
    missing: list[str] = []
    usable = [b for b in BACKENDS if b in registry.names() and registry.get(b).unavailable() is None]
    for cell, shape, precision, training in plan():
        for name in variants(training):
            if name not in PEERS and name.partition(",")[0] not in usable:
                continue
            what = f"{cell} {'training' if training else 'inference'} {precision} {shape.name} {name}"
            if time.monotonic() > deadline - 15:
                missing.append(f"{what}: no time left")
                continue
            try:
                results.append(measure(cell, shape, precision, training, name, rates[precision], bandwidth))
            except Exception as error:  # one implementation's failure is a finding, reported with the others
                missing.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
                print(missing[-1])
                continue
            print(f"{what}: {results[-1].median_ms:.3f} ms", flush=True)

    RESULTS.mkdir(exist_ok=True)
    about = machine()
    name = re.sub(r"[^a-z0-9]+", "-", f"gpu-{about['device'].lower()}-{about['date']}").strip("-")
    facts = {
        "machine": about,
        "suite": {"passed": passed, "summary": summary},
        "sanitizer": sanitizer,
        "matmul_tflops": {precision: rate / 1e12 for precision, rate in rates.items()},
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "not_measured": missing,
        "results": [asdict(r) for r in results],
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    text = [
        ", ".join(f"{key} {value}" for key, value in about.items()),
        f"Suite: {summary}. Matmul "
        + ", ".join(f"{precision} {rate / 1e12:.0f} TFLOP/s" for precision, rate in rates.items())
        + f"; copy {bandwidth / 1e9:.0f} GB/s.",
    ]
    text += [f"{name}: {said}" for name, said in sanitizer.items()]
    if not passed:
        text.append("**The suite failed: the times below prove nothing.**")
    text += [tables(results), "Not measured:\n\n" + "\n".join(f"- {line}" for line in missing) if missing else ""]
    (RESULTS / f"{name}.md").write_text("\n\n".join(part for part in text if part) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        chart(results, RESULTS / f"{name}.png")
    else:
        print("no chart: matplotlib is not installed")
    print("\n\n".join(text))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
