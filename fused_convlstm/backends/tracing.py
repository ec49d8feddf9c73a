"""The choice of a backend under torch.compile, which traces it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Marks a function that asks what cannot be traced (an extension, the driver, a setting of PyTorch): torch.compile
    calls it once, with constant arguments, and keeps the answer. It looks through ``functools.cache``, so a cache has
    to be on another function within."""
    return cast(Function, torch.compiler.assume_constant_result(function))
