"""Readers of lipreading datasets. Each takes the dataset's own folder layout and yields :class:`Item`s."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .items import (
    SPLITS,
    VIDEO_ENDINGS,
    Item,
    Problem,
    Word,
    existing_folder,
    split_by_name,
    subfolders,
    unreadable,
    video_files,
)

GRID_WORDS = {
    "command": ("bin", "lay", "place", "set"),
    "colour": ("blue", "green", "red", "white"),
    "preposition": ("at", "by", "in", "with"),
    "letter": tuple("abcdefghijklmnopqrstuvxyz"),
    "digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "adverb": ("again", "now", "please", "soon"),
}
LRW_CLIP_SECONDS = 29 / 25


@dataclass(frozen=True)
class LRW:
    """Lip Reading in the Wild: ``WORD/{train,val,test}/WORD_00001.mp4`` with a ``.txt`` each, 29 frames at 25 fps.

    The word is in the middle of the clip and lasts as long as the line ``Duration: seconds`` of the text file says.
    """

    root: Path

    def __iter__(self) -> Iterator[Item | Problem]:
        for word_folder in subfolders(existing_folder(self.root, "LRW")):
            for split in SPLITS:
                if not (word_folder / split).is_dir():
                    continue
                for video in video_files(word_folder / split):
                    yield self._item(word_folder.name, split, video)

    def _item(self, word: str, split: str, video: Path) -> Item | Problem:
        name = f"{word}/{video.stem}"
        text_file = video.with_suffix(".txt")
        if not text_file.is_file():
            return Problem(name, f"{text_file.name} is missing")
        try:
            fields = _fields(text_file)
            duration = float(fields["Duration"].split()[0])
        except OSError as error:
            return Problem(name, unreadable(text_file, error))
        except (KeyError, IndexError, ValueError):
            return Problem(name, f"{text_file.name} has no line 'Duration: SECONDS'")
        middle = LRW_CLIP_SECONDS / 2
        spoken = Word(word, max(0.0, middle - duration / 2), min(LRW_CLIP_SECONDS, middle + duration / 2))
        return Item(name, split, video, word, word, words=(spoken,))


@dataclass(frozen=True)
class LRWCrops:
    """LRW preprocessed to ``WORD/{train,val,test}/WORD_00001.npz``, key ``data``: grey mouth crops (T, H, W)."""

    root: Path

    def __iter__(self) -> Iterator[Item | Problem]:
        for word_folder in subfolders(existing_folder(self.root, "the preprocessed LRW")):
            word = word_folder.name
            for split in SPLITS:
                if (word_folder / split).is_dir():
                    for path in video_files(word_folder / split, (".npz",)):
                        yield Item(f"{word}/{path.stem}", split, path, word, word, cropped=True)


@dataclass(frozen=True)
class WordFolders:
    """A folder per word or other class: ``WORD/*.mp4``, or ``WORD/{train,val,test}/*.mp4`` to fix the split by hand.

    Clips directly in the word's folder are split by :func:`split_by_name` of ``WORD/file name without its ending``.
    A file ``NAME.boxes`` beside ``NAME.mp4`` gives :class:`Item`'s boxes.
    """

    root: Path

    def __iter__(self) -> Iterator[Item | Problem]:
        for word_folder in subfolders(existing_folder(self.root, "a folder per word")):
            word = word_folder.name
            for video in video_files(word_folder):
                name = f"{word}/{video.stem}"
                yield Item(name, split_by_name(name), video, word, word, boxes=_boxes_file(video))
            for split in SPLITS:
                if (word_folder / split).is_dir():
                    for video in video_files(word_folder / split):
                        name = f"{word}/{split}/{video.stem}"
                        yield Item(name, split, video, word, word, boxes=_boxes_file(video))


@dataclass(frozen=True)
class GRID:
    """The GRID corpus: ``SPEAKER/SENTENCE.{mpg,mp4}`` and ``SPEAKER/SENTENCE.align``, anywhere below the root.

    ``unit`` is ``"word"``: every word is a clip of ``num_frames`` frames around its middle (None: the word alone), or
    ``"sentence"``: the clip is the video and the text its words. ``words`` keeps some words only: names of
    :data:`GRID_WORDS` such as ``"digit"``, or words. An alignment line is ``START END WORD`` in 1/25000 s; ``sil`` and
    ``sp`` are silence. Split: :func:`split_by_name` of the sentence name, such as ``bbaf2n``, for all speakers.
    """

    root: Path
    unit: str = "word"
    words: tuple[str, ...] | None = None
    num_frames: int | None = 29

    def __post_init__(self) -> None:
        if self.unit not in ("word", "sentence"):
            raise ValueError(f"unit: expected 'word' or 'sentence', got {self.unit!r}")
        if self.num_frames is not None and self.num_frames < 1:
            raise ValueError(f"num_frames: expected 1 or more, got {self.num_frames}")
        if self.words is not None and self.unit == "sentence":
            raise ValueError(f"words: only for unit='word', got {self.words!r} with unit='sentence'")
        self._wanted()  # raises for an unknown word

    def _wanted(self) -> frozenset[str]:
        every = {word for group in GRID_WORDS.values() for word in group}
        wanted: set[str] = set()
        for entry in every if self.words is None else self.words:
            if entry not in GRID_WORDS and entry not in every:
                raise ValueError(f"words: expected GRID's words or one of {', '.join(GRID_WORDS)}, got {entry!r}")
            wanted.update(GRID_WORDS.get(entry, (entry,)))
        return frozenset(wanted)

    def __iter__(self) -> Iterator[Item | Problem]:
        root = existing_folder(self.root, "GRID")
        wanted = self._wanted()
        alignments = {(path.parent.name, path.stem): path for path in root.rglob("*.align")}
        for video in sorted(path for path in root.rglob("*") if path.suffix.lower() in VIDEO_ENDINGS):
            name = f"{video.parent.name}/{video.stem}"
            alignment = alignments.get((video.parent.name, video.stem))
            if alignment is None:
                yield Problem(name, f"{video.stem}.align is missing")
                continue
            try:
                spoken = self._read_alignment(alignment)
            except OSError as error:
                yield Problem(name, unreadable(alignment, error))
                continue
            except ValueError as error:
                yield Problem(name, str(error))
                continue
            split = split_by_name(video.stem)
            if self.unit == "sentence":
                text = " ".join(word.text for word in spoken)
                yield Item(name, split, video, text, words=spoken)
                continue
            for position, word in enumerate(spoken):
                if word.text in wanted:
                    item_name = f"{name}-{position}-{word.text}"
                    span = (word.start, word.end)
                    yield Item(item_name, split, video, word.text, word.text, span, self.num_frames, (word,))

    @staticmethod
    def _read_alignment(path: Path) -> tuple[Word, ...]:
        known = {word for group in GRID_WORDS.values() for word in group}
        spoken = []
        for line in path.read_text(errors="replace").splitlines():
            parts = line.split()
            if not parts:
                continue
            if len(parts) != 3 or not (parts[0].isdigit() and parts[1].isdigit()):
                raise ValueError(f"{path.name}: expected lines 'START END WORD', got {line!r}")
            if parts[2] in ("sil", "sp"):
                continue
            if parts[2] not in known:
                raise ValueError(f"{path.name}: unknown word {parts[2]!r}")
            spoken.append(Word(parts[2], int(parts[0]) / 25000, int(parts[1]) / 25000))
        if not spoken:
            raise ValueError(f"{path.name}: no words")
        return tuple(spoken)


@dataclass(frozen=True)
class LRS:
    """LRS2 and LRS3: ``{main,trainval,pretrain,test}/ID/NNNNN.mp4`` with a ``.txt`` each; the clips are sentences.

    Split: where ``train.txt``, ``val.txt``, ``test.txt`` lie in the root or beside it (LRS2), ``main`` follows them
    (lines ``ID/NNNNN``); else ``test`` is test, and ``main`` and ``trainval`` are parted by :func:`split_by_name` of
    the ID, where the test part of ``trainval`` counts as train. ``pretrain`` is the split ``"pretrain"``: its text
    files give the time of every word, and its long recordings are cut between words into clips of at most
    ``max_seconds``.
    """

    root: Path
    max_seconds: float = 6.0

    def __iter__(self) -> Iterator[Item | Problem]:
        root = existing_folder(self.root, "LRS2 or LRS3")
        lists = self._lists(root)
        parts = [part for part in ("pretrain", "main", "trainval", "test") if (root / part).is_dir()]
        if not parts:
            raise ValueError(f"root: expected a folder with main, trainval, pretrain or test, got {str(root)!r}")
        for part in parts:
            for folder in subfolders(root / part):
                for video in video_files(folder):
                    yield from self._items(part, video, lists)

    @staticmethod
    def _lists(root: Path) -> dict[str, str]:
        splits: dict[str, str] = {}
        for split in SPLITS:
            for path in (root / f"{split}.txt", root.parent / f"{split}.txt"):
                if path.is_file():
                    for line in path.read_text().splitlines():
                        if line.strip():
                            splits[line.split()[0].removeprefix("main/")] = split
                    break
        return splits

    def _items(self, part: str, video: Path, lists: dict[str, str]) -> Iterator[Item | Problem]:
        identity = video.parent.name
        name = f"{part}/{identity}/{video.stem}"
        text_file = video.with_suffix(".txt")
        if not text_file.is_file():
            yield Problem(name, f"{text_file.name} is missing")
            return
        try:
            text = _fields(text_file).get("Text")
        except OSError as error:
            yield Problem(name, unreadable(text_file, error))
            return
        if not text:
            yield Problem(name, f"{text_file.name} has no line 'Text: ...'")
            return
        if part == "pretrain":
            try:
                words = self._read_words(text_file)
            except ValueError as error:
                yield Problem(name, str(error))
                return
            yield from self._segments(name, video, words)
        elif part == "main" and lists:
            split = lists.get(f"{identity}/{video.stem}")
            if split is None:
                yield Problem(name, "in none of train.txt, val.txt, test.txt")
            else:
                yield Item(name, split, video, text)
        elif part == "test":
            yield Item(name, "test", video, text)
        else:
            split = split_by_name(identity)
            yield Item(name, "train" if part == "trainval" and split == "test" else split, video, text)

    @staticmethod
    def _read_words(path: Path) -> tuple[Word, ...]:
        lines = path.read_text(errors="replace").splitlines()
        header = next((i for i, line in enumerate(lines) if line.split()[:3] == ["WORD", "START", "END"]), None)
        if header is None:
            raise ValueError(f"{path.name}: no line 'WORD START END ...'")
        words = []
        for line in lines[header + 1 :]:
            if not line.strip():
                continue
            try:
                text, start, end = line.split()[:3]
                words.append(Word(text, float(start), float(end)))
            except ValueError:
                raise ValueError(f"{path.name}: expected lines 'WORD START END SCORE', got {line!r}") from None
        if not words:
            raise ValueError(f"{path.name}: no words")
        return tuple(words)

    def _segments(self, name: str, video: Path, words: tuple[Word, ...]) -> Iterator[Item]:
        first = 0
        for position in range(1, len(words) + 1):
            if position == len(words) or words[position].end - words[first].start > self.max_seconds:
                run = words[first:position]
                text = " ".join(word.text for word in run)
                yield Item(f"{name}-{first}", "pretrain", video, text, span=(run[0].start, run[-1].end), words=run)
                first = position


def _boxes_file(video: Path) -> Path | None:
    path = video.with_suffix(".boxes")
    return path if path.is_file() else None


def _fields(path: Path) -> dict[str, str]:
    """The lines ``Key: value`` of a text file."""
    lines = (line.partition(":") for line in path.read_text(errors="replace").splitlines())
    return {key.strip(): value.strip() for key, colon, value in lines if colon}
