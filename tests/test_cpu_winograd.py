"""3x3 convolutions by Winograd on the CPU: the same checks as the direct kernels', and the choice between the two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

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
    check_repeatable,
    check_threads,
)
from strategies import cases
from tolerances import FACTOR, WINOGRAD_FACTOR

from fused_convlstm import ConvLSTM2d, _cpu, explain, use_winograd
from fused_convlstm import functional as FC
from fused_convlstm.backends import registry
from fused_convlstm.backends.call import ConvLSTMOptions
from fused_convlstm.backends.cpu import winograd
from fused_convlstm.backends.settings import Settings

ORDINARY = [
    case
    for case in ordinary("conv_lstm2d")
    if case.kernel_size == case.recurrent_kernel_size == (3, 3)
    and case.stride == case.dilation == case.recurrent_dilation == (1, 1)
    and case.groups == 1
    and case.padding_mode == "zeros"
]
CASE_FACTOR = WINOGRAD_FACTOR | {2: FACTOR}  # on these cases F(2x2, 3x3) keeps to the rule for a default
LARGE = [
    Case(in_channels=40, hidden_channels=70, size=(6, 7), batch=3),
    Case(in_channels=1, hidden_channels=16, size=(13, 12), peephole="pixel"),
    Case(in_channels=300, hidden_channels=24, size=(4, 5), padding=(3, 4), recompute_gates=True),
    Case(in_channels=16, hidden_channels=16, size=(18, 37), padding="valid", reverse=True),
]


@pytest.fixture(autouse=True, params=[2, 4], ids=["2x2", "4x4"])
def tile(request: pytest.FixtureRequest) -> Iterator[int]:
    with use_winograd("always", request.param):
        yield request.param


def as_eligible(case: Case) -> Case:
    """The nearest case that the transformed kernels serve."""
    one = (1, 1)
    case = replace(
        case, kernel_size=(3, 3), recurrent_kernel_size=(3, 3), stride=one, dilation=one, recurrent_dilation=one,
        groups=1, padding_mode="zeros",
    )  # fmt: skip
    return case if min(case.state_size()) > 0 else replace(case, padding="same")


@pytest.mark.parametrize("case", [*ORDINARY, *LARGE], ids=case_id)
def test_training(case: Case, tile: int) -> None:
    check_against_reference(case, "cpu", torch.float32, factor=CASE_FACTOR[tile])


@pytest.mark.parametrize("case", [*ORDINARY, *LARGE], ids=case_id)
def test_inference(case: Case, tile: int) -> None:
    check_against_reference(case, "cpu", torch.float32, training=False, factor=CASE_FACTOR[tile])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases("conv_lstm2d").map(as_eligible))
def test_sweep(case: Case, tile: int) -> None:
    check_against_reference(case, "cpu", torch.float32, factor=WINOGRAD_FACTOR[tile])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(case=cases("conv_lstm2d").map(as_eligible))
def test_sweep_of_bits(case: Case) -> None:
    check_bits(case, torch.float32)


@pytest.mark.parametrize("instruction_set", ["portable", "avx2", "avx512"])
def test_every_instruction_set(instruction_set: str, tile: int) -> None:
    before = _cpu.instruction_set()
    try:
        _cpu.select_instruction_set(instruction_set)
    except ValueError as error:
        pytest.skip(str(error))
    for case in (*LARGE, Case(peephole="channel", lengths=True, reset=True)):
        check_against_reference(case, "cpu", torch.float32, factor=CASE_FACTOR[tile])
    _cpu.select_instruction_set(before)


@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_bits_do_not_depend_on_threads(case: Case) -> None:
    check_threads(case, torch.float32)


@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_forward_bits_do_not_depend_on_the_batch(case: Case) -> None:
    check_batch(replace(case, batch=5), torch.float32)


@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_chunks_give_the_bits_of_the_whole(case: Case) -> None:
    check_chunks(replace(case, steps=5), torch.float32, (1, 3, 1))


def test_repeatable() -> None:
    for case in LARGE:
        check_repeatable(case, "cpu", torch.float32)


def test_extreme_inputs_saturate() -> None:
    tensors = make_tensors(Case(steps=4)).to(torch.float32)
    for scale in (1e6, 1e30):
        output, (_, c_n) = FC.conv_lstm2d(tensors.input * scale, **tensors.weights, backend="cpu")
        expected, (_, expected_c) = FC.conv_lstm2d(tensors.input * scale, **tensors.weights, backend="reference")
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(c_n, expected_c)


def test_nan_reaches_what_it_touches(tile: int) -> None:
    """At least the outputs of the direct convolution, at most the tiles whose windows hold it."""
    tensors = make_tensors(Case(steps=1, size=(14, 13), state=False)).to(torch.float32)
    y, x = 5, 3
    tensors.input[0, 0, 0, y, x] = float("nan")
    output, _ = FC.conv_lstm2d(tensors.input, **tensors.weights, backend="cpu")
    expected, _ = FC.conv_lstm2d(tensors.input, **tensors.weights, backend="reference")
    actual, least = output[0].isnan(), expected[0].isnan()
    assert (actual >= least).all()
    assert not actual[1].any()
    first_rows, first_columns = (torch.arange(size) // tile * tile - 1 for size in (14, 13))  # of the windows
    holds_y = (first_rows <= y) & (y < first_rows + tile + 2)
    holds_x = (first_columns <= x) & (x < first_columns + tile + 2)
    assert not actual[0, :, ~(holds_y[:, None] & holds_x)].any()


def test_other_calls_stay_direct() -> None:
    """The mode changes nothing where the transform does not apply."""
    for case in (Case(kernel_size=(1, 1)), Case(stride=(2, 2)), Case(padding_mode="circular"), Case(groups=1)):
        dtype = torch.float64 if case == Case() else torch.float32
        tensors = make_tensors(case).to(dtype)
        actual = run(case, tensors, "cpu")
        with use_winograd("never"):
            assert_same_bits(actual, run(case, tensors, "cpu"))


def test_it_is_off_by_default_and_explain_says_when_it_ran(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_tensors(Case()).to(torch.float32)

    def notes() -> str:
        return str(explain(FC.conv_lstm2d, tensors.input, **tensors.weights, backend="cpu"))

    assert f"gates by Winograd's F({tile}x{tile}, 3x3)" in notes()
    assert registry.get("cpu").info()["Winograd"] == f"always, F({tile}x{tile}, 3x3)"
    with use_winograd("never"):
        assert "Winograd" not in notes()
    monkeypatch.setattr(winograd, "_setting", Settings())
    monkeypatch.delenv(winograd.ENVIRONMENT_VARIABLE, raising=False)
    assert registry.get("cpu").info()["Winograd"] == "never"
    assert "Winograd" not in notes()
    monkeypatch.setenv(winograd.ENVIRONMENT_VARIABLE, "always")
    assert "F(2x2, 3x3)" in notes()
    monkeypatch.setenv(winograd.ENVIRONMENT_VARIABLE, "often")
    with pytest.raises(ValueError, match="FUSED_CONVLSTM_WINOGRAD: unknown mode 'often'"):
        notes()


def test_explain_names_the_gradients(tile: int) -> None:
    layer = ConvLSTM2d(8, 8, 3)
    frames = torch.randn(2, 1, 8, 6, 6, requires_grad=True)
    report = explain(lambda: layer(frames)[0].sum().backward())
    name = f"F({tile}x{tile}, 3x3)"
    assert f"gradients of h by {name}, of the input by {name}, of the weights by {name}" in str(report)


def test_unknown_mode_or_tile() -> None:
    with pytest.raises(ValueError, match="use_winograd: unknown mode 'on'"), use_winograd("on"):
        pass
    with pytest.raises(ValueError, match="use_winograd: tile 3; choose one of 2, 4"), use_winograd("auto", 3):
        pass


# 6x6 pixels are 9 tiles of 2x2, but as many products as 4 tiles of 4x4; 3x3 pixels are few tiles for many threads.
@pytest.mark.parametrize(
    ("channels", "size", "threads", "small", "large"),
    [(64, 24, 1, 2, 4), (64, 24, 16, 2, 4), (256, 6, 1, 2, 2), (128, 3, 1, 0, 4), (128, 3, 16, 0, 0)],
)
def test_automatic_choice(
    channels: int, size: int, threads: int, small: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    input = torch.empty(24, 8, channels, size, size, device="meta")
    weight = torch.empty(4 * channels, channels, 3, 3, device="meta")
    options = ConvLSTMOptions(padding=(1, 1, 1, 1))
    for largest, expected in ((2, small), (4, large)):
        with use_winograd("auto", largest):
            assert winograd.choose(input, weight, weight, options, (size, size))[:3] == (expected,) * 3


def test_automatic_choice_of_an_empty_batch() -> None:
    with use_winograd("auto", 4):
        check_against_reference(Case(batch=0), "cpu", torch.float32)
