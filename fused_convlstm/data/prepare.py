"""Decode, crop and cache a dataset."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from .cache import (
    Boxes,
    Record,
    Words,
    clip_path,
    read_parameters,
    remove_index,
    stored_clip,
    write_clip,
    write_index,
    write_parameters,
)
from .crops import Crop, MouthCrop, NoFaceError, WholeFrame, centre_square
from .files import PrepareError, is_vacant, locked, remove_unfinished
from .flow import check_flow, optical_flow
from .items import Item, Problem, Reader, unreadable
from .parallel import resolve_workers, run_jobs
from .video import Frames, VideoError, read_pictures, read_video

LRW_FPS = 25.0


@dataclass
class PrepareReport:
    """What came of a run.

    Args:
        done: clips in the cache, those of earlier runs included.
        skipped: name and reason of each clip left out.
        resampled: videos that had another frame rate and were resampled.
    """

    done: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    resampled: int = 0


@dataclass
class _Job:
    """The clips of one video, each with the digest of what it is made from."""

    items: list[tuple[Item, str]]
    cache_dir: Path
    crop: Crop
    rgb: bool
    flow: str | None
    fps: float
    min_frames: int


@dataclass
class _Outcome:
    records: list[Record] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    resampled: int = 0


def prepare(
    reader: Reader,
    cache_dir: str | Path,
    *,
    crop: Crop | None = None,
    rgb: bool = False,
    flow: str | None = None,
    fps: float = 25.0,
    min_frames: int = 5,
    workers: int | None = None,
    progress: bool = True,
) -> PrepareReport:
    """Decode every clip of a dataset, crop it, and write it to a cache that :class:`ClipDataset` reads.

    A clip that cannot be used (no text, damaged, no face, too short) is skipped and listed in the report. A run that
    was killed is continued by the same call; clips already there are not made again, unless their video, their boxes,
    or the part and the words of it have changed since.

    Args:
        reader: the dataset, such as ``LRW("lrw/lipread_mp4")``.
        cache_dir: folder of the cache, made if needed.
        crop: what to keep of a frame; default :class:`MouthCrop`.
        rgb: three channels in place of grey.
        flow: ``"dis"`` or ``"farneback"``: add two channels of optical flow, of the cropped pictures.
        fps: frame rate of the cache; videos of another rate are resampled (the frame shown at each time is taken), and
            counted in the report; folders of pictures are taken as they are.
        min_frames: shorter clips are skipped.
        workers: processes; default one per core; 0: in this process.
        progress: show a progress bar with clips per second and the time left.

    Raises:
        ValueError: the cache was made with other parameters, another process is preparing it, the reader finds
            nothing, or two clips have one name.
        PrepareError: no space left or no right to write in ``cache_dir``, or a worker process died.
    """
    crop = MouthCrop() if crop is None else crop
    processes = resolve_workers(workers)
    if fps <= 0:
        raise ValueError(f"fps: expected more than 0, got {fps}")
    if min_frames < 1:
        raise ValueError(f"min_frames: expected 1 or more, got {min_frames}")
    check_flow(flow)
    cache = Path(cache_dir)
    found = [_nameable(entry) for entry in reader]
    items = [item for item in found if isinstance(item, Item)]
    report = PrepareReport(
        skipped=[(problem.name, problem.reason) for problem in found if isinstance(problem, Problem)]
    )
    if not found:
        raise ValueError(f"reader: no clips in {str(reader.root)!r} with the layout of {type(reader).__name__}")
    _check_names(items)
    records: list[Record] = []
    try:
        with locked(cache):
            _check_parameters(cache, _parameters(reader, crop, rgb, flow, fps, min_frames))
            remove_unfinished(cache)
            missing = []
            for item in items:
                try:
                    source = _source(item)
                except OSError as error:
                    report.skipped.append((item.name, unreadable(item.video, error)))
                    continue
                stored = stored_clip(clip_path(cache, item.split, item.name))
                if stored is None or stored[1] != source:
                    missing.append((item, source))
                else:
                    records.append(Record(item.split, item.name, item.text, item.label, stored[0]))
            if missing:
                remove_index(cache)  # it may be wrong about clips that are made again
            jobs = (
                _Job(list(group), cache, crop, rgb, flow, fps, min_frames)
                for _, group in groupby(missing, key=lambda entry: entry[0].video)
            )
            there = len(items) - len(missing)
            bar = tqdm(total=len(items), initial=there, unit="clip", desc="prepare", disable=not progress)
            with bar:
                for outcome in run_jobs(_prepare_video, jobs, processes):
                    records += outcome.records
                    report.skipped += outcome.skipped
                    report.resampled += outcome.resampled
                    bar.update(len(outcome.records) + len(outcome.skipped))
            order = {(item.split, item.name): position for position, item in enumerate(items)}
            write_index(cache, sorted(records, key=lambda record: order[record.split, record.name]))
    except OSError as error:
        raise PrepareError(
            f"cannot write in {str(cache)!r}: {error.strerror or error}; "
            f"{len(records)} of {len(items)} clips are prepared, the same call continues with the rest"
        ) from error
    except BrokenProcessPool as error:
        raise PrepareError(
            f"a worker process died, out of memory perhaps; {len(records)} of {len(items)} clips are prepared, "
            "the same call continues with the rest (fewer workers need less memory)"
        ) from error
    report.done = len(records)
    return report


def load_frames(
    path: str | Path, crop: Crop | None = None, *, rgb: bool = False, flow: str | None = None, fps: float = 25.0
) -> Frames:
    """One video file as ``prepare`` would cache it: uint8 (T, C, H, W), to predict on.

    Raises:
        VideoError: the file cannot be decoded.
        NoFaceError: the default crop finds no face.
    """
    frames, _ = read_video(path, fps, rgb=rgb)
    return _channels_first((MouthCrop() if crop is None else crop)(frames), flow)


def _channels_first(frames: Frames, flow: str | None) -> Frames:
    """(T, H, W, C) to (T, C, H, W), with two channels of optical flow added on request."""
    if flow is not None:
        frames = np.concatenate([frames, optical_flow(frames, flow)], axis=-1)
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2))


def _parameters(reader: Reader, crop: Crop, rgb: bool, flow: str | None, fps: float, min_frames: int) -> dict[str, Any]:
    """What decides the contents of a cache, as JSON gives it back."""
    chosen = {entry.name: getattr(reader, entry.name) for entry in fields(reader) if entry.name != "root"}  # type: ignore[arg-type]
    return dict(
        json.loads(
            json.dumps(
                {
                    "reader": {"type": type(reader).__name__, **chosen},
                    "crop": {"type": type(crop).__name__, **asdict(crop)},  # type: ignore[call-overload]
                    "rgb": rgb,
                    **({} if flow is None else {"flow": flow}),
                    "fps": float(fps),
                    "min_frames": min_frames,
                }
            )
        )
    )


def _check_parameters(cache: Path, wanted: dict[str, Any]) -> None:
    stored = read_parameters(cache)
    if stored is None:
        if not is_vacant(cache):
            raise ValueError(f"cache_dir: expected a cache or an empty folder, got {str(cache)!r} with other files")
        write_parameters(cache, wanted)
    elif stored != wanted:
        differing = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
        changes = "; ".join(f"{key} was {stored.get(key)}, now {wanted.get(key)}" for key in differing)
        raise ValueError(f"cache_dir: {str(cache)!r} was prepared with other parameters: {changes}. Use another folder")


def _nameable(entry: Item | Problem) -> Item | Problem:
    """A name that is no text cannot stand in the index: names of files may be any bytes."""
    if isinstance(entry, Item):
        try:
            "".join((entry.name, entry.split, entry.text, entry.label or "")).encode()
        except UnicodeEncodeError:
            return Problem(entry.name, "its name is not UTF-8")
    return entry


def _source(item: Item) -> str:
    """A digest of what a clip is made from, beside the parameters of the cache.

    Raises:
        OSError: the video or the boxes cannot be looked at.
    """
    files = [path.stat() for path in (item.video, item.boxes) if path is not None]
    words = [(word.text, word.start, word.end) for word in item.words]
    made_from = [(file.st_size, file.st_mtime_ns) for file in files], item.span, item.num_frames, words, item.cropped
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]


def _check_names(items: list[Item]) -> None:
    seen = set()
    for item in items:
        if (item.split, item.name) in seen:
            raise ValueError(f"reader: two clips are named {item.name!r} in {item.split!r} (a video in two formats?)")
        seen.add((item.split, item.name))


def _prepare_video(job: _Job) -> _Outcome:
    """Decode one video and write its clips.

    The whole video is cropped, then cut: what a clip looks like does not depend on which others are made with it.
    """
    outcome = _Outcome()
    video, already_crops = job.items[0][0].video, job.items[0][0].cropped
    try:
        if already_crops:
            frames, rate = _read_npz(video)
        elif video.is_dir():
            frames, rate = read_pictures(video, rgb=job.rgb), job.fps
        else:
            frames, rate = read_video(video, job.fps, rgb=job.rgb)
        if len(frames) < job.min_frames:
            raise VideoError(f"too short: {_frames(len(frames))}, at least {job.min_frames} are wanted")
        boxes = _read_boxes(job, frames)
        if already_crops and isinstance(job.crop, MouthCrop):
            frames = centre_square(frames, job.crop.size)
        else:
            frames = job.crop(frames)
        clips = _channels_first(frames, job.flow)
    except (VideoError, NoFaceError) as error:
        outcome.skipped = [(item.name, str(error)) for item, _ in job.items]
        return outcome
    except OSError as error:
        outcome.skipped = [(item.name, unreadable(video, error)) for item, _ in job.items]
        return outcome
    outcome.resampled = int(abs(rate - job.fps) > 1e-3 * job.fps)
    for item, source in job.items:
        try:
            first, end = _frame_range(item, len(clips), job)
        except VideoError as error:
            outcome.skipped.append((item.name, str(error)))
            continue
        path = clip_path(job.cache_dir, item.split, item.name)
        places = None if boxes is None else boxes[first:end]
        write_clip(path, clips[first:end], _word_frames(item, first, end, job.fps), places, source)
        outcome.records.append(Record(item.split, item.name, item.text, item.label, end - first))
    return outcome


def _read_npz(path: Path) -> tuple[Frames, float]:
    """Grey crops of the preprocessed LRW as (T, H, W, 1)."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            frames = stored["data"]
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise VideoError(f"cannot be read as .npz with key 'data': {error}") from error
    if frames.ndim != 3 or frames.dtype != np.uint8 or not len(frames):
        raise VideoError(f"expected 'data' uint8 (T, H, W), got {frames.dtype} {frames.shape}")
    return frames[..., None], LRW_FPS


