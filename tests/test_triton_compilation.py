"""Every Triton kernel compiled, without a GPU, for the GPUs that it is meant for; read from what came out: matrix
instructions, registers, spills, shared memory."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from triton_interpreter import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton_offline import MATRIX_INSTRUCTION, Recorded, compile_for, recorded_launches

from fused_convlstm.backends.call import SAVE_GATES, SAVE_NOTHING, ConvLSTMOptions
from fused_convlstm.backends.triton import conv_lstm2d, pooled_gate_conv_lstm2d, tuning
from fused_convlstm.backends.triton.tile import Tile

ARCHITECTURES = (80, 90, 100, 120)
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # of a program, in bytes
# Bytes of registers a thread may put into local memory: a few values that live across the main loop and are read once.
# Where a tile holds more than this, its accumulators would be among them.
SPILL_BYTES = 128
CHANNELS = 128
OPTIONS = ConvLSTMOptions(padding=(1, 1, 1, 1))


def frames(dtype: torch.dtype) -> torch.Tensor:  # (3, 2, C, 8, 8), channels last
    return torch.zeros(3, 2, 8, 8, CHANNELS, dtype=dtype).permute(0, 1, 4, 2, 3)


def conv_lstm2d_launches(kind: str, tile: Tile, dtype: torch.dtype, precision: str) -> list[Recorded]:
    """The launches of a step in the middle of a sequence: of inference, of training, or of backward."""
    x, c = frames(dtype), CHANNELS
    weight, bias = torch.zeros(4 * c, c, 3, 3, dtype=dtype), torch.zeros(4 * c, dtype=dtype)
    with recorded_launches(tile, precision) as record:
        if kind != tuning.BACKWARD:
            for save in (SAVE_NOTHING, SAVE_GATES):
                conv_lstm2d.forward(x, None, None, weight, weight, bias, None, None, OPTIONS, save)
            return [r for r in record if r.arguments["HAS_H"]]
        gates, cells = (torch.zeros(3, 2, 8, 8, width, dtype=dtype) for width in (4 * c, c))
        conv_lstm2d.backward(
            x, None, None, x, None, None, weight, weight, bias, None, None, x, gates, cells, OPTIONS, [True] * 7
        )
    return [r for r in record if r.arguments["CONV"] and r.arguments["HAS_C"]]


def pooled_launches(tile: Tile, dtype: torch.dtype, precision: str) -> list[Recorded]:
    """Every launch of training, in the middle of a sequence."""
    x, c = frames(dtype), CHANNELS
    gate_weight, depthwise, pointwise = (
        torch.zeros(shape, dtype=dtype) for shape in ((3 * c, c), (c, 1, 3, 3), (c, c))
    )
    weights = (gate_weight, gate_weight, gate_weight[:, 0], depthwise, depthwise, pointwise, pointwise, pointwise[0])
    with recorded_launches(tile, precision) as record:
        saved = pooled_gate_conv_lstm2d.forward(x, None, None, *weights, None, OPTIONS, SAVE_GATES)[3:]
        pooled_gate_conv_lstm2d.backward(x, None, None, x, None, None, *weights, None, x, *saved, OPTIONS, [True] * 11)
    return [r for r in record if r.arguments.get("HAS_H", True) and r.arguments.get("HAS_C", True)]


PRECISIONS = ("16 bits", "tf32", "ieee-fp32")


def arithmetic(precision: str, half: torch.dtype) -> tuple[torch.dtype, str, str]:
    """The type of the tensors, the precision of the dots, and the name of the list of tiles."""
    if precision == "16 bits":
        return half, "ieee", "ieee"
    return torch.float32, precision.removesuffix("-fp32"), precision


CASES = [
    (arch, kind, precision, tile)
    for arch in ARCHITECTURES
    for kind in (tuning.FORWARD, tuning.BACKWARD)
    for precision in PRECISIONS
    for tile in tuning.tiles(kind, arch, arithmetic(precision, torch.bfloat16)[2])
]


def check_resources(recorded: Recorded, arch: int, matrix: bool) -> None:
    compiled = compile_for(recorded, arch)
    what = f"{recorded.kernel.__name__} {recorded.tile} sm_{arch}"
    assert compiled.registers <= 255, what
    assert compiled.spills <= SPILL_BYTES, f"{what}: {compiled.spills} bytes spilled"
    assert compiled.shared <= SHARED_MEMORY[arch], f"{what}: {compiled.shared} bytes of shared memory"
    if matrix:
        # Below 64 rows, Hopper and Blackwell use the instruction of the architectures before.
        expected = MATRIX_INSTRUCTION[arch] if recorded.tile.bm >= 64 else "mma.sync"
        assert expected in compiled.text, f"{what}: no {expected}"


@pytest.mark.parametrize(("arch", "kind", "precision", "tile"), CASES, ids=str)
def test_conv_lstm2d(arch: int, kind: str, precision: str, tile: Tile) -> None:
    dtype, dot, _ = arithmetic(precision, torch.bfloat16 if kind == tuning.FORWARD else torch.float16)
    for recorded in conv_lstm2d_launches(kind, tile, dtype, dot):
        check_resources(recorded, arch, matrix=precision != "ieee-fp32")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_pooled_gate(arch: int, precision: str) -> None:
    dtype, dot, tiles = arithmetic(precision, torch.bfloat16)
    for tile in tuning.tiles(tuning.POOLED, arch, tiles):
        for recorded in pooled_launches(tile, dtype, dot):
            matrix = precision != "ieee-fp32" and "h_pointwise_ptr" in recorded.arguments
            check_resources(recorded, arch, matrix)


def test_amd() -> None:
    """As information: the step compiles to matrix instructions for gfx942 too."""
    for recorded in conv_lstm2d_launches(tuning.FORWARD, Tile(64, 32, 32, 4, 2), torch.bfloat16, "ieee"):
        assert "mfma" in compile_for(recorded, "gfx942").text
