"""What the programs that measure on a GPU share: what is compared, how it is timed, and the device's own rates."""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
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
# How far two right implementations of a precision may differ over a sequence, as a share of the output's norm.
AGREEMENT = {"bf16": 0.02, "fp16": 0.003, "tf32": 0.003}
# In the order in which they are measured.
NAMES = ("lip24", "gesture", "lip12", "lip6", "lip3", "skip", "nowcast", "moving-digits", "k5", "stream")
POOLED_GATE_NAMES = ("gesture", "lip24", "lip12", "lip6")


@dataclass(frozen=True)
class Problem:
    """What several implementations are compared on."""

    cell: str
    shape: Shape
    precision: str
    training: bool

    def __str__(self) -> str:
        return f"{self.cell} {self.task} {self.precision} {self.shape.name}"

    @property
    def task(self) -> str:
        return "training" if self.training else "inference"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def flops(self) -> float:
        """Of the direct convolutions: forward, and in training the gradients of data and weights."""
        forward = self.shape.flops if self.cell == CELLS[0] else self.shape.pooled_gate_flops
        return 3 * forward if self.training else forward

    @property
    def least_bytes(self) -> float:
        """Bytes that have to move: frames in and out once; in training their gradients, gates and cells too."""
        shape, size = self.shape, self.dtype.itemsize
        height, width = shape.state_size
        states = shape.steps * shape.batch * height * width * shape.hidden_channels
        frames = shape.steps * shape.batch * shape.height * shape.width * shape.in_channels
        once = (frames + states) * size
        return once if not self.training else 2 * once + 2 * states * (4 + 1) * size


def plan() -> list[Problem]:
    """What is measured, most important first."""
    shapes = {shape.name: shape for shape in GPU_SHAPES}
    problems = []
    for precision, names in (("bf16", NAMES), ("fp16", NAMES[:3]), ("tf32", NAMES[:3])):
        problems += [Problem(CELLS[0], shapes[n], precision, training) for n in names for training in (True, False)]
        if precision == "bf16":
            problems += [
                Problem(CELLS[1], shapes[n], precision, training)
                for n in POOLED_GATE_NAMES
                for training in (True, False)
            ]
    return problems


def implementations(training: bool) -> list[str]:
    """The peers, and every way to call those of our backends that can run here."""
    ours = []
    for backend in usable_backends():
        ours += [backend, f"{backend}, channels last", f"{backend}, channels last, CUDA graph"]
        ours += [f"{backend}, channels last, recompute"] if training else []
    return [*PEERS, *ours]


def usable_backends() -> list[str]:
    return [name for name in BACKENDS if name in registry.names() and registry.get(name).unavailable() is None]


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


def prepare(problem: Problem, name: str) -> Callable[[], object]:
    """What is timed for an implementation."""
    cell, shape, dtype, training = problem.cell, problem.shape, problem.dtype, problem.training
    gc.collect()
    torch.cuda.empty_cache()
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


def launch_cost() -> float:
    """Seconds from one small kernel to the next, launched from C++ (PyTorch's own smallest operation)."""
    a = torch.zeros(1, device="cuda")

    def many() -> None:
        for _ in range(1000):
            a.add_(1)

    return time_ms(many)[0] * 1e-6


def allow_everything() -> None:
    """The peers at their best: tf32 where they are float32, cuDNN's own search."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def machine() -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
    return {"device": torch.cuda.get_device_name(), **versions, "code": code(), "date": date.today().isoformat()}


def code() -> str:
    """What was measured: a hash of the package's sources."""
    found = hashlib.sha256()
    sources = [path for folder in ("csrc", "fused_convlstm") for path in (ROOT / folder).rglob("*")]
    for path in sorted(path for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def same_run(earlier: dict[str, str]) -> bool:
    """Whether a report whose machine() was this may be continued: the same device, versions and code."""
    now = machine()
    return all(earlier.get(key) == now[key] for key in now if key != "date")


def slug() -> str:
    """The device as a part of file names."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _compile(problem: Problem, names: Sequence[str]) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    for name in names:
        prepare(problem, name)()
    torch.cuda.synchronize()


def compiled(names: Sequence[str]) -> list[str]:
    """Those of the implementations for which there is something to compile, each once."""
    return [name for name in names if name not in PEERS[:2] and "CUDA graph" not in name]


def compile_ahead(jobs: Sequence[tuple[Problem, list[str]]], seconds: float) -> None:
    """Fills the caches of Triton and torch.compile by a call of each implementation, several processes at a time.

    What fails here fails again, and is reported, where it is measured."""
    processes = min(8, (os.cpu_count() or 1) // 2)
    if processes < 2:
        return
    start = time.monotonic()
    with get_context("spawn").Pool(processes) as pool:  # ends what is late
        results = [pool.apply_async(_compile, job) for job in jobs]
        for result in results:
            result.wait(max(0.0, start + seconds - time.monotonic()))
        done = sum(result.ready() for result in results)
    print(f"compiled ahead {done} of {len(jobs)} problems in {time.monotonic() - start:.0f} s", flush=True)
