"""The GPU backends on a GPU: against the float64 reference, bitwise repeatability, memory, CUDA graphs, torch.compile.

Everything here is marked ``gpu`` and skipped, visibly, where there is no CUDA device. A backend that cannot run
although there is one is a failure."""

from __future__ import annotations

import fcntl
import gc
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case, case_id, make_tensors, ordinary, run
from kernel_checks import check_against_reference, check_kept_cells, check_repeatable
from torch import Tensor

from fused_convlstm import ConvLSTM2d, PooledGateConvLSTM2d
from fused_convlstm import functional as FC
from fused_convlstm.backends import BackendError, registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

BACKENDS = ("triton", "cuda")
CELLS = ("conv_lstm2d", "pooled_gate_conv_lstm2d")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Sizes at which the large tiles are used.
LARGE = [
    Case(steps=3, batch=4, in_channels=64, hidden_channels=64, size=(24, 24), layout="channels_last"),
    Case(steps=3, batch=4, in_channels=128, hidden_channels=128, size=(12, 12), lengths=True, reset=True),
    Case(steps=3, batch=8, in_channels=256, hidden_channels=256, size=(3, 3), recompute_gates=True),
    Case(steps=2, batch=2, in_channels=16, hidden_channels=300, size=(28, 28), peephole="channel"),
]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """float32 in full, in cuDNN too: plain PyTorch is the yardstick."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def device_alone() -> Iterator[None]:
    """For what takes tens of GiB: one such test at a time, whichever process runs it, and nothing kept behind it."""
    with open(Path(tempfile.gettempdir()) / "fused_convlstm_gpu.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


def check(
    case: Case, backend: str, dtype: torch.dtype, training: bool = True, precision: torch.dtype | None = None
) -> None:
    """Against the reference; where the backend refuses the call, it has to say why, and inference may still run."""
    try:
        check_against_reference(case, backend, dtype, "cuda", training, precision)
    except BackendError as refusal:
        assert backend != "triton" or (training and case.padding_mode in ("replicate", "reflect"))
        warnings.warn(f"{case_id(case)} {dtype}: {refusal}", stacklevel=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_available(backend: str) -> None:
    assert backend in registry.names()
    assert registry.get(backend).unavailable() is None


# Each case in float32 and, in turn, in one of the half precisions.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "half"),
    [(case, DTYPES[1 + k % 2]) for cell in CELLS for k, case in enumerate(ordinary(cell))],
    ids=lambda value: f"{value.cell}-{case_id(value)}" if isinstance(value, Case) else str(value),
)
def test_against_the_reference(case: Case, half: torch.dtype, backend: str) -> None:
    check(case, backend, torch.float32)
    check(case, backend, half)
    check(case, backend, half, training=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_large_sizes(case: Case, dtype: torch.dtype, cell: str, backend: str) -> None:
    case = replace(case, cell=cell, peephole=case.peephole if cell == "conv_lstm2d" else "none")
    check(case, backend, dtype)
    check(case, backend, dtype, training=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_tf32_where_torch_allows_it(cell: str, backend: str) -> None:
    torch.backends.cudnn.allow_tf32 = True
    # tf32 has the precision of float16; the matrix instructions cut off what is beyond it, where cuDNN may round.
    check(replace(LARGE[0], cell=cell), backend, torch.float32, precision=torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeatable(dtype: torch.dtype, cell: str, backend: str) -> None:
    for case in LARGE[:3]:
        check_repeatable(replace(case, cell=cell), backend, dtype, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_cells(dtype: torch.dtype, cell: str, backend: str) -> None:
    for case in (replace(LARGE[0], reset=True), replace(LARGE[2], reset=True)):
        check_kept_cells(replace(case, cell=cell), backend, dtype, "cuda")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("position", range(6))
def test_every_triton_tile(position: int, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_convlstm.backends.triton import tuning
    from fused_convlstm.backends.triton.launch import capability

    arch = capability(torch.device("cuda"))

    def choose(kind: str, device: torch.device, dtype: torch.dtype, precision: str, *rest: object) -> object:
        tiles = tuning.tiles(kind, arch, "ieee-fp32" if dtype == torch.float32 else precision)
        return tiles[min(position, len(tiles) - 1)]

    monkeypatch.setattr(tuning, "choose", choose)
    for dtype in DTYPES:
        check(replace(LARGE[0], cell=cell, in_channels=40, hidden_channels=136, size=(9, 10)), "triton", dtype)


def module_and_input(cell: str, backend: str) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = ConvLSTM2d if cell == "conv_lstm2d" else PooledGateConvLSTM2d
    module = layer(32, 64, 3, backend=backend, device="cuda", dtype=torch.float16)
    return module, torch.randn(6, 4, 32, 12, 12, device="cuda", dtype=torch.float16)


def training_step(module: torch.nn.Module, input: Tensor) -> list[Tensor]:
    output, (_, c_n) = module(input)
    loss = output.float().square().mean() + c_n.float().mean()
    return [output.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_cuda_graph(cell: str, backend: str) -> None:
    module, input = module_and_input(cell, backend)
    expected = [value.clone() for value in training_step(module, input)]
    graph, results = captured(lambda: training_step(module, input))
    for value in results:
        value.fill_(float("nan"))
    graph.replay()
    for value, other in zip(results, expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_no_synchronisation(cell: str, backend: str) -> None:
    module, input = module_and_input(cell, backend)
    training_step(module, input)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training_step(module, input)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_torch_compile(cell: str, backend: str) -> None:
    module, input = module_and_input(cell, backend)
    expected = module(input)[0]
    actual = torch.compile(module, fullgraph=True)(input)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("device_alone")
@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_32_bits(backend: str) -> None:
    """A frame with more than 2^31 pre-activations, in images below 1 GiB: the last sample gives what it gives alone."""
    if torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("less than 48 GiB of free GPU memory")
    torch.manual_seed(0)
    module = ConvLSTM2d(8, 64, 1, backend=backend, device="cuda", dtype=torch.float16)
    input = torch.randn(2, 5, 8, 1024, 1640, device="cuda", dtype=torch.float16)
    output, (h_n, c_n) = module(input)
    gradient = torch.autograd.grad(output.float().mean() * 1e6, module.bias_l0)[0]
    assert gradient.isfinite().all()
    with torch.no_grad():
        alone, (h_alone, c_alone) = module(input[:, -1:])
        torch.testing.assert_close(output[:, -1:], alone, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(c_n[:, -1:], c_alone, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(h_n[:, -1:], h_alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
# Counted for time chunks of 64 MiB: 0.76 and 0.61 (triton), 0.79 and 0.54 (cuda). Output, cells and the gradient of the
# input alone are 0.24, with the gates 0.56.
@pytest.mark.parametrize(("recompute", "limit"), [(False, 1.0), (True, 0.8)])
def test_training_memory(recompute: bool, limit: float, backend: str) -> None:
    """Peak memory of a training step against that of the plain loop, lip24 in bfloat16."""
    case = Case(
        steps=24, batch=32, in_channels=64, hidden_channels=64, size=(24, 24), state=False, recompute_gates=recompute
    )
    tensors = make_tensors(case).to(torch.bfloat16, "cuda")

    def peak(name: str) -> int:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(case, tensors, name)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    peak(backend)  # compiles
    ratio = peak(backend) / peak("reference")
    assert ratio <= limit, f"{ratio:.2f} of eager"


def test_flags_are_made_on_the_device() -> None:
    lengths = torch.tensor([2, 3], device="cuda")
    flags = FC.make_step_flags(torch.zeros(3, 2, 1, 1, 1, device="cuda"), lengths, None)
    assert flags is not None
    assert flags.tolist() == [[0, 0], [0, 0], [2, 0]]
