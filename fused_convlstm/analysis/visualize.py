"""The reports ``visualize`` and ``localize``, and late fusion of several models' scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Clip, ClipDataset, collate
from ..training.clips import middle_view, run_clips
from ..training.report import write_csv, write_json
from ..training.tasks import word_scores
from .localization import attention_pictures, box_iou, boxes_of, peaks_inside
from .maps import (
    Recording,
    as_pictures,
    attention_maps,
    draw_boxes,
    fusion_maps,
    overlay,
    recording,
    save_grid,
    save_video,
)
from .reader import TrainedReader

TRUTH, FOUND = (0, 255, 0), (255, 0, 0)  # colours of boxes


@torch.no_grad()
def record_clip(reader: TrainedReader, clip: Clip, flow: bool = False) -> tuple[Recording, int]:
    """What the layers of ``reader`` compute for the middle crop of a clip, and the class that it gives.

    Maps of a network that reads the clip from its end are in the order of the clip's frames, too.

    ``flow``: the last two channels are optical flow.
    """
    batch = collate([clip])
    if reader.transform.uniform:
        (batch,) = reader.sample(batch)
    (view,) = middle_view(reader.transform, flow)(batch)
    with recording(reader.model) as record:
        outputs, _ = reader.model(view.to(reader.device), lengths=batch.lengths)
    for maps in (record.hidden, record.attention):
        for name in maps:
            if name.startswith("reversed_network."):
                maps[name] = maps[name].flip(0)
    probabilities = outputs[:, 0].float().softmax(dim=-1)
    chosen = probabilities[-1] if reader.readout == "last" else probabilities.mean(dim=0)
    return record, int(chosen.argmax())


def visualize(reader: TrainedReader, cache: str | Path, split: str, out: Path, *, clips: int = 8) -> list[Path]:
    """Fusion maps (Zhang et al., fig. 3) and attention maps of the first clip of each class, up to ``clips`` clips.

    For every clip a picture ``NAME.png``, a row a layer, and a video ``NAME.mp4``; returns the pictures.

    Raises:
        ValueError: the model has no recurrent layer with maps, or ``clips`` is less than 1.
    """
    if clips < 1:
        raise ValueError(f"clips: expected at least 1, got {clips}")
    dataset = reader.dataset(cache, split)
    shown = _pictures(reader, cache, split)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index in _first_of_each_class(dataset, clips):
        clip = dataset[index]
        record, chosen = record_clip(reader, clip, dataset.flow)
        frames = as_pictures(_middle(reader, shown[index].frames))
        rows = [(f"{clip.text}\n(read: {reader.task.classes[chosen]})", frames)]
        for name, hidden in record.hidden.items():
            rows.append((f"{name}\nfusion", overlay(frames, fusion_maps(hidden)[:, 0])))
        for name, attention in record.attention.items():
            rows.append((f"{name}\nattention", overlay(frames, attention_maps(attention)[:, 0])))
        if len(rows) == 1:
            raise ValueError(f"model: {reader.name} has no recurrent layer with maps to show")
        path = out / f"{clip.name.replace('/', '_')}.png"
        save_grid(path, rows)
        save_video(path.with_suffix(".mp4"), rows)
        paths.append(path)
    return paths


def localize(
    reader: TrainedReader,
    cache: str | Path,
    split: str,
    out: Path,
    *,
    sigma: float = 2.0,
    power: float = 1.0,
    spread: float = 0.0,
    threshold: float = 0.4,
    pictures: int = 4,
) -> dict[str, Any]:
    """Action tubes of every clip from the attention of ``reader``: ``tubes.csv``, a box a frame in pixels of the cached
    frames, and pictures of the first clips. Where the cache knows the true boxes, also the mean IoU with them.

    Args:
        sigma, power, spread, threshold: see :func:`attention_tube`.
        pictures: clips to draw.

    Returns:
        clips, and with true boxes mean_iou, over the frames of all clips; pointing, the share of the frames whose most
        attended pixel lies in the true box; and centre_iou, the mean IoU of the frame's middle box of the mean true
        size: what knowing nothing gives.

    Raises:
        ValueError: the model has no attention.
    """
    dataset = reader.dataset(cache, split)
    shown = _pictures(reader, cache, split)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    overlaps, pointed, truths = [], [], []
    for index in range(len(dataset)):
        clip = dataset[index]
        record, _ = record_clip(reader, clip, dataset.flow)
        if not record.attention:
            raise ValueError(f"model: {reader.name} has no attention")
        maps = attention_maps(list(record.attention.values())[-1])[:, 0]
        steps, side = len(clip.frames), _crop_side(reader, clip.frames)
        attended = attention_pictures(maps, steps, (side, side), sigma=sigma, power=power, spread=spread)
        height, width = clip.frames.shape[2:]
        corner = np.array([(width - side) // 2, (height - side) // 2, 0, 0])  # of the crop
        tube = boxes_of(attended, threshold) + corner
        truth = None if clip.boxes is None else clip.boxes.double().numpy()
        if truth is not None:
            overlaps.append(box_iou(tube, truth))
            pointed.append(peaks_inside(attended, truth - corner))
            truths.append((truth, (width, height)))
        for t, (x, y, box_width, box_height) in enumerate(tube):
            rows.append({"clip": clip.name, "frame": t, "x": x, "y": y, "width": box_width, "height": box_height})
        if index < pictures:
            frames = as_pictures(shown[index].frames)
            drawn = draw_boxes(frames, tube, FOUND)
            lines = [(clip.text, drawn if truth is None else draw_boxes(drawn, truth, TRUTH))]
            lines.append(("attention", overlay(as_pictures(_middle(reader, shown[index].frames)), maps)))
            save_grid(out / f"{clip.name.replace('/', '_')}.png", lines)
    write_csv(out / "tubes.csv", rows)
    scores: dict[str, Any] = {"clips": len(dataset)}
    if overlaps:
        scores["mean_iou"] = float(np.concatenate(overlaps).mean())
        scores["pointing"] = float(np.concatenate(pointed).mean())
        mean_size = np.concatenate([truth for truth, _ in truths])[:, 2:].mean(axis=0)
        middle = [np.concatenate(((np.array(size) - mean_size) / 2, mean_size)) for _, size in truths]
        centred = [
            box_iou(np.tile(box, (len(truth), 1)), truth) for box, (truth, _) in zip(middle, truths, strict=True)
        ]
        scores["centre_iou"] = float(np.concatenate(centred).mean())
    write_json(out / "localization.json", scores)
    return scores


def fuse(
    readers: Sequence[TrainedReader],
    caches: Sequence[str | Path],
    split: str,
    *,
    weights: Sequence[float] | None = None,
    batch_size: int = 32,
) -> dict[str, float]:
    """Late fusion: the scores of the mean of several models' probabilities, say of RGB, depth and flow.

    Args:
        readers: models of the same classes.
        caches: one for each; clips are matched by their names.
        weights: of the models; equal if None.

    Raises:
        ValueError: the classes differ, or a clip is not in every cache.
    """
    if len(readers) < 2 or len(caches) != len(readers):
        raise ValueError(f"fuse: expected two models or more, a cache for each, got {len(readers)} and {len(caches)}")
    weights = [1.0] * len(readers) if weights is None else weights
    if len(weights) != len(readers) or min(weights) < 0.0 or sum(weights) <= 0.0:
        raise ValueError(f"weights: expected {len(readers)} numbers of at least 0, got {list(weights)}")
    scores: list[dict[str, Tensor]] = []
    labels: dict[str, int] = {}
    for reader, cache in zip(readers, caches, strict=True):
        if reader.task.name != "words" or reader.task.classes != readers[0].task.classes:
            raise ValueError(f"fuse: expected models of the same classes, got {reader.task.classes}")
        dataset = reader.dataset(cache, split)
        results = run_clips(
            reader.model, reader.task, dataset, middle_view(reader.transform, dataset.flow), reader.readout,
            sample=reader.sample, batch_size=batch_size,
        )  # fmt: skip
        scores.append(dict(zip(results.names, results.probabilities, strict=True)))
        labels = dict(zip(results.names, results.labels, strict=True))
        if different := scores[0].keys() ^ scores[-1].keys():
            raise ValueError(f"fuse: {cache} has other clips than {caches[0]}: {min(different)}")
    names = sorted(labels)
    weighted = [
        weight * torch.stack([by_name[name] for name in names]) for weight, by_name in zip(weights, scores, strict=True)
    ]
    return word_scores(torch.stack(weighted).sum(0) / sum(weights), torch.tensor([labels[name] for name in names]))


def _pictures(reader: TrainedReader, cache: str | Path, split: str) -> ClipDataset:
    """The clips to draw: with pictures, of a model that reads the flow alone too."""
    return (replace(reader, content="picture") if reader.content == "flow" else reader).dataset(cache, split)


def _crop_side(reader: TrainedReader, frames: Tensor) -> int:
    """Side of the middle crop, in pixels of the cached frames."""
    return min(reader.transform.validation_crop, frames.size(2), frames.size(3))


def _middle(reader: TrainedReader, frames: Tensor) -> Tensor:
    """The middle crop of uint8 (T, C, H, W), not resized."""
    side = _crop_side(reader, frames)
    top, left = (frames.size(2) - side) // 2, (frames.size(3) - side) // 2
    return frames[:, :, top : top + side, left : left + side]


def _first_of_each_class(dataset: ClipDataset, count: int) -> list[int]:
    """Clips in the order: the first of each class, the second of each class, ..."""
    seen: dict[int, int] = {}
    order = []
    for index, label in enumerate(dataset.labels):
        seen[label] = seen.get(label, 0) + 1
        order.append((seen[label], index))
    return [index for _, index in sorted(order)[:count]]
