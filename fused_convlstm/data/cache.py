"""The cache on disk.

    cache.json            the parameters that the clips were prepared with
    clips/SPLIT/NAME.npz  frames uint8 (T, C, H, W), the word times, and boxes if there are any, compressed; and a
                          digest of what they were made from
    index.json            all clips, written when a run of prepare is through, gone while one makes clips

Files appear under their names only when complete (written beside, then renamed), so a kill leaves no half-written clip.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import complete_file, write_json
from .video import Frames

FORMAT = 1
_DAMAGED = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)  # what reading a clip may raise

Words = tuple[tuple[str, int, int], ...]
Boxes = npt.NDArray[np.float32]  # (T, 4): x, y of the top left corner, width, height in pixels of the cached frames


@dataclass(frozen=True)
class Record:
    """One clip in the index."""

    split: str
    name: str
    text: str
    label: str | None
    num_frames: int


def clip_path(cache_dir: Path, split: str, name: str) -> Path:
    return cache_dir / "clips" / split / f"{name}.npz"


def write_clip(path: Path, frames: Frames, words: Words, boxes: Boxes | None = None, source: str = "") -> None:
    """``frames`` uint8 (T, C, H, W); ``source``: a digest of what the clip is made from."""
    optional = {} if boxes is None else {"boxes": boxes}
    names = np.array([word for word, _, _ in words], dtype=np.str_)
    times = np.array([(start, end) for _, start, end in words], dtype=np.int64).reshape(-1, 2)
    with complete_file(path) as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, frames=frames, words=names, times=times, source=np.array(source), **optional)  # type: ignore[arg-type]


def read_clip(cache_dir: Path, record: Record) -> tuple[Frames, Words, Boxes | None]:
    path = clip_path(cache_dir, record.split, record.name)
    try:
        with np.load(path, allow_pickle=False) as stored:
            words = tuple(
                (str(word), int(start), int(end))
                for word, (start, end) in zip(stored["words"], stored["times"], strict=True)
            )
            return stored["frames"], words, stored["boxes"] if "boxes" in stored.files else None
    except _DAMAGED as error:
        raise ValueError(
            f"cache_dir: the clip {str(path)!r} cannot be read ({error}); delete it and prepare again"
        ) from error


def stored_clip(path: Path) -> tuple[int, str] | None:
    """Frames and source of a clip file, without reading the frames; None where it is damaged or knows no source."""
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open("frames.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, _ = np.lib.format.read_array_header_1_0(file)
            with archive.open("source.npy") as file:
                return int(shape[0]), str(np.lib.format.read_array(file))
    except _DAMAGED:
        return None


def write_index(cache_dir: Path, records: list[Record]) -> None:
    write_json(cache_dir / "index.json", [asdict(record) for record in records])


def remove_index(cache_dir: Path) -> None:
    (cache_dir / "index.json").unlink(missing_ok=True)


def read_index(cache_dir: Path) -> list[Record]:
    """The clips of a complete cache.

    Raises:
        ValueError: no cache, an unfinished or a damaged one, or one of another format.
    """
    if read_parameters(cache_dir) is None:
        raise ValueError(f"cache_dir: expected a folder made by prepare, got {str(cache_dir)!r}")
    path = cache_dir / "index.json"
    if not path.is_file():
        raise ValueError(f"cache_dir: preparing {str(cache_dir)!r} was not finished; run the same prepare again")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, list):
            raise ValueError("expected a list of clips")
        return [Record(**record) for record in stored]
    except (ValueError, TypeError) as error:
        raise ValueError(f"cache_dir: {str(path)!r} is damaged ({error}); run the same prepare again") from error


def read_parameters(cache_dir: Path) -> dict[str, Any] | None:
    """The parameters of a cache; None where there is none."""
    path = cache_dir / "cache.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, parameters = stored["format"], stored["parameters"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"cache_dir: {str(path)!r} is not a cache description ({error}); remove the folder and prepare anew"
        ) from error
    if found != FORMAT:
        raise ValueError(f"cache_dir: {str(cache_dir)!r} has format {found}, this version reads {FORMAT}; prepare anew")
    if not isinstance(parameters, dict):
        raise ValueError(f"cache_dir: {str(path)!r} is not a cache description")
    return parameters


def write_parameters(cache_dir: Path, parameters: dict[str, Any]) -> None:
    write_json(cache_dir / "cache.json", {"format": FORMAT, "parameters": parameters})
