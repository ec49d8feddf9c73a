"""Configurations as dataclasses: read from dictionaries with every key checked, and files written in one piece."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def unknown_name(name: str, choices: Iterable[str]) -> str:
    """The text of an error about ``name``: the nearest choice, and all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"unknown {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (choices: {', '.join(choices)})"


def from_dictionary(cls: type[T], values: Any, where: str) -> T:
    """``cls``, a dataclass, from a dictionary as YAML or JSON gives it; dataclasses in its fields likewise.

    Raises:
        ValueError: naming the key (``where`` is the path to it, empty at the top), what was expected and what came.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of keys to values, got {values!r}")
    at = f"{where}: " if where else ""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            raise ValueError(f"{at}{unknown_name(str(key), fields)}")
        arguments[key] = _convert(value, hints[key], f"{where}.{key}" if where else str(key))
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in arguments]:
        raise ValueError(f"{at}missing {', '.join(map(repr, missing))}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}.{error}" if where else str(error)) from None


def _convert(value: Any, expected: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (a for a in arguments if a is not type(None))
        return _convert(value, inner, where)
    if dataclasses.is_dataclass(expected):
        return from_dictionary(typing.cast(type, expected), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, got {value!r}")
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_convert(v, arguments[0], f"{where}[{k}]") for k, v in enumerate(value))
        if len(value) != len(arguments):
            raise ValueError(f"{where}: expected {len(arguments)} values, got {value!r}")
        return tuple(_convert(v, a, f"{where}[{k}]") for k, (v, a) in enumerate(zip(value, arguments, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a mapping of keys to values, got {value!r}")
        return {str(k): _convert(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):  # YAML reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where}: expected {expected.__name__}, got {value!r}")
    return value


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; once written, it takes the place of ``path`` in one step.

    If the block raises, or the process dies, what stood at ``path`` still stands there, and no half file is left where
    a reader would look. An OSError of the block that names no file, such as of a full disk, names ``path``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes from ``folder`` what processes that were killed had begun to write in :func:`atomic_path`."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)
