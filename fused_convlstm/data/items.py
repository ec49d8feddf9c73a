"""What a reader yields: one item per clip to prepare. Nothing is decoded here."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

VIDEO_ENDINGS = (".mp4", ".mpg", ".mpeg", ".avi", ".mov", ".mkv", ".webm")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Word:
    """A spoken word and its time in the video, in seconds."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Item:
    """One clip of a video file.

    ``span`` is the part of the video in seconds, None for all of it. ``num_frames`` asks for a window of exactly that
    many frames centred on the span (shifted where it would leave the video) in place of the span itself. ``label`` is
    the class, None for a sentence. ``cropped`` says that the file holds mouth crops already.
    ``video`` may be a folder of pictures. ``boxes`` is a text file with the place of what matters in each frame of the
    video, lines ``X Y WIDTH HEIGHT`` in pixels from the top left.
    """

    name: str
    split: str
    video: Path
    text: str
    label: str | None = None
    span: tuple[float, float] | None = None
    num_frames: int | None = None
    words: tuple[Word, ...] = ()
    cropped: bool = False
    boxes: Path | None = None


@dataclass(frozen=True)
class Problem:
    """A clip that a reader found but cannot use; ``prepare`` lists it with the reason."""

    name: str
    reason: str


class Reader(Protocol):
    """A dataset on disk: a dataclass whose iterator yields its clips lazily, those of one video one after the other.

    Every field but ``root`` is a parameter that the cache remembers.
    """

    @property
    def root(self) -> Path: ...

    def __iter__(self) -> Iterator[Item | Problem]: ...


def split_by_name(name: str) -> str:
    """The split rule for data without official parts: crc32 of the name modulo 10; 0 to 7 train, 8 val, 9 test."""
    remainder = zlib.crc32(name.encode(errors="surrogateescape")) % 10
    return "train" if remainder < 8 else "val" if remainder == 8 else "test"


def unreadable(path: Path, error: OSError) -> str:
    """The reason of a problem."""
    return f"{path.name} cannot be read: {error.strerror or error}"


def existing_folder(root: str | Path, what: str) -> Path:
    path = Path(root)
    if not path.is_dir():
        raise ValueError(f"root: expected the folder of {what}, got {str(path)!r}, which is not a folder")
    return path


def subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def video_files(folder: Path, endings: tuple[str, ...] = VIDEO_ENDINGS) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
