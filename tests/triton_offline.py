"""Compiling Triton kernels for GPUs that are not there, and reading what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fused_convlstm.backends.triton import tuning
from fused_convlstm.backends.triton.tile import Tile

TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8",
}  # fmt: skip
# What a matrix instruction looks like in the PTX of an architecture.
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


def target(arch: int | str) -> GPUTarget:
    return GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


@dataclass
class Recorded:
    """One launcher that the backend made."""

    kernel: Any
    arguments: dict[str, Any]
    varying: tuple[str, ...]
    tile: Tile


@contextmanager
def recorded_launches(tile: Tile, precision: str = "ieee") -> Iterator[list[Recorded]]:
    """Within the block the backend takes CPU tensors and this tile, and its kernels are recorded rather than run."""
    record: list[Recorded] = []
    before = {}

    class Recorder:
        def __init__(self, kernel: Any, programs: int, arguments: dict[str, Any], varying: Any, tile: Tile) -> None:
            assert programs > 0
            record.append(Recorded(kernel, arguments, tuple(varying), tile))

        def bind(self, name: str, tensor: Tensor) -> None:
            pass

        def __call__(self, *values: int) -> None:
            assert len(values) == len(record[-1].varying) or values

    from fused_convlstm.backends.triton import conv_lstm2d, pooled_gate_conv_lstm2d

    modules = (conv_lstm2d, pooled_gate_conv_lstm2d)
    for module in modules:
        for name, value in (("StepLauncher", Recorder), ("convolution_precision", lambda dtype: precision)):
            before[module, name] = getattr(module, name)
            setattr(module, name, value)
    choose, tuning.choose = tuning.choose, lambda *args, **kwargs: tile
    try:
        yield record
    finally:
        tuning.choose = choose
        for (module, name), value in before.items():
            setattr(module, name, value)


@dataclass
class Compiled:
    """The facts about a compiled kernel that the tests look at."""

    text: str  # PTX or AMD assembly
    registers: int
    spills: int  # bytes of local memory
    shared: int
    ir: str


def compile_for(recorded: Recorded, arch: int | str) -> Compiled:
    """Compiles as Triton's dispatch would for these arguments: aligned pointers, integers that are 1 or multiples of
    16 specialised."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for position, parameter in enumerate(recorded.kernel.params):
        name = parameter.name
        value = recorded.arguments.get(name, 0)
        if (
            parameter.is_constexpr
            or value is None
            or (type(value) is int and value == 1 and name not in recorded.varying)
        ):
            signature[name] = "constexpr"
            constants[position,] = value
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[position,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if name not in recorded.varying and value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(recorded.kernel, signature, constants, attributes)
    options = {"num_warps": recorded.tile.num_warps, "num_stages": recorded.tile.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target(arch), options=options)
    if isinstance(arch, str):
        return Compiled(compiled.asm["amdgcn"], 0, 0, compiled.metadata.shared, compiled.asm["ttgir"])
    registers, spills = resources(compiled.asm["cubin"])
    return Compiled(compiled.asm["ptx"], registers, spills, compiled.metadata.shared, compiled.asm["ttgir"])


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of local memory, from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(found) == 1, text
    registers, stack, local = map(int, found[0])
    return registers, stack + local
