"""A prepared cache as a PyTorch dataset, and batches of clips of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .cache import read_clip, read_index, read_parameters


@dataclass
class Clip:
    """One clip.

    Args:
        frames: uint8 (T, C, H, W): grey (C = 1) or RGB (3), then optical flow (2) if the cache has it.
        label: index of the class, -1 for a sentence.
        text: the word, or the sentence.
        name: unique within its split.
        words: the words with their first frame and the frame after their last, where the dataset knows them.
        boxes: float32 (T, 4), x, y, width, height of what matters in pixels of ``frames``, where the dataset knows it.
    """

    frames: Tensor
    label: int
    text: str
    name: str
    words: tuple[tuple[str, int, int], ...] = ()
    boxes: Tensor | None = None


class ClipDataset(Dataset[Clip]):
    """One split of a folder made by :func:`prepare`.

    Args:
        cache_dir: the folder.
        split: such as ``"train"``, ``"val"`` or ``"test"``.
        classes: the words to keep, in the order of their labels; None: all words of the cache, sorted.
        content: ``"picture"`` or ``"flow"`` to have the channels of one of them only; None: all.

    Attributes:
        flow: whether the last two channels are optical flow.
        classes: the words, empty for sentences.
        lengths: frames of each clip, without reading them.
        labels: label of each clip.
        source: how ``prepare`` made the frames from a video: "crop", "rgb", "flow" and "fps", as far as is known.

    Raises:
        ValueError: no complete cache, an unknown split, a class or content that the cache doesn't have.
    """

    def __init__(
        self, cache_dir: str | Path, split: str, classes: Sequence[str] | None = None, content: str | None = None
    ) -> None:
        self.cache_dir = Path(cache_dir)
        records = read_index(self.cache_dir)
        parameters = read_parameters(self.cache_dir) or {}
        self.source = {name: parameters[name] for name in ("crop", "rgb", "flow", "fps") if name in parameters}
        has_flow = "flow" in self.source
        if content not in (None, "picture", "flow"):
            raise ValueError(f"content: expected None, 'picture' or 'flow', got {content!r}")
        if content == "flow" and not has_flow:
            raise ValueError(f"content: {str(self.cache_dir)!r} was prepared without optical flow")
        self.flow = has_flow and content != "picture"
        self._channels = slice(None)
        if has_flow and content is not None:
            self._channels = slice(None, -2) if content == "picture" else slice(-2, None)
        splits = sorted({record.split for record in records})
        if split not in splits:
            raise ValueError(f"split: expected one of {splits} of {str(self.cache_dir)!r}, got {split!r}")
        present = sorted({record.label for record in records if record.label is not None})
        self.classes = present if classes is None else list(classes)
        if unknown := sorted(set(self.classes) - set(present)):
            raise ValueError(f"classes: {str(self.cache_dir)!r} has the words {present}, not {unknown}")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes: expected each word once, got {self.classes}")
        self.split = split
        numbers = {word: number for number, word in enumerate(self.classes)}
        self._records = [
            record
            for record in records
            if record.split == split and (classes is None or record.label is None or record.label in numbers)
        ]
        self.labels = [-1 if record.label is None else numbers[record.label] for record in self._records]
        self.lengths = [record.num_frames for record in self._records]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Clip:
        record = self._records[index]
        frames, words, boxes = read_clip(self.cache_dir, record)
        kept = torch.from_numpy(frames)[:, self._channels].contiguous()
        places = None if boxes is None else torch.from_numpy(boxes)
        return Clip(kept, self.labels[index], record.text, record.name, words, places)


@dataclass
class Batch:
    """Clips side by side.

    Args:
        frames: uint8 (T, B, C, H, W), zero after a clip's end.
        lengths: int64 (B,), frames of each clip.
        labels: int64 (B,).
        texts: B words or sentences.
        names: B names.
        pauses: int64 (B,), frames before the first word, 0 where that is not known; None: nowhere.
    """

    frames: Tensor
    lengths: Tensor
    labels: Tensor
    texts: list[str]
    names: list[str]
    pauses: Tensor | None = None


def collate(clips: list[Clip]) -> Batch:
    """Clips to a batch, padded with zeros to the longest."""
    if not clips:
        raise ValueError("clips: expected at least one, got none")
    shapes = {tuple(clip.frames.shape[1:]) for clip in clips}
    if len(shapes) > 1:
        raise ValueError(f"clips: expected frames of one (C, H, W), got {sorted(shapes)}")
    return Batch(
        torch.nn.utils.rnn.pad_sequence([clip.frames for clip in clips]),
        torch.tensor([len(clip.frames) for clip in clips]),
        torch.tensor([clip.label for clip in clips]),
        [clip.text for clip in clips],
        [clip.name for clip in clips],
        torch.tensor([clip.words[0][1] if clip.words else 0 for clip in clips]),
    )


def cut_words(clip: Clip, max_frames: int, generator: torch.Generator | None = None) -> Clip:
    """A random run of whole words of at most ``max_frames`` frames, with their text: the curriculum of CTC pretraining.

    A run starts at a random word and takes as many of the next as fit; where there is room left, a random part of the
    pauses before and after them comes along, as there are pauses in whole sentences. Words longer than ``max_frames``
    start no run; if all are, the shortest word is taken whole.

    Raises:
        ValueError: the clip has no word boundaries.
    """
    if not clip.words:
        raise ValueError(f"clip: expected word boundaries, clip {clip.name!r} has none")
    starts = [i for i, (_, start, end) in enumerate(clip.words) if end - start <= max_frames]
    if starts:
        first = starts[int(torch.randint(len(starts), (), generator=generator))]
    else:
        first = min(range(len(clip.words)), key=lambda i: clip.words[i][2] - clip.words[i][1])
    start, last = clip.words[first][1], first
    while last + 1 < len(clip.words) and clip.words[last + 1][2] - start <= max_frames:
        last += 1
    stop = clip.words[last][2]
    pause = start - (clip.words[first - 1][2] if first else 0)
    begin = start - _up_to(min(pause, max_frames - (stop - start)), generator)
    pause = (clip.words[last + 1][1] if last + 1 < len(clip.words) else len(clip.frames)) - stop
    end = stop + _up_to(min(pause, max_frames - (stop - begin)), generator)
    run = clip.words[first : last + 1]
    return Clip(
        clip.frames[begin:end],
        clip.label,
        " ".join(word for word, _, _ in run),
        clip.name,
        tuple((word, since - begin, until - begin) for word, since, until in run),
        None if clip.boxes is None else clip.boxes[begin:end],
    )


def _up_to(largest: int, generator: torch.Generator | None) -> int:
    """A random number from 0 to ``largest``, 0 if that is negative."""
    return int(torch.randint(max(largest, 0) + 1, (), generator=generator))
