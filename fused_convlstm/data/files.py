"""Files that are complete or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNFINISHED = ".unfinished"


class PrepareError(Exception):
    """Writing cannot go on: what is done is kept, and the same call continues."""


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A path to write to: it becomes ``path`` at the end of the block, or goes away if the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    with complete_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def is_vacant(folder: Path) -> bool:
    """No folder, an empty one, or one with nothing but what a killed run was writing."""
    return not folder.is_dir() or all(path.name.endswith(_UNFINISHED) for path in folder.iterdir())


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs were writing below a folder."""
    for path in folder.rglob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
