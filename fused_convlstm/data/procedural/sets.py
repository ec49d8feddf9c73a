"""What the generated sets share: folders, parts, rendering in parallel, going on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import av
from tqdm import tqdm  # type: ignore[import-untyped]

from ..files import PrepareError, is_vacant, locked, remove_unfinished, write_json
from ..parallel import resolve_workers, run_jobs

Job = TypeVar("Job")


@dataclass(frozen=True)
class PlannedClip:
    """A clip to render: its class, its number within the class, and its file."""

    label: str
    number: int
    video: Path


def make_set(
    out_dir: str | Path,
    arguments: dict[str, object],
    labels: Sequence[str],
    clips_per_class: int,
    make_jobs: Callable[[list[PlannedClip]], list[Job]],
    render: Callable[[Job], int],
    workers: int | None,
    progress: bool,
) -> Path:
    """Render the clips ``LABEL/{train,val,test}/LABEL_00001.mp4`` that are not there yet.

    Args:
        out_dir: folder, made if needed.
        arguments: what decides the set; a folder with a set of other arguments is refused.
        labels: the classes.
        clips_per_class: clips of each; the first two thirds are train, then a sixth each val and test.
        make_jobs: groups the missing clips.
        render: renders one job, writing a clip's video last; returns how many clips it made.
        workers: processes.
        progress: show a progress bar.

    Returns:
        The folder.

    Raises:
        ValueError: the folder has another set, or other files, or another process is writing to it.
        PrepareError: no space left or no right to write.
    """
    folder = Path(out_dir)
    processes = resolve_workers(workers)
    try:
        with locked(folder):
            _claim_folder(folder, arguments)
            planned = [
                PlannedClip(
                    label, number, folder / label / _part(number, clips_per_class) / f"{label}_{number + 1:05d}.mp4"
                )
                for label, number in product(labels, range(clips_per_class))
            ]
            missing = [clip for clip in planned if not clip.video.is_file()]
            there = len(planned) - len(missing)
            with tqdm(total=len(planned), initial=there, unit="clip", desc="render", disable=not progress) as bar:
                for made in run_jobs(render, make_jobs(missing), processes):
                    bar.update(made)
    except (OSError, av.FFmpegError, BrokenProcessPool) as error:
        raise PrepareError(
            f"cannot write in {str(folder)!r}: {error}; the same call continues with the rest"
        ) from error
    return folder


def check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")


def _part(number: int, total: int) -> str:
    return "train" if 3 * number < 2 * total else "val" if 6 * number < 5 * total else "test"


def _claim_folder(folder: Path, arguments: dict[str, object]) -> None:
    """Write the arguments of a set into its folder, or check that they are those of the set already there."""
    description = folder / "procedural.json"
    if description.is_file():
        stored = json.loads(description.read_text(encoding="utf-8"))
        if stored != json.loads(json.dumps(arguments)):
            raise ValueError(
                f"out_dir: {str(folder)!r} has a set made with {stored}, not {arguments}; use another folder"
            )
    elif not is_vacant(folder):
        raise ValueError(f"out_dir: expected an empty or a new folder, got {str(folder)!r} with other files")
    else:
        write_json(description, arguments)
    remove_unfinished(folder)
