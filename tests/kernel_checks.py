"""The checks that every backend's kernels pass, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from cases import Case, make_tensors, run
from tolerances import FACTOR, assert_within_error_bar


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
    factor: float = FACTOR,
) -> None:
    """The kernel's results against the float64 reference, by the error-bar rule; ``precision`` is that of the products
    if it is not that of the tensors, ``factor`` what is allowed beside plain PyTorch's error."""
    tensors = make_tensors(case)
    exact = run(case, tensors.to(torch.float64, device), "reference", training)  # on a CPU, large cases take minutes
    plain = run(case, tensors.to(dtype, device), "reference", training)
    with poisoned_memory():
        actual = run(case, tensors.to(dtype, device), backend, training)
    assert_within_error_bar(actual, plain, exact, precision or dtype, factor)


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")


def check_repeatable(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Two runs give the same bits."""
    tensors = make_tensors(case).to(dtype, device)
    assert_same_bits(run(case, tensors, backend), run(case, tensors, backend))


def check_kept_cells(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """What a training call keeps of c after each step is the state there, rounded to the type of the input but for
    peepholes; the state itself is not rounded. Not for reversed sequences."""
    tensors = make_tensors(case).to(dtype, device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        c_n = run(case, tensors, backend)["c_n"]
    cells = kept[-1]  # (T, B, Ho, Wo, C), the operator's last result; a backend may keep them in an order of its own
    assert cells.dtype == (c_n.dtype if case.peephole != "none" else dtype)
    for step in range(case.steps):  # sequences that end there
        ends = replace(tensors, lengths=torch.full((case.batch,), step + 1, device=device))
        c = run(case, ends, backend)["c_n"]
        assert torch.equal(c, c.to(dtype).to(c.dtype)) == (c.dtype == dtype)
        assert torch.equal(cells[step].flatten().sort()[0], c.to(cells.dtype).flatten().sort()[0])
    assert torch.equal(c, c_n)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_threads(case: Case, dtype: torch.dtype, counts: tuple[int, ...] = (2, 3, 7)) -> None:
    """On the CPU, any number of threads gives the same bits, forward and backward."""
    tensors = make_tensors(case).to(dtype)
    with threads(1):
        expected = run(case, tensors, "cpu")
    for count in counts:
        with threads(count):
            assert_same_bits(run(case, tensors, "cpu"), expected)


def check_batch(case: Case, dtype: torch.dtype) -> None:
    """On the CPU, a sample alone gives the bits that it gives among others."""
    tensors = make_tensors(case).to(dtype)
    together = run(case, tensors, "cpu", training=False)
    for b in range(case.batch):
        result = run(case, tensors.part(0, case.steps, slice(b, b + 1)), "cpu", training=False)
        expected = {name: x[:, b : b + 1] if name == "output" else x[b : b + 1] for name, x in together.items()}
        assert_same_bits(result, expected)


def check_chunks(case: Case, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    """On the CPU, chunks of ``sizes`` steps that hand on their state give the bits of the whole."""
    tensors = make_tensors(case).to(dtype)
    whole = run(case, tensors, "cpu", training=False)
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    outputs: dict[int, torch.Tensor] = {}
    hx = tensors.hx
    for begin, end in reversed(bounds) if case.reverse else bounds:
        chunk = run(case, tensors.part(begin, end, hx=hx), "cpu", training=False)
        outputs[begin] = chunk["output"]
        hx = (chunk["h_n"], chunk["c_n"])
    output = torch.cat([outputs[begin] for begin, _ in bounds])
    assert_same_bits({"output": output, "h_n": hx[0], "c_n": hx[1]}, whole)


def check_bits(case: Case, dtype: torch.dtype) -> None:
    """What holds of the bits of every call of the CPU kernels."""
    check_repeatable(case, "cpu", dtype)
    check_threads(case, dtype, (3,))
    check_batch(case, dtype)
    if case.steps > 1:
        check_chunks(case, dtype, (1, case.steps - 1))
