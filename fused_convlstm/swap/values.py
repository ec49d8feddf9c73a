"""Arguments and results of foreign modules: tensors in whatever containers they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors in nested sequences, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value] if value.dtype.is_floating_point else []
    return [tensor for _, one in _items(value) for tensor in tensors_in(one)]


def same_structure(expected: Any, actual: Any) -> bool:
    """Whether both are the same but for the numbers in their floating-point tensors."""
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, Tensor):
        if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
            return False
        return expected.dtype.is_floating_point or bool((expected == actual).all())
    if expected is None or isinstance(expected, (bool, int, float, str)):
        return bool(expected == actual)
    a, b = _items(expected), _items(actual)
    return [name for name, _ in a] == [name for name, _ in b] and all(
        same_structure(one, other) for (_, one), (_, other) in zip(a, b, strict=True)
    )


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` of each tensor in its place. Containers but dict, list and tuple stay as they are."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {name: map_tensors(function, one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [map_tensors(function, one) for one in value]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    return value


def _items(value: Any) -> list[tuple[Any, Any]]:
    """The names and values in a container; none if ``value`` is no container."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(one.name, getattr(value, one.name)) for one in fields(value)]
    return []
