"""Evaluation on a part of a cache (Courtney & Sreenivas, section 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..training.clips import ClipResults, middle_view, run_clips, test_views
from ..training.report import plot_confusion, plot_words, write_csv, write_json
from .reader import TrainedReader


def evaluate(
    reader: TrainedReader,
    cache: str | Path,
    split: str,
    out: Path,
    *,
    one_crop: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """Scores of ``reader`` on a part of a cache, with the average of six crops; the report goes to ``out``.

    The report: ``scores.json``; of words ``words.csv``, ``words.png`` (accuracy of each), ``confusion.csv`` and
    ``confusion.png``; of sentences ``sentences.csv``.

    Args:
        one_crop: use the one middle crop of the validation during training instead.
    """
    dataset = reader.dataset(cache, split)
    views = (middle_view if one_crop else test_views)(reader.transform, dataset.flow)
    results = run_clips(
        reader.model, reader.task, dataset, views, reader.readout, sample=reader.sample, batch_size=batch_size,
        progress=f"evaluate {split}" if progress else None,
    )  # fmt: skip
    scores: dict[str, Any] = {"clips": len(dataset), **reader.task.scores(results)}
    out.mkdir(parents=True, exist_ok=True)
    if reader.task.name == "words":
        _report_words(reader.task.classes, results, out)
    else:
        rows = [
            {"clip": name, "spoken": spoken, "read": read}
            for name, spoken, read in zip(results.names, results.texts, results.read, strict=True)
        ]
        write_csv(out / "sentences.csv", rows)
    write_json(out / "scores.json", scores)
    return scores


def _report_words(classes: list[str], results: ClipResults, out: Path) -> None:
    predicted = torch.stack(results.probabilities).argmax(dim=1)
    counts = multiclass_confusion_matrix(predicted, torch.tensor(results.labels), len(classes)).numpy()
    rows = []
    for k, word in enumerate(classes):
        wrong = counts[k].copy()
        wrong[k] = 0
        clips = int(counts[k].sum())
        rows.append(
            {
                "word": word,
                "clips": clips,
                "right": int(counts[k, k]),
                "accuracy": float(counts[k, k] / clips) if clips else 0.0,
                "most often read as instead": classes[int(np.argmax(wrong))] if wrong.any() else "",
            }
        )
    write_csv(out / "words.csv", rows)
    plot_words(out / "words.png", rows)
    spoken = [
        {"spoken": word, **dict(zip(classes, map(int, row), strict=True))}
        for word, row in zip(classes, counts, strict=True)
    ]
    write_csv(out / "confusion.csv", spoken)
    plot_confusion(out / "confusion.png", counts, classes)
