"""A trained model with what it needs to know about its input and its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..configuration import from_dictionary
from ..data import Batch, BoxCrop, ClipDataset, Crop, MouthCrop, WholeFrame, load_frames
from ..data.video import Frames
from ..models import StreamingModel, load_model
from ..training.clips import sampling
from ..training.recipe import TransformRecipe
from ..training.tasks import Task, task_of_classes

CROPS: dict[str, Callable[..., Crop]] = {crop.__name__: crop for crop in (MouthCrop, BoxCrop, WholeFrame)}


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
        source: how the cache was made; see :class:`ClipDataset`.
    """

    model: StreamingModel
    name: str
    task: Task
    readout: str
    frames: int | None
    transform: TransformRecipe
    content: str | None = None
    source: dict[str, Any] = field(default_factory=dict)

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
        return cls(
            model, name, task, extra["readout"], extra["frames"], transform, extra.get("content"),
            extra.get("source", {}),
        )  # fmt: skip

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

    def sample(self, batch: Batch) -> list[Batch]:
        """The frames of each clip that an evaluation takes, as batches whose outputs are averaged."""
        return sampling(self.transform, self.frames, self.transform.segments)(batch)

    @property
    def whole_clips(self) -> bool:
        """Whether a clip has one class as a whole, from frames all over it."""
        return self.transform.uniform or self.transform.segments > 0

    @property
    def flow(self) -> bool:
        """Whether the last two channels of its input are optical flow."""
        return "flow" in self.source and self.content != "picture"

    @property
    def crop(self) -> Crop | None:
        """What is kept of a frame; None where the file does not say."""
        if "crop" not in self.source:
            return None
        arguments = dict(self.source["crop"])
        return CROPS[arguments.pop("type")](**arguments)

    def read_video(self, path: str | Path, crop: Crop | None = None, fps: float | None = None) -> Frames:
        """A video file as the clips that the model was trained on: uint8 (T, C, H, W).

        Args:
            crop, fps: what to keep of a frame, and the frame rate, in place of those of the training clips.

        Raises:
            VideoError: the file cannot be decoded.
            NoFaceError: the crop finds no face.
        """
        frames = load_frames(
            path, self.crop if crop is None else crop, rgb=self.rgb, flow=self.source["flow"] if self.flow else None,
            fps=self.fps if fps is None else fps,
        )  # fmt: skip
        return frames[:, -2:] if self.content == "flow" else frames

    @property
    def rgb(self) -> bool:
        """Whether the training clips were in colour."""
        return bool(self.source.get("rgb", self.model.config.in_channels == 3))

    @property
    def fps(self) -> float:
        """Frame rate of the training clips."""
        return float(self.source.get("fps", 25.0))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device
