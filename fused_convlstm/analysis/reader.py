"""A trained model with what it needs to know about its input and its output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..configuration import from_dictionary
from ..data import ClipDataset
from ..models import StreamingModel, load_model
from ..training.recipe import TransformRecipe
from ..training.tasks import Task, task_of_classes


@dataclass(frozen=True)
class TrainedReader:
    """A model file of a training run.

    Attributes:
        model: in evaluation mode.
        name: of the model.
        task: what its outputs mean.
        readout: whether a clip's word is that of its "last" frame or the "mean" over its frames.
        frames: of the training clips, None if they were whole.
        transform: crops and size of the input.
        content: "picture" or "flow", of a cache that has both; None: all.
    """

    model: StreamingModel
    name: str
    task: Task
    readout: str
    frames: int | None
    transform: TransformRecipe
    content: str | None = None

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> TrainedReader:
        """From a model file, or the folder of a run.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or was not written by a training run.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "model.safetensors"
        model, name, extra = load_model(path, device)
        if missing := {"task", "classes", "readout", "frames", "transform"} - extra.keys():
            raise ValueError(f"{path}: not from a training run: its metadata lacks {', '.join(sorted(missing))}")
        transform = from_dictionary(TransformRecipe, extra["transform"], "transform")
        task = task_of_classes(extra["task"], extra["classes"])
        return cls(model, name, task, extra["readout"], extra["frames"], transform, extra.get("content"))

    def dataset(self, cache: str | Path, split: str) -> ClipDataset:
        """The clips of a cache whose words this model knows, labelled by its classes.

        Raises:
            ValueError: no such cache or part, or the words differ.
        """
        if self.task.name != "words":
            return ClipDataset(cache, split, content=self.content)
        dataset = ClipDataset(cache, split, self.task.classes, self.content)
        if not len(dataset):
            raise ValueError(f"{cache}: no clips in {split!r} of the words {', '.join(self.task.classes)}")
        return dataset

    @property
    def uniform(self) -> int | None:
        """How many frames are taken evenly out of each clip; None: all."""
        return self.frames if self.transform.uniform else None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
