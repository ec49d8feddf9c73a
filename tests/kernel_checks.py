"""The checks that every backend's kernels pass, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cases import Case, make_tensors, run
from tolerances import assert_within_error_bar


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, ``torch.empty`` is full of NaN: an element that a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_against_reference(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    training: bool = True,
    precision: torch.dtype | None = None,
) -> None:
    """The kernel's results against the float64 reference, by the error-bar rule; ``precision`` is that of the products
    if it is not that of the tensors."""
    tensors = make_tensors(case)
    exact = run(case, tensors, "reference", training)
    plain = run(case, tensors.to(dtype, device), "reference", training)
    with poisoned_memory():
        actual = run(case, tensors.to(dtype, device), backend, training)
    assert_within_error_bar(actual, plain, exact, precision or dtype)


def check_repeatable(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Two runs give the same bits."""
    tensors = make_tensors(case).to(dtype, device)
    first, second = run(case, tensors, backend), run(case, tensors, backend)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=name)
