"""Which spatiotemporal scales a model uses (Courtney & Sreenivas, section 5.1, fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..training.clips import middle_view, run_clips
from ..training.report import plot_heat_map, write_csv, write_json
from .reader import TrainedReader

PERIODS = (1, 3, 5, 10, 15)


def sensitivity(
    reader: TrainedReader,
    cache: str | Path,
    split: str,
    out: Path,
    *,
    periods: Sequence[int] = PERIODS,
    clips: int | None = 5000,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Score of ``reader``, relative to normal, with the states of one scale's ConvLSTMs reset every T frames.

    The table, a row a scale and a column a T, goes to ``sensitivity.csv`` and ``sensitivity.png`` in ``out``.

    Args:
        periods: the values of T.
        clips: so many random clips are taken; None: all.

    Raises:
        ValueError: the model has no ConvLSTMs, or gets nothing right in the first place; ``clips`` is less than 1.
    """
    if clips is not None and clips < 1:
        raise ValueError(f"clips: expected at least 1, got {clips}")
    model, task = reader.model, reader.task
    if not model.scales:
        raise ValueError(f"model: {reader.name} has no ConvLSTMs whose states could be reset")
    dataset = reader.dataset(cache, split)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = sorted(order[:clips])

    def score(resets: tuple[str, int] | None, name: str) -> float:
        results = run_clips(
            model, task, dataset, middle_view(reader.transform, dataset.flow), reader.readout, sample=reader.sample,
            batch_size=batch_size, resets=resets, indices=chosen, progress=name if progress else None,
        )  # fmt: skip
        return task.scores(results)[task.score]

    normal = score(None, "normal")
    if normal <= 0.0:
        raise ValueError(f"model: {reader.name} reads nothing right on {split!r}: no relative score can be given")
    table = np.array([[score((s, t), f"{s}, T = {t}") / normal for t in periods] for s in model.scales])
    rows = [
        {"scale": _fraction(scale), **{f"T={t}": float(value) for t, value in zip(periods, values, strict=True)}}
        for scale, values in zip(model.scales, table, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "sensitivity.csv", rows)
    write_json(out / "sensitivity.json", {"clips": len(chosen), task.score: normal, "relative": rows})
    plot_heat_map(
        out / "sensitivity.png", table, [_fraction(scale) for scale in model.scales], periods,
        title=f"{reader.name}: {task.score} relative to {normal:.1%}",
        xlabel="states reset every T frames", ylabel="scale",
    )  # fmt: skip
    return rows


def _fraction(scale: str) -> str:
    """ "s4" as "s/4"; other names stay."""
    return f"s/{scale[1:]}" if scale[0] == "s" and scale[1:].isdigit() else scale
