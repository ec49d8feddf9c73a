"""The C++ kernels of the pooled-gate cell against the reference, and against themselves: any instruction set, thread
count, batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, case_id, in_layout, make_tensors, ordinary, run
from hypothesis import HealthCheck, given, settings
from kernel_checks import (
    assert_same_bits,
    check_against_reference,
    check_batch,
    check_chunks,
    check_kept_cells,
    check_repeatable,
    poisoned_memory,
    threads,
)
from strategies import cases

from fused_convlstm import _cpu, ops
from fused_convlstm import functional as FC
from fused_convlstm.backends import registry
from fused_convlstm.backends.call import SAVE_CELLS, SAVE_GATES, SAVE_NOTHING
from fused_convlstm.ops._sequence import flatten_options

CELL = "pooled_gate_conv_lstm2d"
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DTYPE_IDS = ["float32", "bfloat16", "float64"]
BASE = Case(cell=CELL)
# More than a chunk of channels, whole and partial vectors and tiles, several blocks, rows that are split.
LARGE = [
    replace(BASE, in_channels=40, hidden_channels=70, size=(6, 7), batch=3),
    replace(BASE, in_channels=1, hidden_channels=16, size=(13, 12), recurrent_kernel_size=(5, 5)),
    replace(BASE, in_channels=130, hidden_channels=24, size=(4, 4), recurrent_kernel_size=(1, 1), recompute_gates=True),
    replace(BASE, in_channels=66, hidden_channels=33, size=(5, 5), stride=(2, 2), reverse=True, lengths=True, batch=5),
    replace(BASE, in_channels=2, hidden_channels=3, size=(3, 130), steps=2, batch=1, padding_mode="circular"),
]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", [*ordinary(CELL), *LARGE], ids=case_id)
def test_against_the_reference(case: Case, dtype: torch.dtype, training: bool) -> None:
    check_against_reference(case, "cpu", dtype, training=training)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases(CELL))
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_sweep(case: Case, dtype: torch.dtype) -> None:
    check_against_reference(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sums_over_many_pixels(dtype: torch.dtype) -> None:
    """Gradients of weights stay exact, though they are sums over all pixels of all frames."""
    for channels in (1, 64):
        case = replace(BASE, in_channels=channels, hidden_channels=16, size=(32, 32), steps=8, batch=2)
        check_against_reference(case, "cpu", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    before = _cpu.instruction_set()
    try:
        _cpu.select_instruction_set(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        for case in LARGE:
            check_against_reference(case, "cpu", dtype)
    finally:
        _cpu.select_instruction_set(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_forward_bits_depend_neither_on_threads_nor_on_the_batch(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, batch=5)  # 1 thread: samples on their own; 2, 3: all threads share a step
    tensors = make_tensors(case).to(dtype)
    results = []
    for count in (1, 2, 3, 5):
        with threads(count):
            results.append(run(case, tensors, "cpu", training=False))
    for result in results[1:]:
        assert_same_bits(result, results[0])
    check_batch(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], LARGE[4]], ids=case_id)
def test_chunks_give_the_bits_of_the_whole(case: Case, dtype: torch.dtype) -> None:
    check_chunks(replace(case, steps=5), dtype, (1, 3, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", [LARGE[0], LARGE[1], LARGE[4]], ids=case_id)
def test_kept_cells(case: Case, dtype: torch.dtype) -> None:
    check_kept_cells(case, "cpu", dtype)
    tensors = make_tensors(case).to(dtype)
    inference = run(case, tensors, "cpu", training=False)
    assert_same_bits(run(case, tensors, "cpu"), inference)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_repeatable(dtype: torch.dtype) -> None:
    for case in LARGE:
        check_repeatable(case, "cpu", dtype)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_backward_twice_gives_the_same_bits(recompute: bool) -> None:
    """With retain_graph: nothing that the backward reads is overwritten."""
    tensors = make_tensors(LARGE[0]).to(torch.float32)
    input = tensors.input.requires_grad_()
    output, _ = FC.pooled_gate_conv_lstm2d(
        input, **tensors.weights, hx=tensors.hx, recompute_gates=recompute, backend="cpu"
    )
    first, second = (torch.autograd.grad(output, input, tensors.grads[0], retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_kept_and_recomputed_candidates_agree() -> None:
    for case in LARGE:
        tensors = make_tensors(case).to(torch.float64)
        kept = run(replace(case, recompute_gates=False), tensors, "cpu")
        again = run(replace(case, recompute_gates=True), tensors, "cpu")
        for name in kept:
            torch.testing.assert_close(kept[name], again[name], msg=name)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_gradients_of_some_outputs_only(missing: int) -> None:
    """An output that is not part of the loss has no gradient, rather than one of zeros."""
    tensors = make_tensors(BASE)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [tensors.input.clone().requires_grad_(), *(x.clone().requires_grad_() for x in tensors.hx)]
        output, (h_n, c_n) = FC.pooled_gate_conv_lstm2d(
            leaves[0], **tensors.weights, hx=(leaves[1], leaves[2]), backend=backend
        )
        pairs = [p for k, p in enumerate(zip((output, h_n, c_n), tensors.grads, strict=True)) if k != missing]
        results.append(torch.autograd.grad([p[0] for p in pairs], leaves, [p[1] for p in pairs]))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "wanted", ["input", "gate_weight_ih", "gate_weight_hh", "gate_bias", "depthwise_ih", "depthwise_hh", "pointwise_ih",
               "pointwise_hh", "bias", "h_0", "c_0"]
)  # fmt: skip
def test_one_gradient_alone(wanted: str, recompute: bool) -> None:
    """What the kernel leaves out for a gradient that nobody wants changes no other."""
    tensors = make_tensors(BASE)
    grads = []
    for backend in ("cpu", "reference"):
        named = {"input": tensors.input, "h_0": tensors.hx[0], "c_0": tensors.hx[1], **tensors.weights}
        named[wanted] = named[wanted].clone().requires_grad_()
        weights = {name: named[name] for name in tensors.weights}
        output, _ = FC.pooled_gate_conv_lstm2d(
            named["input"], **weights, hx=(named["h_0"], named["c_0"]), recompute_gates=recompute, backend=backend
        )
        grads += torch.autograd.grad(output, named[wanted], tensors.grads[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "channels_last"])
def test_strided_weights_states_and_gradients(layout: str) -> None:
    case = replace(BASE, hidden_channels=17)
    tensors = make_tensors(case)

    def strided(x: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return x.mT.contiguous().mT if x.dim() > 1 else x[None].repeat(2, 1).mT.contiguous()[:, 0]
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        return x[..., :1].expand(x.shape)

    tensors = replace(
        tensors,
        input=strided(tensors.input),
        hx=tuple(map(strided, tensors.hx)),
        weights={name: strided(x) for name, x in tensors.weights.items()},
        grads=tuple(map(strided, tensors.grads)),
    )
    expected = run(case, tensors, "reference")
    with poisoned_memory():
        actual = run(case, tensors, "cpu")
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=name)


@pytest.mark.parametrize(
    "case",
    [
        replace(BASE, steps=2, size=(3, 4), in_channels=2, hidden_channels=2),
        replace(BASE, size=(4, 3), in_channels=2, hidden_channels=2, stride=(2, 1), lengths=True, reset=True),
        replace(BASE, steps=2, size=(3, 3), in_channels=2, hidden_channels=2, padding_mode="reflect",
                recompute_gates=True),
    ],
    ids=case_id,
)  # fmt: skip
def test_gradcheck(case: Case) -> None:
    tensors = make_tensors(case)
    leaves = [tensors.input.nan_to_num(), *tensors.hx, *tensors.weights.values()]

    def function(
        input: torch.Tensor, h_0: torch.Tensor, c_0: torch.Tensor, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        output, (h_n, c_n) = FC.pooled_gate_conv_lstm2d(
            input, **dict(zip(tensors.weights, weights, strict=True)), hx=(h_0, c_0), lengths=tensors.lengths,
            reset=tensors.reset, backend="cpu", **case.options(),
        )  # fmt: skip
        return output, h_n, c_n

    assert torch.autograd.gradcheck(function, [x.clone().requires_grad_() for x in leaves])


@pytest.mark.parametrize("save", [SAVE_NOTHING, SAVE_CELLS, SAVE_GATES])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_major"])
def test_opcheck(save: str, layout: str) -> None:
    tensors = make_tensors(replace(BASE, hidden_channels=4)).to(torch.float32)
    training = save != SAVE_NOTHING
    names = ("gate_weight_ih", "gate_weight_hh", "gate_bias", "depthwise_ih", "depthwise_hh", "pointwise_ih",
             "pointwise_hh", "bias")  # fmt: skip
    weights = [tensors.weights[name].requires_grad_(training) for name in names]
    options = FC.make_options((weights[3], "depthwise_ih"), 1, "same", 1, None, 1, "zeros", "sigmoid", False)
    input = in_layout(tensors.input, layout).requires_grad_(training)
    hx = [x.requires_grad_(training) for x in tensors.hx]
    arguments = (input, *hx, *weights, None, *flatten_options(options), save, "cpu")
    tests = ["test_schema", "test_faketensor"]
    if training:
        tests += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(ops.pooled_gate_conv_lstm2d, arguments, test_utils=tests)


def test_nan_goes_through() -> None:
    tensors = make_tensors(BASE).to(torch.float32)
    tensors.input[1, 0, 0, 0, 0] = float("nan")  # reaches the gates of sample 0, and so all of its later state
    output, _ = FC.pooled_gate_conv_lstm2d(tensors.input, **tensors.weights, backend="cpu")
    assert not output[0].isnan().any()
    assert output[1:, 0].isnan().all()
    assert not output[:, 1].isnan().any()


def test_refusals_name_the_property() -> None:
    tensors = make_tensors(BASE).to(torch.float16)
    with pytest.raises(registry.BackendError, match="float16"):
        FC.pooled_gate_conv_lstm2d(tensors.input, **tensors.weights, backend="cpu")
