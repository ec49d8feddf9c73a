"""The ConvLSTM's CUDA kernels, executed on the host, against the reference."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from cases import Case, case_id, make_tensors, ordinary, run
from cuda_host import FORMATS, SCHEDULES, check_format, host_backend, load, number_format, vary_schedule
from kernel_checks import check_against_reference, check_kept_cells, check_repeatable

from fused_convlstm import functional as FC
from fused_convlstm.backends import BackendError, registry
from fused_convlstm.backends.call import Call, ConvLSTMOptions
from fused_convlstm.backends.cuda import CudaBackend, conv_lstm2d
from fused_convlstm.backends.cuda import backend as cuda_backend
from fused_convlstm.backends.cuda.parameters import gather
from fused_convlstm.backends.tf32 import round_to_tf32

DEFAULT = Case()

vary_schedule = pytest.fixture(autouse=True)(vary_schedule)


def served(case: Case) -> bool:
    return case.padding_mode == "zeros" and case.groups == 1 and case.peephole != "pixel"


CASES = [case for case in ordinary("conv_lstm2d") if served(case)]
LARGE = [
    Case(size=(13, 11), hidden_channels=35, steps=2),  # two tiles of rows and of columns, both cut off
    Case(size=(13, 11), hidden_channels=40, in_channels=9, steps=2, stride=(2, 1), lengths=True, recompute_gates=True),
    Case(size=(6, 5), recurrent_kernel_size=(1, 1), hidden_channels=130, batch=5, steps=2, layout="channels_last"),
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_training(case: Case, name: str) -> None:
    with number_format(name, tile=1) as backend:
        check_format(case, backend, name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_inference(case: Case, name: str) -> None:
    with number_format(name, tile=1) as backend:
        check_format(case, backend, name, training=False)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tile", [1, 2])
@pytest.mark.parametrize("case", LARGE, ids=case_id)
def test_tiles(case: Case, tile: int, name: str) -> None:
    with number_format(name, tile) as backend:
        check_format(case, backend, name)


# All steps in one launch. Where several images share a group, some blocks have none of some; where one image needs
# several tiles of pixels, its blocks exchange rows of h.
SMALL_MAPS = [
    replace(DEFAULT, size=(3, 3), batch=9, hidden_channels=20, steps=4),
    replace(DEFAULT, size=(12, 12), batch=1, hidden_channels=5, steps=3, layout="channels_last"),
    replace(DEFAULT, size=(9, 8), batch=1, steps=5, lengths=True, reset=True, peephole="channel", reverse=True),
    replace(DEFAULT, size=(6, 6), batch=3, steps=5, lengths=True, reset=True, recompute_gates=True, state=False),
    replace(DEFAULT, size=(5, 6), kernel_size=(1, 1), recurrent_kernel_size=(1, 1), stride=(2, 2), hidden_channels=33),
    replace(DEFAULT, size=(4, 4), recurrent_kernel_size=(4, 3), gate_activation="hard_sigmoid", bias=False),
]
# Flags; flags, with room for a part of the weights only; clusters.
DEVICES = [
    {"compute_capability": 80, "resident_blocks": 16, "multiprocessors": 16},
    {"compute_capability": 80, "resident_blocks": 16, "multiprocessors": 16, "shared_bytes_per_block": 48 * 1024},
    {"compute_capability": 90, "resident_blocks": 16, "multiprocessors": 16},
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("device", DEVICES, ids=["flags", "streamed", "clusters"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", SMALL_MAPS, ids=case_id)
def test_small_maps(case: Case, training: bool, device: dict[str, int], name: str) -> None:
    load().set_device(**device)
    load().take_launches()
    with number_format(name) as backend:
        check_format(case, backend, name, training)
    launches = load().take_launches()
    assert launches.count("conv_lstm_forward_sequence") == 1
    assert launches.count("conv_lstm_backward_sequence") == int(training)
    assert set(launches) <= {"conv_lstm_forward_sequence", "conv_lstm_backward_sequence"} or training


def test_what_does_not_fit_at_once_runs_step_by_step() -> None:
    load().set_device(resident_blocks=2, multiprocessors=2)
    load().take_launches()
    with host_backend() as backend:
        check_against_reference(replace(DEFAULT, batch=9, steps=2), backend, torch.float32, training=False)
    assert load().take_launches() == ["conv_lstm_forward_step"] * 2


@pytest.mark.parametrize("device", DEVICES, ids=["flags", "streamed", "clusters"])
def test_small_maps_give_the_same_bits_under_every_schedule(device: dict[str, int]) -> None:
    tensors = make_tensors(SMALL_MAPS[2]).to(torch.bfloat16)
    load().set_device(**device)
    results = []
    with host_backend() as backend:
        for schedule in SCHEDULES:
            load().set_schedule(*schedule)
            results.append(run(SMALL_MAPS[2], tensors, backend))
    for result in results[1:]:
        for key, value in result.items():
            torch.testing.assert_close(value, results[0][key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", FORMATS)
def test_same_bits_under_every_schedule(name: str) -> None:
    case = replace(DEFAULT, hidden_channels=17, lengths=True, reset=True, peephole="channel")
    tensors = make_tensors(case).to(FORMATS[name])
    results = []
    with number_format(name, tile=1) as backend:
        for schedule in SCHEDULES:
            load().set_schedule(*schedule)
            results.append(run(case, tensors, backend))
    for result in results[1:]:
        for key, value in result.items():
            torch.testing.assert_close(value, results[0][key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", FORMATS)
def test_repeatable(name: str) -> None:
    with number_format(name) as backend:
        check_repeatable(replace(DEFAULT, hidden_channels=18), backend, FORMATS[name])


@pytest.mark.parametrize("tile", [1, 3])  # a launch a step; all steps in one
@pytest.mark.parametrize(("channels", "peephole"), [(5, "none"), (8, "none"), (5, "channel")])
@pytest.mark.parametrize("name", FORMATS)
def test_kept_cells(name: str, channels: int, peephole: str, tile: int) -> None:
    case = replace(DEFAULT, steps=4, hidden_channels=channels, reset=True, peephole=peephole)
    with number_format(name, tile) as backend:
        check_kept_cells(case, backend, FORMATS[name])


CHUNKED = [
    replace(DEFAULT, steps=5),
    replace(DEFAULT, steps=5, reverse=True),
    replace(DEFAULT, steps=5, recompute_gates=True, reset=True, peephole="channel"),
    replace(DEFAULT, steps=5, batch=4, recompute_gates=True, reverse=True, lengths=True),
    replace(DEFAULT, steps=5, batch=4, recompute_gates=True, reverse=True, lengths=True, state=False),
    replace(DEFAULT, steps=5, batch=4, lengths=True, reset=True, padding=((0, 1), (2, 1)), stride=(2, 2), size=(8, 8)),
]


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("case", CHUNKED, ids=case_id)
def test_time_chunks(case: Case, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass goes through time in chunks whose buffers hold a few steps."""
    monkeypatch.setattr(conv_lstm2d, "chunk_steps", lambda *_: length)
    with host_backend() as backend:
        check_against_reference(case, backend, torch.float32)


