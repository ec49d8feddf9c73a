"""Files that are complete or not there, in folders that one process at a time writes to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_UNFINISHED = ".unfinished"
_LOCK = ".fused_convlstm.lock"


class PrepareError(Exception):
    """Writing cannot go on: what is done is kept, and the same call continues."""


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A path to write to: it becomes ``path`` at the end of the block, or goes away if the block fails.

    The block's end waits for the disk: after a power cut, ``path`` is complete, or what it was before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{_UNFINISHED}")
    try:
        yield unfinished
        with open(unfinished, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        with suppress(OSError):  # not every system syncs folders
            _sync_folder(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """For the block, this process is the only one in ``folder``, which is made if needed.

    The system ends the lock with the process, however that ends; forked processes do not have it. Where there are no
    such locks the block runs without.

    Raises:
        ValueError: another process has the lock.
    """
    if fcntl is None:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _LOCK
    while True:
        file = open(path, "a")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                raise ValueError(f"{folder}: another process is writing to this folder") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()  # whoever had the lock has just removed the file
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if made:
            with suppress(OSError):  # no longer empty
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    with complete_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False))


def is_vacant(folder: Path) -> bool:
    """No folder, an empty one, or one with nothing but a lock and what a killed run was writing."""
    return not folder.is_dir() or all(path.name.endswith((_UNFINISHED, _LOCK)) for path in folder.iterdir())


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs were writing below a folder."""
    for path in folder.rglob(f"*{_UNFINISHED}"):
        path.unlink(missing_ok=True)