def _read_boxes(job: _Job, frames: Frames) -> Boxes | None:
    """The boxes of the whole video in pixels of the cached frames; only for a crop that keeps the whole picture."""
    path = job.items[0][0].boxes
    if path is None or not isinstance(job.crop, WholeFrame):
        return None
    try:
        boxes = np.loadtxt(path, dtype=np.float32, ndmin=2)
    except OSError as error:
        raise VideoError(unreadable(path, error)) from error
    except ValueError as error:
        raise VideoError(f"{path.name}: expected lines 'X Y WIDTH HEIGHT': {error}") from error
    if boxes.shape != (len(frames), 4):
        raise VideoError(f"{path.name}: expected 4 numbers for each of {len(frames)} frames, got {boxes.shape}")
    scale = np.array([job.crop.width / frames.shape[2], job.crop.height / frames.shape[1]], dtype=np.float32)
    return np.asarray(boxes * np.tile(scale, 2), dtype=np.float32)


def _frame_range(item: Item, available: int, job: _Job) -> tuple[int, int]:
    """First frame of a clip and the one after its last."""
    start, stop = item.span if item.span is not None else (0.0, available / job.fps)
    first, end = round(start * job.fps), round(stop * job.fps)
    if first >= available or end > available + 1:  # a time may be rounded up past the last frame
        raise VideoError(f"frames {first} to {end} are wanted, the video has {available}")
    if item.num_frames is not None:
        if available < item.num_frames:
            raise VideoError(f"{item.num_frames} frames are wanted, the video has {available}")
        first = round((start + stop) / 2 * job.fps - item.num_frames / 2)
        first = min(max(0, first), available - item.num_frames)
        end = first + item.num_frames
    end = min(end, available)
    if end - first < job.min_frames:
        raise VideoError(f"too short: {_frames(end - first)}, at least {job.min_frames} are wanted")
    return first, end


def _frames(count: int) -> str:
    return "1 frame" if count == 1 else f"{count} frames"


def _word_frames(item: Item, first: int, end: int, fps: float) -> Words:
    """The words' frames within the clip: first and the one after the last, at least one each."""
    words = []
    for word in item.words:
        start = min(max(0, round(word.start * fps) - first), end - first - 1)
        stop = min(max(start + 1, round(word.end * fps) - first), end - first)
        words.append((word.text, start, stop))
    return tuple(words)
