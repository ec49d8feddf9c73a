"""What is learned: words (one class a clip) or characters (sentences). A task turns outputs into losses and scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import jiwer
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from ..configuration import unknown_name
from ..data import Batch, Clip, ClipDataset, cut_words
from ..data.cache import Record, read_index

if TYPE_CHECKING:
    from .clips import ClipResults

BLANK = 0
ALPHABET = " 'abcdefghijklmnopqrstuvwxyz0123456789"  # class k + 1 is character k; class 0 is the blank


def clip_records(dataset: ClipDataset) -> list[Record]:
    """What the cache's index says of the clips of ``dataset``, in their order; none of them is read."""
    kept = {None, *dataset.classes}
    return [r for r in read_index(dataset.cache_dir) if r.split == dataset.split and r.label in kept]


class Task(ABC):
    """A task on one set of clips. ``score`` names the score that is better the larger it is."""

    name: ClassVar[str]
    score: ClassVar[str]
    classes: list[str]  # of the output, in order

    @classmethod
    @abstractmethod
    def of(cls, dataset: ClipDataset, label_smoothing: float) -> Task:
        """The task that ``dataset`` poses."""

    def cut(self, clip: Clip, frames: int | None, generator: torch.Generator) -> Clip:
        """``clip`` as it is trained on, where the transform's random subsequence of ``frames`` would not do."""
        return clip

    def check_cuts(self, dataset: ClipDataset, clips: Sequence[int], frames: int) -> None:
        """Raises a ValueError if :meth:`cut` cannot cut the longest of these clips to ``frames``."""
        return None

    @abstractmethod
    def subsequence(self, frames: int | None) -> int | None:
        """How many frames the transform should take out of each clip."""

    @abstractmethod
    def weight(self, lengths: Tensor) -> int:
        """By what the summed loss of a batch is divided."""

    @abstractmethod
    def chunk_loss(self, outputs: Tensor, batch: Batch, valid: Tensor) -> Tensor | None:
        """The summed loss of these steps; None if it takes the whole clip.

        Args:
            outputs: (T, B, K), the steps of a chunk.
            valid: (T, B).
        """

    @abstractmethod
    def clip_loss(self, outputs: Tensor, batch: Batch, lengths: Tensor) -> Tensor:
        """The summed loss of whole clips, for a task whose chunks have none."""

    @abstractmethod
    def scores(self, results: ClipResults) -> dict[str, float]:
        """The scores of what a model gave for clips."""


class WordTask(Task):
    """One word a clip: cross-entropy at every step."""

    name = "words"
    score = "top1"

    def __init__(self, classes: Sequence[str], label_smoothing: float = 0.0) -> None:
        self.classes = list(classes)
        self.label_smoothing = label_smoothing

    @classmethod
    def of(cls, dataset: ClipDataset, label_smoothing: float) -> WordTask:
        if len(dataset.classes) < 2:
            raise ValueError(f"data.cache: expected word clips of two words or more, found {dataset.classes}")
        return cls(dataset.classes, label_smoothing)

    def subsequence(self, frames: int | None) -> int | None:
        return frames

    def weight(self, lengths: Tensor) -> int:
        return int(lengths.sum())

    def chunk_loss(self, outputs: Tensor, batch: Batch, valid: Tensor) -> Tensor:
        steps = outputs.size(0)
        labels = batch.labels.to(outputs.device).repeat(steps)  # (T * B,)
        loss = F.cross_entropy(
            outputs.float().flatten(0, 1), labels, reduction="none", label_smoothing=self.label_smoothing
        )
        return (loss * valid.flatten()).sum()

    def clip_loss(self, outputs: Tensor, batch: Batch, lengths: Tensor) -> Tensor:
        raise NotImplementedError("the loss of words is a sum over steps")

    def scores(self, results: ClipResults) -> dict[str, float]:
        return word_scores(torch.stack(results.probabilities), torch.tensor(results.labels))


