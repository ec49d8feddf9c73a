"""Recipes: everything that a training run depends on, as YAML files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from ..configuration import atomic_path, from_dictionary, unknown_name
from ..functional import check_choice
from ..models import model_config
from .tasks import find_task

OPTIMIZERS = ("adam", "sgd", "rmsprop")
SCHEDULES = ("plateau", "polynomial", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
READOUTS = ("last", "mean")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """What is read.

    Attributes:
        cache: folder made by ``fused-convlstm prepare``.
        train, validation, test: names of its parts.
        classes: the words to tell apart; None: all of the cache.
        content: "picture" or "flow", of a cache that has both; None: all.
        fraction: of the training clips, chosen at random by the seed (section 5.2, fig. 6).
        workers: processes that read clips; 0: the training process itself.
    """

    cache: str = ""
    train: str = "train"
    validation: str = "val"
    test: str = "test"
    classes: tuple[str, ...] | None = None
    content: str | None = None
    fraction: float = 1.0
    workers: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction: expected more than 0 and at most 1, got {self.fraction}")
        _check_least(self, {"workers": 0})


@dataclass(frozen=True, kw_only=True)
class TransformRecipe:
    """How clips become input (section 4.1); see ``fused_convlstm.data.TrainTransform``.

    Attributes:
        crop: smallest and largest side of the random square crop, in pixels of the cache.
        size: side that it is resized to.
        rotation: largest angle, degrees.
        brightness: largest relative change.
        flip: probability of a mirror image.
        shift: pixels that the crop may leave the middle, to either side.
        validation_crop: side of the one middle crop used while training.
        test_crops: sides of the middle crops of an evaluation; each is used with its mirror image, unless
            ``flip`` is 0.
        uniform: ``training.frames`` are spread evenly over the clip, with jitter in training, in place of consecutive
            ones.
        segments: in an evaluation a clip is so many runs of ``training.frames`` consecutive frames, evenly spread,
            whose outputs are averaged; after each epoch of training it is the middle one. 0: the whole clip.
    """

    crop: tuple[int, int] = (48, 64)
    size: int = 48
    rotation: float = 10.0
    brightness: float = 0.1
    flip: float = 0.5
    shift: int = 4
    validation_crop: int = 56
    test_crops: tuple[int, ...] = (48, 56, 64)
    uniform: bool = False
    segments: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(f"crop: expected 0 < smallest <= largest, got {list(self.crop)}")
        _check_least(self, {"size": 1, "rotation": 0.0, "brightness": 0.0, "shift": 0, "validation_crop": 1})
        if not 0.0 <= self.flip <= 1.0:
            raise ValueError(f"flip: expected a probability from 0 to 1, got {self.flip}")
        if not self.test_crops or min(self.test_crops) < 1:
            raise ValueError(f"test_crops: expected one side or more, each of at least 1, got {list(self.test_crops)}")
        if self.segments < 0 or (self.segments and self.uniform):
            raise ValueError(f"segments: expected at least 0, and 0 with uniform, got {self.segments}")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Which network: a name of ``fused_convlstm.models`` and the options that differ from its own.

    The numbers of classes and of input channels come from the data.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_classes", "in_channels"):
            if name in self.options:
                raise ValueError(f"options.{name}: it comes from the data, leave it out; got {self.options[name]!r}")
        model_config(self.name, self.options, "options")


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How it is trained.

    Attributes:
        epochs: passes over the training clips.
        batch_size: clips a step, over all processes.
        frames: (epoch, frames) pairs: from that epoch on, clips are random subsequences of so many frames (words), or
            runs of whole words of at most so many (characters). Empty: whole clips.
        tbptt: steps between cuts of the gradient; 0: none.
        optimizer: "adam", "sgd" or "rmsprop".
        learning_rate: at the start.
        weight_decay, momentum: of the optimizer (momentum: not adam).
        schedule: "plateau": times ``factor`` after more than ``patience`` epochs without a better validation score;
            "polynomial": from ``learning_rate`` to ``final_learning_rate`` with exponent ``power``; "constant".
        warmup: steps over which the learning rate rises from zero.
        clip_norm: largest norm of the gradient.
        label_smoothing: of the cross-entropy.
        precision: "fp32", or autocast to "bf16" or "fp16".
        init_from: a model file to start from; what it does not have starts at random.
        freeze: beginnings of the names of parameters that stay as they are.
        readout: a clip's prediction is that of its "last" frame, or the "mean" over its frames.
        checkpoint_seconds: a checkpoint is saved at the first step after so long, and after each epoch.
    """

    epochs: int = 100
    batch_size: int = 32
    frames: tuple[tuple[int, int], ...] = ((0, 24),)
    tbptt: int = 8
    optimizer: str = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: str = "plateau"
    factor: float = 0.5
    patience: int = 3
    final_learning_rate: float = 0.0
    power: float = 1.0
    warmup: int = 0
    clip_norm: float = 5.0
    label_smoothing: float = 0.0
    precision: str = "fp32"
    init_from: str | None = None
    freeze: tuple[str, ...] = ()
    readout: str = "last"
    checkpoint_seconds: float = 300.0

    def __post_init__(self) -> None:
        check_choice(self.optimizer, "optimizer", OPTIMIZERS)
        check_choice(self.schedule, "schedule", SCHEDULES)
        check_choice(self.precision, "precision", PRECISIONS)
        check_choice(self.readout, "readout", READOUTS)
        _check_least(
            self,
            {
                "epochs": 1, "batch_size": 1, "tbptt": 0, "warmup": 0, "patience": 0, "weight_decay": 0.0,
                "final_learning_rate": 0.0, "checkpoint_seconds": 0.0,
            },
        )  # fmt: skip
        for name in ("label_smoothing", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected from 0 to less than 1, got {getattr(self, name)}")
        if not self.clip_norm > 0.0:
            raise ValueError(f"clip_norm: expected more than 0, got {self.clip_norm}")
        for name in ("learning_rate", "factor", "power"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of more than 0, got {getattr(self, name)}")
        if any(frames < 1 for _, frames in self.frames) or list(self.frames) != sorted(self.frames):
            raise ValueError(f"frames: expected (epoch, frames) in order of epochs, got {list(self.frames)}")

    def frames_at(self, epoch: int) -> int | None:
        """Frames of a training clip in ``epoch``, None for whole clips."""
        return next((frames for start, frames in reversed(self.frames) if epoch >= start), None)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run.

    Attributes:
        task: "words" (one class a clip) or "characters" (sentences, with CTC).
        seed: of everything random.
    """

    task: str = "words"
    seed: int = 0
    data: DataRecipe = field(default_factory=DataRecipe)
    transform: TransformRecipe = field(default_factory=TransformRecipe)
    model: ModelRecipe
    training: TrainingRecipe = field(default_factory=TrainingRecipe)

    def __post_init__(self) -> None:
        find_task(self.task)
        _check_least(self, {"seed": 0})
        if self.transform.uniform and (self.task != "words" or not self.training.frames):
            raise ValueError("transform.uniform: expected the task 'words' and a number in training.frames with it")
        if self.transform.segments and (self.task != "words" or not self.training.frames):
            raise ValueError("transform.segments: expected the task 'words' and a number in training.frames with it")

    def to_dictionary(self) -> dict[str, Any]:
        """As YAML and JSON have it."""
        return _plain(dataclasses.asdict(self))  # type: ignore[no-any-return]


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    folder = resources.files("fused_convlstm") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str, overrides: list[str] | None = None) -> Recipe:
    """A recipe from a YAML file, or one of the package's by name, with "section.key=value" overrides.

    Raises:
        ValueError: naming the key that is unknown or wrong.
    """
    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise ValueError(f"recipe: no file {source!r}")
        try:
            text = Path(source).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {source!r}: not text in UTF-8: {error}") from None
    elif source in recipe_names():
        text = (resources.files("fused_convlstm") / "configs" / f"{source}.yaml").read_text()
    else:
        raise ValueError(f"recipe: {unknown_name(source, recipe_names())}, or a path that ends in .yaml")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {source!r}: not YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {source!r}: expected a mapping of keys to values, got {values!r}")
    for override in overrides or []:
        _set(values, override)
    return from_dictionary(Recipe, values, "")


def save_recipe(path: Path, recipe: Recipe) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(yaml.safe_dump(recipe.to_dictionary(), sort_keys=False), encoding="utf-8")


def _set(values: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"--set: expected section.key=value, got {override!r}")
    *sections, last = keys.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ValueError(f"--set: {section!r} in {override!r} is no section")
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set: {override!r} is not YAML: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_least(recipe: Any, least: dict[str, float]) -> None:
    for name, number in least.items():
        value = getattr(recipe, name)
        if not value >= number:  # NaN, too
            raise ValueError(f"{name}: expected at least {number}, got {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
