"""What the interpreted test files of both cells share."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import Case, make_tensors, run
from kernel_checks import check_against_reference, poisoned_memory
from tolerances import assert_within_error_bar

from fused_convlstm.backends import BackendError, frames

REFUSED_MODES = ("replicate", "reflect")  # with gradients


def check(case: Case, dtype: torch.dtype, training: bool = True) -> None:
    """Kernel against reference; or, for what the backend declares it cannot serve, that it says so."""
    if training and case.padding_mode in REFUSED_MODES:
        with pytest.raises(BackendError, match="padding_mode"):
            run(case, make_tensors(case).to(dtype), "triton", training)
        training = False
    check_against_reference(case, "triton", dtype, training=training)


@contextmanager
def single_step_chunks() -> Iterator[None]:
    """Within the block, every time chunk is one step."""
    before, frames.CHUNK_BYTES = frames.CHUNK_BYTES, 1
    try:
        yield
    finally:
        frames.CHUNK_BYTES = before


def check_recomputation_is_exact(case: Case) -> None:
    """Gates that are computed again are the gates that would have been kept."""
    tensors = make_tensors(case).to(torch.float16)
    kept, again = (run(dataclasses.replace(case, recompute_gates=r), tensors, "triton") for r in (False, True))
    for name in kept:
        torch.testing.assert_close(again[name], kept[name], rtol=0, atol=0, msg=name)


def check_chunks_equal_whole(case: Case) -> None:
    """A sequence in two calls, the state carried between them, gives the bits of one call."""
    tensors = make_tensors(case).to(torch.float16)
    whole = run(case, tensors, "triton", training=False)
    split = case.steps // 2
    outputs, hx = [], tensors.hx
    for part in (slice(0, split), slice(split, None)):
        frames = tensors.input[part]
        results = run(
            dataclasses.replace(case, steps=frames.shape[0]),
            dataclasses.replace(tensors, input=frames, hx=hx),
            "triton",
            training=False,
        )
        outputs.append(results["output"])
        hx = (results["h_n"], results["c_n"])
    assert torch.equal(torch.cat(outputs), whole["output"])
    assert torch.equal(hx[0], whole["h_n"])
    assert torch.equal(hx[1], whole["c_n"])


def check_in_single_step_chunks(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """As :func:`check`, every time chunk being one step."""
    tensors = make_tensors(case)
    exact, plain = run(case, tensors, "reference"), run(case, tensors.to(dtype), "reference")
    with single_step_chunks(), poisoned_memory():
        actual = run(case, tensors.to(dtype), "triton")
    assert_within_error_bar(actual, plain, exact, dtype)
