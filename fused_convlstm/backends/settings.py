"""What blocks of code set for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)  # found again by identity
class _Entry(Generic[T]):
    value: T


class Settings(Generic[T]):
    """Values set by blocks; of those that have not ended, the one entered last holds.

    Blocks of several threads, or in generators, need not end in the order in which they began.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry[T]] = []

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        entry = _Entry(value)
        self._entries.append(entry)
        try:
            yield
        finally:
            self._entries.remove(entry)

    def current(self) -> T | None:
        """The value that holds, None outside all blocks."""
        return self._entries[-1].value if self._entries else None