class CharacterTask(Task):
    """Characters or a blank at every step, trained with CTC (Graves et al. 2006)."""

    name = "characters"
    score = "accuracy"  # 1 - character error rate

    def __init__(self) -> None:
        self.classes = ["<blank>", *ALPHABET]

    @classmethod
    def of(cls, dataset: ClipDataset, label_smoothing: float) -> CharacterTask:
        if label_smoothing:
            raise ValueError(f"training.label_smoothing: expected 0 with characters, got {label_smoothing}")
        foreign = {record.name: sorted(set(record.text.lower()) - set(ALPHABET)) for record in clip_records(dataset)}
        if wrong := [f"{name!r} has {characters}" for name, characters in foreign.items() if characters]:
            raise ValueError(
                f"data.train: expected texts of the characters {ALPHABET!r}, got others in {len(wrong)} of "
                f"{len(foreign)} clips of {str(dataset.cache_dir)!r}: {', '.join(wrong[:3])}"
                f"{', ...' if len(wrong) > 3 else ''}"
            )
        return cls()

    def cut(self, clip: Clip, frames: int | None, generator: torch.Generator) -> Clip:
        return clip if frames is None or len(clip.frames) <= frames else cut_words(clip, frames, generator)

    def check_cuts(self, dataset: ClipDataset, clips: Sequence[int], frames: int) -> None:
        longest = max(clips, key=lambda clip: dataset.lengths[clip])
        if (length := dataset.lengths[longest]) > frames and not (clip := dataset[longest]).words:
            raise ValueError(
                f"training.frames: clips of more than {frames} frames are cut between words, but clip {clip.name!r} of "
                f"{dataset.split!r}, {length} frames, has no times of its words (of LRS2 and LRS3 those of "
                "data.train=pretrain have them; training.frames=[] takes whole clips)"
            )

    def subsequence(self, frames: int | None) -> None:
        return None

    def weight(self, lengths: Tensor) -> int:
        return len(lengths)

    def chunk_loss(self, outputs: Tensor, batch: Batch, valid: Tensor) -> None:
        return None

    def clip_loss(self, outputs: Tensor, batch: Batch, lengths: Tensor) -> Tensor:
        """CTC from the first word on, blanks before it.

        Without the blanks a network learns to put the first letter on the first frame, before anything is said: a guess
        that CTC then never gives up, because no other alignment is likely any more.
        """
        log_probs = outputs.float().log_softmax(-1)  # (T, B, classes)
        targets = [encode_text(text) for text in batch.texts]
        pauses = torch.zeros_like(lengths) if batch.pauses is None else batch.pauses.minimum(lengths)
        steps = torch.arange(len(outputs))[:, None]
        blanks = log_probs[..., BLANK].where((steps < pauses).to(outputs.device), 0.0)
        spoken = (steps + pauses).clamp(max=len(outputs) - 1).to(outputs.device)  # (T, B)
        ctc: Tensor = F.ctc_loss(
            log_probs.gather(0, spoken[..., None].expand_as(log_probs)),
            torch.cat(targets),
            lengths - pauses,
            torch.tensor([len(target) for target in targets]),
            blank=BLANK,
            reduction="sum",
            zero_infinity=True,  # a clip too short for its text has no alignment
        )
        return ctc - blanks.sum()

    def scores(self, results: ClipResults) -> dict[str, float]:
        return sentence_scores(results.read, results.texts)


TASKS: dict[str, type[WordTask] | type[CharacterTask]] = {task.name: task for task in (WordTask, CharacterTask)}


def find_task(name: str) -> type[WordTask] | type[CharacterTask]:
    if name not in TASKS:
        raise ValueError(f"task: {unknown_name(name, TASKS)}")
    return TASKS[name]


def task_of_classes(name: str, classes: Sequence[str]) -> Task:
    """The task of a trained model with these classes."""
    if find_task(name) is WordTask:
        return WordTask(classes)
    task = CharacterTask()
    if task.classes != list(classes):
        raise ValueError(f"classes: expected those of this version's characters, {task.classes}, got {list(classes)}")
    return task


def encode_text(text: str) -> Tensor:
    """Class numbers of a sentence's characters."""
    text = text.lower()
    if unknown := sorted(set(text) - set(ALPHABET)):
        raise ValueError(f"text: no class for {unknown} in {text!r}; the alphabet is {ALPHABET!r}")
    return torch.tensor([ALPHABET.index(character) + 1 for character in text], dtype=torch.int64)


@dataclass(frozen=True)
class TimedWord:
    """A word read from a clip: its frames (first, and after the last) and its probability."""

    text: str
    start: int
    end: int
    probability: float


def decode_characters(
    probabilities: Tensor,  # (T, K)
) -> list[TimedWord]:
    """The best path of CTC as words. A word's probability is that of its least certain character."""
    best, classes = probabilities.max(dim=-1)
    words: list[TimedWord] = []
    text, start, end, certainty = "", 0, 0, 1.0
    before = BLANK
    for t, (k, p) in enumerate(zip([*classes.tolist(), BLANK], [*best.tolist(), 1.0], strict=True)):
        letter = ALPHABET[k - 1] if k not in (BLANK, before) else ""
        if (letter == " " or t == len(classes)) and text:
            words.append(TimedWord(text, start, end, certainty))
            text, certainty = "", 1.0
        elif letter.strip():
            start = start if text else t
            text, certainty = text + letter, min(certainty, p)
        if k != BLANK and ALPHABET[k - 1] != " ":
            end = t + 1
        before = k
    return words


def word_scores(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """top1, top5 and top10 (as far as there are more classes) of (N, K) against (N,)."""
    classes = probabilities.size(1)
    return {
        f"top{k}": float(multiclass_accuracy(probabilities, labels, classes, average="micro", top_k=k))
        for k in (1, 5, 10)
        if k < classes or k == 1
    }


def sentence_scores(read: list[str], spoken: list[str]) -> dict[str, float]:
    """Word and character error rate, and the accuracy 1 - cer. Small and capital letters are the same."""
    spoken = [text.lower() for text in spoken]
    cer = float(jiwer.cer(spoken, read))
    return {"wer": float(jiwer.wer(spoken, read)), "cer": cer, "accuracy": 1.0 - cer}