def test_sequence_in_parts() -> None:
    """The state passed on between calls gives what the whole sequence gives, to the bit."""
    case = replace(DEFAULT, steps=5)
    tensors = make_tensors(case).to(torch.bfloat16)
    with host_backend() as backend:
        whole = run(case, tensors, backend, training=False)
        first = replace(tensors, input=tensors.input[:2])
        head = run(replace(case, steps=2), first, backend, training=False)
        second = replace(tensors, input=tensors.input[2:], hx=(head["h_n"], head["c_n"]))
        tail = run(replace(case, steps=3), second, backend, training=False)
    torch.testing.assert_close(torch.cat([head["output"], tail["output"]]), whole["output"], rtol=0, atol=0)
    for state in ("h_n", "c_n"):
        torch.testing.assert_close(tail[state], whole[state], rtol=0, atol=0)


def test_backward_twice_through_one_graph() -> None:
    """Nothing that was kept is written to."""
    tensors = make_tensors(DEFAULT).to(torch.float32)
    weights = {name: weight.requires_grad_() for name, weight in tensors.weights.items()}
    with host_backend() as backend:
        output, _ = FC.conv_lstm2d(tensors.input, hx=tensors.hx, backend=backend, **weights)
        first = torch.autograd.grad(output, list(weights.values()), tensors.grads[0], retain_graph=True)
        second = torch.autograd.grad(output, list(weights.values()), tensors.grads[0])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_unaligned_tensors() -> None:
    """Channels-last tensors that begin in the middle of 16 bytes are copied, not read."""
    case = replace(DEFAULT, hidden_channels=8, in_channels=8, steps=2)
    tensors = make_tensors(case).to(torch.float16)
    tensors = replace(tensors, hx=(tensors.hx[0], tensors.hx[1].float()))

    def shifted(x: torch.Tensor) -> torch.Tensor:
        flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        view = flat.view(*x.shape[:-3], x.size(-2), x.size(-1), x.size(-3)).movedim(-1, -3)
        return view.copy_(x)

    moved = replace(
        tensors,
        input=shifted(tensors.input),
        hx=(shifted(tensors.hx[0]), shifted(tensors.hx[1])),
        grads=tuple(shifted(grad) for grad in tensors.grads),
    )
    with host_backend() as backend:
        plain, actual = run(case, tensors, backend), run(case, moved, backend)
    for name, value in actual.items():
        torch.testing.assert_close(value, plain[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cell", ["conv_lstm2d", "pooled_gate_conv_lstm2d"])
def test_nan_goes_through(cell: str, name: str) -> None:
    case = replace(DEFAULT, cell=cell, steps=2, size=(9, 9), state=False)
    tensors = make_tensors(case).to(FORMATS[name])
    tensors.input[0, 0, 0, 0, 0] = float("nan")
    with number_format(name) as backend:
        output = run(case, tensors, backend, training=False)["output"]
    expected = run(case, tensors, "reference", training=False)["output"]
    assert torch.equal(output.isnan(), expected.isnan())
    assert output.isnan().any()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_extreme_inputs_saturate(name: str) -> None:
    """Where exp would overflow, gates are 0 or 1 and nothing is NaN."""
    tensors = make_tensors(replace(DEFAULT, steps=4)).to(FORMATS[name])
    tensors = replace(tensors, input=tensors.input * 1e3)
    with number_format(name) as backend:
        actual = run(DEFAULT, tensors, backend, training=False)
    expected = run(DEFAULT, tensors, "reference", training=False)
    for key, value in actual.items():
        torch.testing.assert_close(value, expected[key], rtol=0.02, atol=0.02, msg=key)


def test_weights_in_tf32_stay_nan() -> None:
    weight = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).view(torch.float32)  # a GPU's, a CPU's
    assert round_to_tf32(weight).isnan().all()


def test_step_zero_may_lie_below_address_zero() -> None:
    frames, first = torch.zeros(2, 1, 1, 1, 8), 2**58
    block = gather(load(), frames, (1, 1), (0, 0), (1, 1), (1, 1), first)
    assert (block.frames + first * block.step_stride) % 2**64 == frames.data_ptr()


@pytest.mark.parametrize(
    ("case", "dtype", "reason"),
    [
        (replace(DEFAULT, padding_mode="reflect"), torch.float32, "padding_mode 'reflect'"),
        (replace(DEFAULT, groups=2, in_channels=4, hidden_channels=4), torch.float32, "groups 2"),
        (replace(DEFAULT, peephole="pixel"), torch.float32, "peephole per pixel"),
        (DEFAULT, torch.float64, "float64"),
    ],
)
def test_refusals(case: Case, dtype: torch.dtype, reason: str) -> None:
    with host_backend() as backend, pytest.raises(BackendError, match=reason):
        run(case, make_tensors(case).to(dtype), backend)


def test_a_device_that_cannot_run_the_extension_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_code(*_: object) -> int:
        raise RuntimeError("no kernel image is available")

    module = type("Module", (), {"shared_bytes_per_block": no_code, "architectures": "host"})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(CudaBackend, "_module", module)
    assert CudaBackend()._refuse_device(torch.device("cuda", 0)) == (
        "the extension, built for host, cannot run on the device (no kernel image is available)"
    )


@pytest.mark.parametrize("requested", [None, "cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("cell", ["conv_lstm2d", "pooled_gate_conv_lstm2d"])
def test_torch_compile_traces_the_choice_on_a_gpu(
    cell: str, dtype: torch.dtype, requested: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: with the extension loaded, and torch.cuda answering without a device."""
    triton_backend = pytest.importorskip("fused_convlstm.backends.triton.backend")
    properties = type("Properties", (), {"major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "_get_device_properties", lambda _: properties, raising=False)
    monkeypatch.setattr(cuda_backend, "_load", load)
    # With is_available patched, torch.compile itself would look for the device.
    monkeypatch.setattr(
        CudaBackend, "unavailable", lambda self: self._module if isinstance(self._module, str) else None
    )
    monkeypatch.setattr(triton_backend.TritonBackend, "unavailable", lambda _: None)
    monkeypatch.setattr(
        triton_backend.TritonBackend, "_too_old", lambda _, device: triton_backend.capability(device) < 80
    )
    call = Call(
        cell=cell,
        device=torch.device("cuda", 0),
        dtype=dtype,
        steps=2,
        batch=2,
        in_channels=8,
        hidden_channels=64,
        input_size=(8, 8),
        state_size=(8, 8),
        kernel_size=(3, 3),
        recurrent_kernel_size=(3, 3),
        options=ConvLSTMOptions(),
    )
    numbers = {"triton": 1, "cuda": 2}

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + numbers[registry.choose(call, requested)]

    torch._dynamo.reset()  # it takes each parameter of this test for one more recompilation of the same function
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch.compile warns where it traces through a cache
        number = torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1))
    assert number == numbers[registry.choose(call, requested)]


def test_the_driver_is_asked_once_about_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    module = type("Module", (), {"shared_bytes_per_block": lambda index: asked.append(index) or 227 * 1024})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(CudaBackend, "_module", module)
    for index in (0, 1, 0, 1):
        assert CudaBackend()._refuse_device(torch.device("cuda", index)) is None
    assert asked == [0, 1]
