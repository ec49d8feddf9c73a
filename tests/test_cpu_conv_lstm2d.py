"""The C++ ConvLSTM kernels against the reference, and against themselves: any instruction set, thread count, batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import Case, case_id, make_tensors, ordinary, run
from hypothesis import HealthCheck, given, settings
from kernel_checks import (
    assert_same_bits,
    check_against_reference,
    check_batch,
    check_bits,
    check_chunks,
    check_kept_cells,
    check_repeatable,
    check_threads,
    poisoned_memory,
)
from strategies import cases

from fused_convlstm import _cpu
from fused_convlstm import functional as FC
from fused_convlstm.backends import registry
from fused_convlstm.backends.call import SAVE_CELLS, SAVE_GATES, SAVE_NOTHING

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
ORDINARY = ordinary("conv_lstm2d")
# Enough channels for full and for partial vectors and tiles of every instruction set, few enough pixels to be quick.
LARGE = [
    Case(in_channels=40, hidden_channels=70, size=(6, 7), batch=3),
    Case(in_channels=1, hidden_channels=16, size=(13, 12), peephole="pixel"),
    Case(in_channels=130, hidden_channels=24, size=(4, 4), recurrent_kernel_size=(1, 1), recompute_gates=True),
    Case(in_channels=70, hidden_channels=50, size=(5, 5), groups=2, stride=(2, 2), reverse=True),
]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*ORDINARY, *LARGE], ids=case_id)
def test_training(case: Case, dtype: torch.dtype) -> None:
    check_against_reference(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*ORDINARY, *LARGE], ids=case_id)
def test_inference(case: Case, dtype: torch.dtype) -> None:
    check_against_reference(case, "cpu", dtype, training=False)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases("conv_lstm2d"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sweep(case: Case, dtype: torch.dtype) -> None:
    check_against_reference(case, "cpu", dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases("conv_lstm2d"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sweep_of_bits(case: Case, dtype: torch.dtype) -> None:
    check_bits(case, dtype)


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512_bf16"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.instruction_set()
    try:
        _cpu.select_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _cpu.select_instruction_set(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_instruction_set(instruction_set: str, dtype: torch.dtype) -> None:
    assert _cpu.instruction_set() == instruction_set
    for case in (*LARGE, replace(LARGE[0], padding_mode="reflect"), Case(peephole="channel", lengths=True, reset=True)):
        check_against_reference(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_bits_do_not_depend_on_threads(case: Case, dtype: torch.dtype) -> None:
    check_threads(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_forward_bits_do_not_depend_on_the_batch(case: Case, dtype: torch.dtype) -> None:
    check_batch(replace(case, batch=5), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], LARGE[3]], ids=case_id)
def test_chunks_give_the_bits_of_the_whole(case: Case, dtype: torch.dtype) -> None:
    check_chunks(replace(case, steps=5), dtype, (1, 3, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", LARGE[:3], ids=case_id)
def test_kept_cells(case: Case, dtype: torch.dtype) -> None:
    check_kept_cells(case, "cpu", dtype)
    tensors = make_tensors(case).to(dtype)
    inference = run(case, tensors, "cpu", training=False)
    assert_same_bits(run(case, tensors, "cpu"), inference)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_repeatable(dtype: torch.dtype) -> None:
    for case in LARGE:
        check_repeatable(case, "cpu", dtype)


def test_backward_twice_gives_the_same_bits() -> None:
    """With retain_graph: nothing that the backward reads is overwritten."""
    case = LARGE[0]
    tensors = make_tensors(case).to(torch.float32)
    input = tensors.input.requires_grad_()
    for recompute in (False, True):
        output, _ = FC.conv_lstm2d(input, **tensors.weights, hx=tensors.hx, recompute_gates=recompute, backend="cpu")
        first, second = (torch.autograd.grad(output, input, tensors.grads[0], retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_kept_and_recomputed_gates_agree() -> None:
    for case in LARGE:
        tensors = make_tensors(case).to(torch.float64)
        kept = run(replace(case, recompute_gates=False), tensors, "cpu")
        again = run(replace(case, recompute_gates=True), tensors, "cpu")
        for name in kept:
            torch.testing.assert_close(kept[name], again[name])


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_gradients_of_some_outputs_only(missing: int) -> None:
    """An output that is not part of the loss has no gradient, rather than one of zeros."""
    case = Case()
    tensors = make_tensors(case)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [tensors.input.clone().requires_grad_(), *(x.clone().requires_grad_() for x in tensors.hx)]
        output, (h_n, c_n) = FC.conv_lstm2d(leaves[0], **tensors.weights, hx=(leaves[1], leaves[2]), backend=backend)
        pairs = [p for k, p in enumerate(zip((output, h_n, c_n), tensors.grads, strict=True)) if k != missing]
        results.append(torch.autograd.grad([p[0] for p in pairs], leaves, [p[1] for p in pairs]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "channels_last"])
def test_strided_weights_states_and_gradients(layout: str) -> None:
    case = Case(hidden_channels=17, peephole="pixel")
    tensors = make_tensors(case)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return x.mT.contiguous().mT if x.dim() > 1 else x[None].repeat(2, 1).mT.contiguous()[:, 0]
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        return x[..., :1].expand(x.shape)

    def convert(tensors_):
        return replace(
            tensors_,
            input=strided(tensors_.input),
            hx=tuple(map(strided, tensors_.hx)),
            weights={name: strided(x) for name, x in tensors_.weights.items()},
            grads=tuple(map(strided, tensors_.grads)),
        )

    tensors = convert(tensors)
    expected = run(case, tensors, "reference")
    with poisoned_memory():
        actual = run(case, tensors, "cpu")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


@pytest.mark.parametrize(
    "case",
    [
        Case(steps=2, size=(3, 4), in_channels=2, hidden_channels=2, peephole="channel"),
        Case(steps=3, size=(4, 3), in_channels=2, hidden_channels=2, stride=(2, 1), lengths=True, reset=True),
        Case(steps=2, size=(3, 3), in_channels=2, hidden_channels=2, padding_mode="reflect", recompute_gates=True),
    ],
    ids=case_id,
)
def test_gradcheck(case: Case) -> None:
    tensors = make_tensors(case)
    leaves = [tensors.input.nan_to_num(), *tensors.hx, *(x for x in tensors.weights.values() if x is not None)]
    names = [name for name, x in tensors.weights.items() if x is not None]

    def function(input, h_0, c_0, *weights):
        output, (h_n, c_n) = FC.conv_lstm2d(
            input, **dict(zip(names, weights, strict=True)), hx=(h_0, c_0), lengths=tensors.lengths,
            reset=tensors.reset, backend="cpu", **case.options(),
        )  # fmt: skip
        return output, h_n, c_n

    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in leaves])


@pytest.mark.parametrize("save", [SAVE_NOTHING, SAVE_CELLS, SAVE_GATES])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_major"])
def test_opcheck(save: str, layout: str) -> None:
    from cases import in_layout

    from fused_convlstm import ops
    from fused_convlstm.ops._sequence import flatten_options

    case = Case(layout=layout, hidden_channels=4, peephole="channel")
    tensors = make_tensors(case).to(torch.float32)
    training = save != SAVE_NOTHING
    weights = [x.requires_grad_(training) for x in tensors.weights.values()]
    options = FC.make_options((weights[0], "weight_ih"), 1, "same", 1, None, 1, "zeros", "sigmoid", False)
    input = in_layout(tensors.input, layout).requires_grad_(training)
    hx = [x.requires_grad_(training) for x in tensors.hx]
    arguments = (input, *hx, *weights, None, *flatten_options(options), save, "cpu")
    tests = ["test_schema", "test_faketensor"]
    if training:
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.conv_lstm2d, arguments, test_utils=tests)


def test_nan_goes_through() -> None:
    tensors = make_tensors(Case(steps=2, size=(9, 9))).to(torch.float32)
    tensors.input[0, 0, 0, 0, 0] = float("nan")
    output, _ = FC.conv_lstm2d(tensors.input, **tensors.weights, backend="cpu")
    expected, _ = FC.conv_lstm2d(tensors.input, **tensors.weights, backend="reference")
    assert torch.equal(output.isnan(), expected.isnan())
    assert output.isnan().any()


def test_extreme_inputs_saturate() -> None:
    """Where exp would overflow, gates are 0 or 1 and nothing is NaN."""
    tensors = make_tensors(Case(steps=4)).to(torch.float32)
    for scale in (1e3, 1e6, 1e30):
        output, (_, c_n) = FC.conv_lstm2d(tensors.input * scale, **tensors.weights, backend="cpu")
        expected, (_, expected_c) = FC.conv_lstm2d(tensors.input * scale, **tensors.weights, backend="reference")
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(c_n, expected_c)


def gradients_and_others_between(backend: str, size: tuple[int, int], others: int) -> list[torch.Tensor]:
    """Gradients of a call, before whose backward frames of ``others`` other sizes pass."""
    tensors = make_tensors(Case(size=size, hidden_channels=3, state=False)).to(torch.float32)
    leaves = [tensors.input, *tensors.weights.values()]
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    output, _ = FC.conv_lstm2d(tensors.input, **tensors.weights, backend=backend)
    with torch.no_grad():
        for k in range(others):
            FC.conv_lstm2d(torch.ones(1, 1, 3, 2, k + 1), **tensors.weights, backend=backend)
    return list(torch.autograd.grad(output.square().sum(), leaves))


def test_tables_that_are_dropped_between_forward_and_backward() -> None:
    """Backward makes the tables of its frames' size again. In threads at once, too."""
    expected = gradients_and_others_between("reference", (6, 7), 0)
    for actual in (
        gradients_and_others_between("cpu", (6, 7), 150),
        *ThreadPoolExecutor(4).map(lambda _: gradients_and_others_between("cpu", (6, 7), 0), range(4)),
    ):
        for a, b in zip(expected, actual, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


MANY_SIZES = """
import torch
from fused_convlstm import functional as FC

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20

def run(height):
    FC.conv_lstm2d(torch.zeros(1, 1, 1, height, 300), torch.zeros(4, 1, 3, 3), torch.zeros(4, 1, 3, 3), backend="cpu")

run(400)
before = resident()
for k in range(31):
    run(401 + k)
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the system does not tell the memory of a process")
def test_memory_of_many_frame_sizes_is_bounded(tmp_path: Path) -> None:
    """Tables of 31 sizes are of more than 600 MiB."""
    command = [sys.executable, "-c", MANY_SIZES]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 250


def test_refusals_name_the_property() -> None:
    tensors = make_tensors(Case()).to(torch.float16)
    with pytest.raises(registry.BackendError, match="float16"):
        FC.conv_lstm2d(tensors.input, **tensors.weights, backend="cpu")
    meta = make_tensors(Case()).to(torch.float32, "meta")
    with pytest.raises(registry.BackendError, match="meta"):
        FC.conv_lstm2d(meta.input, **meta.weights, backend="cpu")


def test_info_and_unknown_instruction_set() -> None:
    info = registry.get("cpu").info()
    assert info["instruction set in use"] in info["instruction sets compiled"]
    assert info["threads"] == str(torch.get_num_threads())
    with pytest.raises(ValueError, match="unknown instruction set 'mmx'"):
        _cpu.select_instruction_set("mmx")
