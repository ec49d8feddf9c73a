"""The CUDA kernels on the CPU: the same sources, compiled by g++ against csrc/cuda/host_shim, as a backend."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pybind11
import torch
import torch.nn.functional as F
from cases import Case
from kernel_checks import check_against_reference
from torch import Tensor

from fused_convlstm.backends import registry
from fused_convlstm.backends.cuda import CudaBackend
from fused_convlstm.backends.cuda.parameters import BFLOAT16, FLOAT32, HALF, TF32, Kernels
from fused_convlstm.backends.tf32 import round_to_tf32

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
MATHS = ("MathHalf", "MathBfloat16", "MathTf32", "MathFloat")
SANITIZERS = ["-fsanitize=address,alignment", "-fno-sanitize-recover=alignment", "-fno-omit-frame-pointer", "-g1"]


def build(sanitized: bool = False) -> Path:
    """Compiles the extension ``_cuda_host`` unless it is there already; returns its path."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES.rglob("*")) if path.is_file()))
    variant = "asan" if sanitized else "plain"
    folder = ROOT / "build" / f"cuda_host-{variant}-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"_cuda_host-{digest.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist share it
        if target.exists():
            return target
        compiler = os.environ.get("CXX", "g++").split()
        flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
        # The sanitizer makes gcc 12 warn of code in pybind11 that is never reached.
        flags += [*SANITIZERS, "-O1"] if sanitized else ["-O2", "-Werror"]
        includes = [f"-I{sysconfig.get_path('include')}", "-isystem", pybind11.get_include(), f"-I{SOURCES}"]
        jobs = [
            (source, f"{source.stem}-{math}.o", [f"-DFCL_MATH={math}", "-x", "c++"])
            for source in sorted(SOURCES.glob("*_kernels.cu"))
            for math in MATHS
        ]
        defines = ["-DFUSED_CONVLSTM_HOST_SHIM", "-DFCL_MODULE_NAME=_cuda_host"]
        defines += ['-DFCL_ARCHITECTURES="host"', '-DFCL_SOURCES="host"']
        sources = [SOURCES / "module.cpp", *sorted((SOURCES / "host_shim").glob("*.cpp"))]
        jobs += [(source, f"{source.stem}.o", defines) for source in sources]

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            source, name, extra = job
            output = str(folder / name)
            run([*compiler, *flags, *includes, *extra, "-c", str(source), "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        run([*compiler, *(SANITIZERS if sanitized else []), "-shared", *objects, "-o", str(target)])
    return target


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


@cache
def load() -> Any:
    """The module ``_cuda_host``; from the path in FUSED_CONVLSTM_CUDA_HOST if that is set."""
    path = os.environ.get("FUSED_CONVLSTM_CUDA_HOST") or str(build())
    spec = importlib.util.spec_from_file_location("_cuda_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CudaHostBackend(CudaBackend):
    """The CUDA backend with the host build in place of the extension; float32 is exact or tf32 as a test says."""

    name = "cuda_host"
    device_type = "cpu"
    tf32 = False
    tile = 0

    def unavailable(self) -> str | None:
        return None

    def _refuse_device(self, device: torch.device) -> str | None:
        return None

    def _shared_bytes(self, device: torch.device) -> int:
        return 227 * 1024

    @property
    def _module(self) -> Any:
        return load()

    def _number(self, dtype: torch.dtype) -> int:
        numbers = {torch.float16: HALF, torch.bfloat16: BFLOAT16, torch.float32: TF32 if self.tf32 else FLOAT32}
        return numbers[dtype]

    def _on_device(self, input: Tensor) -> Any:
        # What goes through PyTorch's convolutions is to be as exact as on a GPU. On the CPU, oneDNN sums those of
        # channels-last float32 frames in one long chain, and NNPACK transforms them.
        stack = ExitStack()
        if input.dtype == torch.float32:
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None))
            stack.enter_context(torch.backends.nnpack.flags(enabled=False))
        return stack

    def _kernels(self, input: Tensor) -> Kernels:
        return Kernels(load(), self._number(input.dtype), 0, 0, self.tile)


@contextmanager
def host_backend(tf32: bool = False, tile: int = 0) -> Iterator[str]:
    """Registers the backend within the block and gives its name."""
    backend = CudaHostBackend()
    backend.tf32, backend.tile = tf32, tile
    registry.register(backend)
    try:
        yield backend.name
    finally:
        registry._backends.pop(backend.name)


class _Tf32Convolution(torch.autograd.Function):
    """F.conv2d with every operand of a product rounded to tf32, as PyTorch computes it on a GPU."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, stride, padding, dilation, groups = args
        ctx.save_for_backward(x, weight)
        ctx.options = (stride, padding, dilation, groups, bias is not None)
        return _conv2d(round_to_tf32(x), round_to_tf32(weight), bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups, has_bias = ctx.options
        stride, padding, dilation = ([v, v] if isinstance(v, int) else list(v) for v in (stride, padding, dilation))
        results = torch.ops.aten.convolution_backward(
            round_to_tf32(grads[0]), round_to_tf32(x), round_to_tf32(weight), [weight.size(0)] if has_bias else None,
            stride, padding, dilation, False, [0, 0], groups, [True, True, has_bias],
        )  # fmt: skip
        return (*results, None, None, None, None)


_conv2d: Callable[..., Tensor] = F.conv2d


@contextmanager
def tf32_convolutions() -> Iterator[None]:
    """Within the block, F.conv2d of float32 tensors rounds as a GPU does with tf32 allowed."""

    def conv2d(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if x.dtype != torch.float32:
            return _conv2d(x, weight, bias, stride, padding, dilation, groups)
        return _Tf32Convolution.apply(x, weight, bias, stride, padding, dilation, groups)

    F.conv2d = conv2d
    try:
        yield
    finally:
        F.conv2d = _conv2d


FORMATS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SCHEDULES = [("forward", 0, False), ("reverse", 0, True), ("random", 1, False), ("random", 2, True)]


def vary_schedule(request: Any) -> Iterator[None]:
    """A fixture: every test under another schedule, by its name, because each relies on none."""
    load().set_schedule(*SCHEDULES[sum(map(ord, request.node.name)) % len(SCHEDULES)])
    yield
    load().set_schedule()
    load().set_device()


def check_format(case: Case, backend: str, name: str, training: bool = True) -> None:
    """By the error-bar rule; that of tf32 is float16's, which has a mantissa of the same size."""
    precision = torch.float16 if name == "tf32" else None
    check_against_reference(case, backend, FORMATS[name], training=training, precision=precision)


@contextmanager
def number_format(name: str, tile: int = 0) -> Iterator[str]:
    """The backend in this format, beside a reference that rounds as the format does."""
    with tf32_convolutions() if name == "tf32" else nullcontext(), host_backend(name == "tf32", tile) as backend:
        yield backend
