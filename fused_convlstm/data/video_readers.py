"""Readers of gesture and action datasets. A folder per class is read by :class:`~fused_convlstm.data.WordFolders`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .items import Item, Problem, existing_folder, split_by_name


@dataclass(frozen=True)
class Jester:
    """20BN-Jester: frames ``ID/00001.jpg`` and lists ``*train*.csv``, ``*validation*.csv`` with lines ``ID;label``.

    The lists lie in the root or beside it. The test list has no labels and is not read; validation is the split
    ``"val"``.
    """

    root: Path

    def __iter__(self) -> Iterator[Item | Problem]:
        root = existing_folder(self.root, "Jester")
        for split, pattern in (("train", "*train*.csv"), ("val", "*validation*.csv")):
            for number, line in _lines(_list_files(root, pattern)[0]):
                identity, separator, label = line.partition(";")
                if not separator or not label:
                    yield Problem(f"{pattern}, line {number}", f"expected 'ID;label', got {line!r}")
                elif not (root / identity).is_dir():
                    yield Problem(identity, "its folder of frames is missing")
                else:
                    yield Item(identity, split, root / identity, label, label)


@dataclass(frozen=True)
class IsoGD:
    """ChaLearn IsoGD: lists ``train_list.txt``, ``valid_list.txt``, ``test_list.txt`` of ``M_x.avi K_x.avi label``.

    ``modality`` is ``"rgb"`` (the files M) or ``"depth"`` (K). A clip has the same name in both, so that their scores
    can be averaged. Labels start at 1 and become ``"001"`` to ``"249"``.
    """

    root: Path
    modality: str = "rgb"

    def __post_init__(self) -> None:
        if self.modality not in ("rgb", "depth"):
            raise ValueError(f"modality: expected 'rgb' or 'depth', got {self.modality!r}")

    def __iter__(self) -> Iterator[Item | Problem]:
        root = existing_folder(self.root, "IsoGD")
        for split, name in (("train", "train_list.txt"), ("val", "valid_list.txt"), ("test", "test_list.txt")):
            for number, line in _lines(_list_files(root, name)[0]):
                parts = line.split()
                if len(parts) != 3 or not parts[2].isdigit():
                    yield Problem(f"{name}, line {number}", f"expected 'M_x.avi K_x.avi label', got {line!r}")
                    continue
                video = root / parts[0 if self.modality == "rgb" else 1]
                label = f"{int(parts[2]):03d}"
                clip = str(Path(parts[0]).with_suffix(""))
                yield _existing(Item(clip, split, video, label, label))


@dataclass(frozen=True)
class UCF101:
    """UCF101: ``Class/v_Class_g01_c01.avi`` and the official lists ``trainlist01.txt``, ``testlist01.txt`` of a fold.

    The lists lie in the root, beside it, or in a folder ``ucfTrainTestlist`` of either. The groups 24 and 25, which are
    for training in every fold, are the split ``"val"``; videos of a group are alike and stay together.
    """

    root: Path
    fold: int = 1

    def __post_init__(self) -> None:
        _check_fold(self.fold)

    def __iter__(self) -> Iterator[Item | Problem]:
        root = existing_folder(self.root, "UCF101")
        for split in ("train", "test"):
            name = f"{split}list{self.fold:02d}.txt"
            for _, line in _lines(_list_files(root, name, "ucfTrainTestlist")[0]):
                path = Path(line.split()[0])
                held_out = split == "train" and re.search(r"_g2[45]_", path.name) is not None
                part = "val" if held_out else split
                label = path.parent.name
                yield _existing(Item(f"{label}/{path.stem}", part, root / path, label, label))


@dataclass(frozen=True)
class HMDB51:
    """HMDB51: ``class/name.avi`` and the official lists ``class_test_split1.txt`` of a fold, ``name.avi {0, 1, 2}``.

    1 is train, 2 test, 0 unused. The lists lie in the root, beside it, or in a folder ``testTrainMulti_7030_splits`` of
    either. Training clips of films whose name :func:`split_by_name` puts there are the split ``"val"``.
    """

    root: Path
    fold: int = 1

    def __post_init__(self) -> None:
        _check_fold(self.fold)

    def __iter__(self) -> Iterator[Item | Problem]:
        root = existing_folder(self.root, "HMDB51")
        for path in _list_files(root, f"*_test_split{self.fold}.txt", "testTrainMulti_7030_splits"):
            label = path.name.removesuffix(f"_test_split{self.fold}.txt")
            for number, line in _lines(path):
                parts = line.split()
                if len(parts) != 2 or parts[1] not in ("0", "1", "2"):
                    yield Problem(f"{path.name}, line {number}", f"expected 'name.avi 0', 1 or 2, got {line!r}")
                    continue
                if parts[1] == "0":
                    continue
                film = parts[0].split(f"_{label}_")[0]
                train = "val" if split_by_name(film) == "val" else "train"
                split = train if parts[1] == "1" else "test"
                name = f"{label}/{Path(parts[0]).stem}"
                yield _existing(Item(name, split, root / label / parts[0], label, label))


def _check_fold(fold: int) -> None:
    if fold not in (1, 2, 3):
        raise ValueError(f"fold: expected 1, 2 or 3, got {fold}")


def _existing(item: Item) -> Item | Problem:
    return item if item.video.is_file() else Problem(item.name, f"{item.video.name} is missing")


def _list_files(root: Path, pattern: str, folder: str = ".") -> list[Path]:
    """The files of a pattern in the root, beside it, or in ``folder`` of either: of the first place that has any."""
    for base in (root, root / folder, root.parent, root.parent / folder):
        if found := sorted(base.glob(pattern)):
            return found
    raise ValueError(f"root: expected {pattern} in {str(root)!r} or beside it, found none")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        if line.strip():
            yield number, line.strip()
