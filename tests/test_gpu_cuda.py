"""The CUDA kernels on a GPU: what the host tests ask, on the device, and what only a device can show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from cases import Case, case_id, make_tensors, ordinary, run
from kernel_checks import check_against_reference, check_repeatable

from fused_convlstm import functional as FC
from fused_convlstm.backends import registry
from fused_convlstm.functional import PADDING_MODES

BACKEND = registry.get("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable())),
]

FORMATS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CELLS = ("conv_lstm2d", "pooled_gate_conv_lstm2d")


def served(case: Case) -> bool:
    return case.padding_mode == PADDING_MODES[0] and case.groups == 1 and case.peephole != "pixel"


CASES = [case for cell in CELLS for case in ordinary(cell) if served(case)]
# Sizes of real layers, and one that fills more than a device at a time: size, channels, batch.
SIZES = [
    ((24, 24), 64, 8), ((12, 12), 128, 8), ((8, 8), 128, 8), ((6, 6), 256, 8), ((3, 3), 256, 32), ((28, 28), 256, 16),
]  # fmt: skip
LARGE = [
    Case(cell, 4, batch, channels, channels, size, layout="channels_last")
    for cell in CELLS
    for size, channels, batch in SIZES
]


@contextmanager
def number_format(name: str) -> Iterator[torch.dtype]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield FORMATS[name]
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES + LARGE, ids=lambda case: f"{case.cell}-{case_id(case)}")
def test_matches_the_reference(case: Case, name: str, training: bool) -> None:
    with number_format(name) as dtype:
        precision = torch.float16 if name == "tf32" else None
        check_against_reference(case, "cuda", dtype, "cuda", training, precision)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.cell}-{case_id(case)}")
def test_repeatable(case: Case, name: str) -> None:
    with number_format(name) as dtype:
        check_repeatable(case, "cuda", dtype, "cuda")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lengths", [False, True])
def test_captured_in_a_cuda_graph(cell: str, lengths: bool) -> None:
    case = Case(cell=cell, steps=4, lengths=lengths, size=(6, 6), layout="channels_last", hidden_channels=16)
    tensors = make_tensors(case).to(torch.bfloat16, "cuda")
    lengths_there = None if tensors.lengths is None else tensors.lengths.cuda()
    weights = {name: weight.requires_grad_() for name, weight in tensors.weights.items()}
    static = tensors.input.nan_to_num()

    def step() -> list[torch.Tensor]:
        output, _ = getattr(FC, cell)(static, hx=tensors.hx, lengths=lengths_there, backend="cuda", **weights)
        return [output.detach(), *torch.autograd.grad(output, list(weights.values()), tensors.grads[0])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    static.copy_(torch.randn_like(static))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_runs_on_the_current_stream(cell: str) -> None:
    """What a busy side stream has yet to write is read after it was written."""
    case = Case(cell=cell, layout="channels_last", hidden_channels=16)
    tensors = make_tensors(case).to(torch.float16, "cuda")
    expected = run(case, tensors, "cuda", training=False)
    late = replace(tensors, input=torch.full_like(tensors.input, float("nan")))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.input.copy_(tensors.input)
        actual = run(case, late, "cuda", training=False)
    torch.cuda.current_stream().wait_stream(stream)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)


def test_nothing_synchronises() -> None:
    case = Case(lengths=False, reset=True, size=(12, 12), hidden_channels=16, layout="channels_last")
    tensors = make_tensors(case).to(torch.float16, "cuda")
    run(case, tensors, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, tensors, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_runs_on_the_device_of_its_input() -> None:
    case = Case(hidden_channels=16)
    tensors = make_tensors(case)
    with torch.cuda.device(0):
        results = run(case, tensors.to(torch.float16, "cuda:1"), "cuda")
        assert torch.cuda.current_device() == 0
    expected = run(case, tensors.to(torch.float16, "cuda:0"), "cuda")
    for name, value in results.items():
        assert value.device == torch.device("cuda:1")
        torch.testing.assert_close(value.cpu(), expected[name].cpu(), rtol=0, atol=0, msg=name)
