"""The pooled-gate cell's CUDA kernels, executed on the host, against the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, case_id, make_tensors, ordinary, run
from cuda_host import FORMATS, SCHEDULES, check_format, host_backend, load, number_format, vary_schedule
from kernel_checks import check_against_reference, check_kept_cells, check_repeatable

from fused_convlstm.backends import BackendError
from fused_convlstm.backends.cuda import pooled_gate

CELL = "pooled_gate_conv_lstm2d"
DEFAULT = Case(cell=CELL)
CASES = [case for case in ordinary(CELL) if case.padding_mode == "zeros"]

vary_schedule = pytest.fixture(autouse=True)(vary_schedule)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_training(case: Case, name: str) -> None:
    with number_format(name) as backend:
        check_format(case, backend, name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_inference(case: Case, name: str) -> None:
    with number_format(name) as backend:
        check_format(case, backend, name, training=False)


# More than one tile of pixels, so more than one block to an image, and more than one tile of channels.
GROUPS = [
    replace(DEFAULT, size=(13, 11), hidden_channels=9, batch=3, layout="channels_last"),
    replace(DEFAULT, size=(13, 11), hidden_channels=70, steps=2, recurrent_kernel_size=(5, 3)),
    replace(DEFAULT, size=(13, 11), hidden_channels=8, steps=5, batch=4, lengths=True, reset=True, reverse=True),
    replace(DEFAULT, size=(17, 9), hidden_channels=7, steps=4, lengths=True, reset=True, recompute_gates=True),
]
# Flags, one group for all images; flags, two tiles a block; clusters.
DEVICES = [
    {"compute_capability": 80, "resident_blocks": 4},
    {"compute_capability": 80, "resident_blocks": 2},
    {"compute_capability": 80, "resident_blocks": 1},
    {"compute_capability": 90, "resident_blocks": 8},
]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("case", GROUPS, ids=case_id)
def test_groups_of_blocks(case: Case, device: dict[str, int], name: str) -> None:
    load().set_device(**device)
    with number_format(name) as backend:
        check_format(case, backend, name)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_same_bits_under_every_schedule(device: dict[str, int]) -> None:
    case = GROUPS[2]
    tensors = make_tensors(case).to(torch.float32)
    load().set_device(**device)
    results = []
    with host_backend() as backend:
        for schedule in SCHEDULES:
            load().set_schedule(*schedule)
            results.append(run(case, tensors, backend))
    for result in results[1:]:
        for key, value in result.items():
            torch.testing.assert_close(value, results[0][key], rtol=0, atol=0, equal_nan=True, msg=key)


@pytest.mark.parametrize("name", FORMATS)
def test_repeatable(name: str) -> None:
    with number_format(name) as backend:
        check_repeatable(GROUPS[0], backend, FORMATS[name])


@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_kept_cells(name: str, channels: int) -> None:
    with number_format(name) as backend:
        check_kept_cells(replace(DEFAULT, steps=4, hidden_channels=channels, reset=True), backend, FORMATS[name])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_time_chunks(recompute: bool, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_gate, "chunk_steps", lambda *_: 2)
    case = replace(DEFAULT, steps=5, recompute_gates=recompute, reverse=reverse, lengths=True, reset=True)
    with host_backend() as backend:
        check_against_reference(case, backend, torch.float32)


def test_too_many_channels_are_refused() -> None:
    case = replace(DEFAULT, hidden_channels=1024, steps=1, batch=1, size=(1, 1))
    with host_backend() as backend, pytest.raises(BackendError, match=r"1024 channels need \d+ bytes of shared memory"):
        run(case, make_tensors(case).to(torch.float32), backend)
