"""What the programs that measure on a GPU share: what is compared, how it is timed, and the device's own rates."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import hashlib
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

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
START_SECONDS = 120.0  # for a process to begin
WAIT = 60.0  # seconds for one implementation
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


def rates() -> tuple[dict[str, float], float, float]:
    """The three of them; of matrix products by precision."""
    return {precision: matmul_rate(dtype) for precision, dtype in DTYPES.items()}, copy_bandwidth(), launch_cost()


def allow_everything() -> None:
    """The peers at their best: tf32 where they are float32, cuDNN's own search."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True


def machine() -> dict[str, str]:
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    if importlib.util.find_spec("triton") is not None:
        import triton

        versions["triton"] = triton.__version__
    facts = {"device": torch.cuda.get_device_name(), **versions, "code": code(), "peers": peers_code()}
    return {**facts, "date": date.today().isoformat()}


def hash_of(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def code() -> str:
    """What was measured: a hash of the package's sources."""
    sources = [path for folder in ("csrc", "fused_convlstm") for path in (ROOT / folder).rglob("*")]
    return hash_of(path for path in sources if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"))


def peers_code() -> str:
    """The same of what the peers depend on."""
    benchmarks = ROOT / "benchmarks"
    own = [benchmarks / name for name in ("peers.py", "shapes.py", "test_cpu.py")]
    return hash_of([*own, ROOT / "fused_convlstm" / "reference.py"])


def same_run(earlier: dict[str, str], whose: str = "code") -> bool:
    """Whether a report whose machine() was this may be continued: the same device, versions and code (or peers')."""
    now = machine()
    return all(earlier.get(key) == now[key] for key in now if key == whose or key not in ("date", "code", "peers"))


def going_on(path: Path, new: dict[str, Any]) -> dict[str, Any]:
    """What ``path`` holds from an earlier run of the same code, or ``new`` with machine()."""
    if path.exists() and same_run((earlier := json.loads(path.read_text()))["machine"]):
        return {**new, **earlier}
    return {"machine": machine(), **new}


def slug() -> str:
    """The device as a part of file names."""
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every program understands."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=8.0, help="after which nothing new begins")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder to go on from and to write into")
    return made


def run_program(
    command: Sequence[str], seconds: float, log: Path | None = None, **environment: str
) -> tuple[int | None, str]:
    """Exit code and output, which ``log`` gets as it comes; no code if it took longer. What it started ends with it."""
    with open(log, "w+") if log else tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=out, env={**os.environ, **environment}, preexec_fn=os.setpgrp
        )
        try:
            ended: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = None
        finally:
            end_group(process.pid)
            process.poll()
        out.seek(0)
        return ended, out.read()


def end_group(leader: int) -> None:
    """Kills a group of processes and waits until they are gone, 20 s at most: the GPU is to be free."""

    def running(stat: Path) -> bool:
        with contextlib.suppress(OSError):
            state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
            return group == str(leader) and state not in "ZX"
        return False

    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
        until = time.monotonic() + 20
        while any(map(running, Path("/proc").glob("[0-9]*/stat"))) and time.monotonic() < until:
            time.sleep(0.1)


class ChildError(RuntimeError):
    """What went wrong in a child process."""


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"


class Child:
    """A process that calls functions for this one: what hangs, dies or leaves CUDA unusable takes nothing else along.

    The functions and what they take and return are pickled; before they return, they wait for the GPU. After a failure
    of that kind the next call gets a new process."""

    def __init__(self) -> None:
        self.process: Any = None
        self.hung: Counter[str] = Counter()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join(10)
            end_group(self.process.pid)  # what it started
            self.connection.close()
            self.process = None

    def call(self, seconds: float, function: Callable[..., Any], *arguments: object, kind: str = "") -> Any:
        """What ``function(*arguments)`` returns; ChildError if it raises, the process dies or it takes longer. Of a
        ``kind`` that has a name, two may take longer; then it is not tried again."""
        if kind and self.hung[kind] >= 2:
            raise ChildError(f"not tried: {kind} has hung twice")
        try:
            if self.process is None:
                context = get_context("spawn")
                self.connection, there = context.Pipe()
                self.process = context.Process(target=_serve, args=(there, allow_everything))
                self.process.start()
                there.close()
                if not self.connection.poll(START_SECONDS):
                    raise ChildError("no process began")
                self.connection.recv()
            self.connection.send((seconds, function, arguments))
            if not self.connection.poll(seconds):
                self.hung[kind] += 1
                raise ChildError(f"not done within {seconds:.0f} s")
            value, error, usable = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode
            self.end()
            raise ChildError(f"the process died, exit code {code}") from None
        except BaseException:
            self.end()
            raise
        if not usable:
            self.end()
        if error is not None:
            raise ChildError(error + ("" if usable else " (CUDA unusable afterwards)"))
        return value


def _serve(connection: Any, setup: Callable[[], None]) -> None:
    os.setpgrp()
    setup()
    connection.send("ready")
    while True:
        try:
            seconds, function, arguments = connection.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(0.9 * seconds)  # where it hangs, before it is killed
        value, error, usable = None, None, True
        try:
            value = function(*arguments)
        except Exception as raised:
            error = said(raised)
        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError as raised:
            usable = False
            print(f"CUDA is unusable: {raised}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        connection.send((value, error, usable))


def _compile(problem: Problem, name: str) -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    prepare(problem, name)()
    torch.cuda.synchronize()


def compiled(names: Sequence[str]) -> list[str]:
    """Those of the implementations for which there is something to compile, each once."""
    return [name for name in names if name not in PEERS[:2] and "CUDA graph" not in name]


def compile_ahead(jobs: Sequence[tuple[Problem, str]], seconds: float) -> None:
    """Fills the caches of Triton and torch.compile by a call of each implementation, several processes at a time.

    What fails here fails again, and is reported, where it is measured."""
    processes = min(8, (os.cpu_count() or 1) // 2)
    if processes < 2 or not jobs:
        return
    begin, left, done = time.monotonic(), list(jobs), []

    def work(_: int) -> None:
        with Child() as child:
            while left and (remaining := begin + seconds - time.monotonic()) > 5:
                job = left.pop(0)
                try:
                    child.call(min(120.0, remaining), _compile, *job)
                    done.append(job)
                except ChildError as error:
                    print(f"compiling ahead {job[0]}, {job[1]}: {error}", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, range(processes)))
    print(f"compiled ahead {len(done)} of {len(jobs)} in {time.monotonic() - begin:.0f} s", flush=True)
