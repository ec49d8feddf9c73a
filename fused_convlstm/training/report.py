"""The report folder: numbers as CSV and JSON, and pictures of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..configuration import atomic_path


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """``rows`` under the keys of all of them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own, without a window system or global state."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: Path, figure: Figure) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_curves(path: Path, history: Sequence[dict[str, Any]], score: str) -> None:
    """Loss, score and learning rate over the epochs."""
    figure = new_figure(12, 3.6)
    left, middle, right = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    left.plot(epochs, [row["train_loss"] for row in history], label="training", color="tab:blue")
    left.set(xlabel="epoch", ylabel="loss", title="Training loss")
    values = [row[f"validation_{score}"] for row in history]
    middle.plot(epochs, values, color="tab:green", label="validation")
    if all(f"train_{score}" in row for row in history):
        middle.plot(epochs, [row[f"train_{score}"] for row in history], color="tab:blue", label="training")
    best = int(np.argmax(values))
    middle.plot(epochs[best], values[best], "o", color="tab:green")
    middle.annotate(f"{values[best]:.3f}", (epochs[best], values[best]), (0, -14), textcoords="offset points")
    middle.set(xlabel="epoch", ylabel=score, title="Score", ylim=(min(0.0, *values), 1.02))
    middle.legend(loc="lower right")
    right.step(epochs, [row["learning_rate"] for row in history], where="post", color="tab:orange")
    right.set(xlabel="epoch", title="Learning rate", yscale="log")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    save_figure(path, figure)


def plot_confusion(path: Path, confusion: npt.NDArray[np.int64], classes: Sequence[str]) -> None:
    """Rows are the words spoken, columns the words read, in shares of each row. Many classes go unlabelled."""
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    count = len(classes)
    side = min(4.0 + 0.35 * count, 16.0)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if count <= 60:
        axes.set_xticks(range(count), classes, rotation=90)
        axes.set_yticks(range(count), classes)
    if count <= 20:
        for i, j in zip(*np.nonzero(confusion), strict=True):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(confusion[i, j]), ha="center", va="center", color=colour, fontsize=9)
    accuracy = np.trace(confusion) / max(int(confusion.sum()), 1)
    axes.set(xlabel="read", ylabel="spoken", title=f"Confusion of {count} words, {accuracy:.1%} right")
    figure.colorbar(picture, ax=axes, shrink=0.8, label="share of the spoken word")
    save_figure(path, figure)


def plot_words(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Accuracy of each word, best first; of many words, the 25 best and the 25 worst."""
    rows = sorted(rows, key=lambda row: row["accuracy"])
    shown = rows if len(rows) <= 50 else [*rows[:25], *rows[-25:]]
    figure = new_figure(7, 1.5 + 0.24 * len(shown))
    axes = figure.subplots()
    bars = axes.barh([row["word"] for row in shown], [row["accuracy"] for row in shown], color="tab:blue")
    axes.bar_label(bars, [f"{row['accuracy']:.0%}" for row in shown], padding=3, fontsize=8)
    axes.set(xlim=(0, 1.1), xlabel="accuracy", title="Accuracy of each word")
    save_figure(path, figure)


def plot_heat_map(
    path: Path,
    values: npt.NDArray[np.float64],  # (rows, columns)
    rows: Sequence[str],
    columns: Sequence[Any],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
) -> None:
    """A table of shares, coloured and with its numbers."""
    figure = new_figure(2.5 + 0.95 * len(columns), 1.8 + 0.6 * len(rows))
    axes = figure.subplots()
    picture = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(1.0, float(values.max())), aspect="auto")
    axes.set_xticks(range(len(columns)), list(map(str, columns)))
    axes.set_yticks(range(len(rows)), list(rows))
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.1%}", ha="center", va="center", color="white" if value < 0.6 else "black")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(picture, ax=axes)
    save_figure(path, figure)
