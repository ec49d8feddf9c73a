"""The cache on disk.

    cache.json            the parameters that the clips were prepared with
    clips/SPLIT/NAME.npz  frames uint8 (T, C, H, W), the word times, and boxes if there are any, compressed
    index.json            all clips, written when a run of prepare is through

Files appear under their names only when complete (written beside, then renamed), so a kill leaves no half-written clip.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .files import complete_file, write_json
from .video import Frames

FORMAT = 1

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


def write_clip(path: Path, frames: Frames, words: Words, boxes: Boxes | None = None) -> None:
    """``frames`` uint8 (T, C, H, W)."""
    optional = {} if boxes is None else {"boxes": boxes}
    names = np.array([word for word, _, _ in words], dtype=np.str_)
    times = np.array([(start, end) for _, start, end in words], dtype=np.int64).reshape(-1, 2)
    with complete_file(path) as unfinished, open(unfinished, "wb") as file:
        np.savez_compressed(file, frames=frames, words=names, times=times, **optional)  # type: ignore[arg-type]


def read_clip(cache_dir: Path, record: Record) -> tuple[Frames, Words, Boxes | None]:
    path = clip_path(cache_dir, record.split, record.name)
    try:
        with np.load(path, allow_pickle=False) as stored:
            words = tuple(
                (str(word), int(start), int(end))
                for word, (start, end) in zip(stored["words"], stored["times"], strict=True)
            )
            return stored["frames"], words, stored["boxes"] if "boxes" in stored.files else None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"cache_dir: the clip {str(path)!r} cannot be read ({error}); delete it and prepare again"
        ) from error


def stored_num_frames(path: Path) -> int | None:
    """Frames of a clip file from its header alone; None where the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("frames.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, _ = np.lib.format.read_array_header_1_0(file)
            return int(shape[0])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def write_index(cache_dir: Path, records: list[Record]) -> None:
    write_json(cache_dir / "index.json", [asdict(record) for record in records])


def read_index(cache_dir: Path) -> list[Record]:
    """The clips of a complete cache.

    Raises:
        ValueError: no cache, an unfinished one, or one of another format.
    """
    if read_parameters(cache_dir) is None:
        raise ValueError(f"cache_dir: expected a folder made by prepare, got {str(cache_dir)!r}")
    path = cache_dir / "index.json"
    if not path.is_file():
        raise ValueError(f"cache_dir: preparing {str(cache_dir)!r} was not finished; run the same prepare again")
    return [Record(**record) for record in json.loads(path.read_text(encoding="utf-8"))]


def read_parameters(cache_dir: Path) -> dict[str, Any] | None:
    """The parameters of a cache; None where there is none."""
    path = cache_dir / "cache.json"
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found, parameters = stored["format"], stored["parameters"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"cache_dir: {str(path)!r} is not a cache description ({error})") from error
    if found != FORMAT:
        raise ValueError(f"cache_dir: {str(cache_dir)!r} has format {found}, this version reads {FORMAT}; prepare anew")
    if not isinstance(parameters, dict):
        raise ValueError(f"cache_dir: {str(path)!r} is not a cache description")
    return parameters


def write_parameters(cache_dir: Path, parameters: dict[str, Any]) -> None:
    write_json(cache_dir / "cache.json", {"format": FORMAT, "parameters": parameters})
