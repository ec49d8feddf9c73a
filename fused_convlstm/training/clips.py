"""A model over the clips of a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm  # type: ignore[import-untyped]

from ..data import Batch, ClipDataset, center_crop, collate, segment_frames, six_crops, uniform_frames
from ..models import StreamingModel, every
from .processes import Processes
from .recipe import TransformRecipe
from .tasks import Task, WordTask, decode_characters

# A batch as a list of float (T, B, C, size, size), whose outputs are averaged.
Views = Callable[[Batch], list[Tensor]]
# The frames of a batch that a model sees, as batches whose outputs are averaged.
Sampling = Callable[[Batch], list[Batch]]


@dataclass
class ClipResults:
    """What a model gave for clips, in their order.

    Attributes:
        probabilities: of words, (N, K); of characters, one (T, K) a clip.
        read: the words or sentences that the model read.
    """

    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    probabilities: list[Tensor] = field(default_factory=list)
    read: list[str] = field(default_factory=list)


def sampling(recipe: TransformRecipe, frames: int | None, segments: int) -> Sampling:
    """How clips are sampled outside of training. ``frames``: of a training clip. ``segments``: how many, if any."""
    if frames is not None and recipe.uniform:
        return lambda batch: [uniform_frames(batch, frames)]
    if frames is not None and segments:
        return lambda batch: segment_frames(batch, frames, segments)
    return lambda batch: [batch]


def middle_view(recipe: TransformRecipe, flow: bool) -> Views:
    """The one crop used while training. ``flow``: the last two channels are optical flow."""
    return lambda batch: [center_crop(batch.frames, recipe.validation_crop, recipe.size, batch.lengths, flow=flow)]


def test_views(recipe: TransformRecipe, flow: bool) -> Views:
    """The crops of an evaluation and their mirror images (section 5), where training had mirror images."""
    every_view = 1 if recipe.flip > 0.0 else 2  # the mirror images come second
    return lambda batch: six_crops(batch.frames, recipe.test_crops, recipe.size, batch.lengths, flow=flow)[::every_view]


@torch.no_grad()
def run_clips(
    model: StreamingModel,
    task: Task,
    dataset: ClipDataset,
    views: Views,
    readout: str,
    *,
    sample: Sampling = lambda batch: [batch],
    batch_size: int = 32,
    resets: tuple[str, int] | None = None,
    indices: list[int] | None = None,
    processes: Processes | None = None,
    progress: str | None = None,
) -> ClipResults:
    """Runs ``model`` over ``dataset``, in evaluation mode.

    Args:
        readout: a clip's probabilities are those of its "last" frame or the "mean" over its frames (words).
        sample: the frames of each clip; all of them unless given.
        resets: (scale, period): the states of that scale are reset every so many frames.
        indices: the clips to take; None: all.
        processes: each takes its share, and all get the whole result.
        progress: text before the progress bar, None for no bar.
    """
    processes = processes or Processes(0, 1, next(model.parameters()).device)
    indices = list(range(len(dataset))) if indices is None else indices
    shares = [Processes(r, processes.count, processes.device).share(indices) for r in range(processes.count)]
    mine = shares[processes.rank]
    was_training = model.training
    model.eval()
    results = ClipResults()
    loader = DataLoader(Subset(dataset, mine), batch_size=batch_size, collate_fn=collate)
    for batch in tqdm(loader, desc=progress, disable=progress is None or not processes.is_first, leave=False):
        parts = sample(batch)  # of the same lengths
        runs = [run_batch(model, part, views, resets, processes.device) for part in parts]
        _append(results, torch.stack(runs).mean(dim=0), parts[0], task, readout)
    model.train(was_training)
    return _merge(processes.gather(results))


@torch.no_grad()
def run_batch(
    model: StreamingModel, batch: Batch, views: Views, resets: tuple[str, int] | None, device: torch.device
) -> Tensor:
    """The probabilities (T, B, K) of a batch, on the CPU."""
    batch = replace(batch, frames=batch.frames.to(device))
    steps, count = batch.frames.shape[:2]
    schedule = None if resets is None else {resets[0]: every(resets[1], steps, count)}
    total: Tensor | None = None
    frames = views(batch)
    for view in frames:
        outputs, _ = model(view, lengths=batch.lengths, resets=schedule)
        probabilities = outputs.float().softmax(dim=-1)
        total = probabilities if total is None else total + probabilities
    assert total is not None
    return (total / len(frames)).cpu()


def _append(results: ClipResults, probabilities: Tensor, batch: Batch, task: Task, readout: str) -> None:
    results.names += batch.names
    results.texts += batch.texts
    results.labels += batch.labels.tolist()
    for b, length in enumerate(batch.lengths.tolist()):
        clip = probabilities[:length, b]
        if isinstance(task, WordTask):
            clip = clip[-1] if readout == "last" else clip.mean(dim=0)
            results.read.append(task.classes[int(clip.argmax())])
        else:
            results.read.append(" ".join(word.text for word in decode_characters(clip)))
        results.probabilities.append(clip)


def _merge(shares: list[ClipResults]) -> ClipResults:
    """The shares of all processes, in the order of the clips again."""

    def interleave(name: str) -> list[object]:
        parts = [getattr(share, name) for share in shares]
        return [part[k] for k in range(max(map(len, parts))) for part in parts if k < len(part)]

    if len(shares) == 1:
        return shares[0]
    return ClipResults(**{name: interleave(name) for name in ClipResults.__dataclass_fields__})  # type: ignore[arg-type]
