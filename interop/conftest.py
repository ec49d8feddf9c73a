"""Comparison with the real libraries: run by ``make test-interop`` in an environment of its own."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fused_convlstm.backends import registry

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Rounding of float64: sums of some hundred terms, in another order. Float32: likewise.
LIMIT = {"float64": 1e-12, "float32": 2e-5}
PACKAGES = ("torch", "keras", "jax", "flax", "tensorflow-cpu", "tf_keras", "dm-sonnet", "torchgeo", "snntorch", "numpy")

_errors: dict[tuple[str, str, str], tuple[int, float]] = {}  # (library, what, dtype) -> comparisons, largest error


class Comparison:
    """Compares arrays, and keeps the largest error for the report."""

    def __init__(self, library: str) -> None:
        self.library = library

    def __call__(self, what: str, actual: object, expected: object) -> None:
        a, e = np.asarray(actual), np.asarray(expected)
        assert a.shape == e.shape, f"{what}: shape {a.shape}, not {e.shape}"
        error = float(np.abs(a - e).max() / max(np.abs(e).max(), 1e-30)) if e.size else 0.0
        dtype = str(e.dtype)
        key = (self.library, what, dtype)
        count, largest = _errors.get(key, (0, 0.0))
        _errors[key] = (count + 1, max(largest, error))
        assert error <= LIMIT[dtype], f"{what}: error {error:.3g}"


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Comparison:
    return Comparison(request.module.LIBRARY)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="write the largest errors to this Markdown file")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path = session.config.getoption("--report")
    if path is not None and exitstatus == 0:
        path.write_text("\n".join(_report(session.testscollected)) + "\n")


def _report(tests: int) -> Iterator[str]:
    yield "# Compared with the real libraries"
    yield ""
    yield "Written by `make test-interop`; the suite is in `interop/`. Errors are the largest over all comparisons,"
    yield "each relative to the largest magnitude of its array; rounding is 2.2e-16 in float64 and 1.2e-7 in float32."
    yield "Keras 3 was told not to take tanh of float64 in float32, as it does on any backend but TensorFlow's."
    yield ""
    yield "| library | compared | precision | comparisons | largest error |"
    yield "| --- | --- | --- | ---: | ---: |"
    for (library, what, dtype), (count, error) in sorted(_errors.items()):
        yield f"| {library} | {what} | {dtype} | {count} | {error:.1e} |"
    yield ""
    backend = "reference" if registry.get("cpu").unavailable() else "cpu"
    yield f"{tests} tests passed on {datetime.date.today()}, Python {platform.python_version()}, {platform.machine()},"
    yield f"with {', '.join(_versions())}; the fused layers ran on the {backend} backend."


def _versions() -> Iterator[str]:
    for package in PACKAGES:
        try:
            yield f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
