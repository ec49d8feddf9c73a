"""Tables, JSON and charts of CPU measurements."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

import fused_convlstm

WINOGRAD = {"fused, Winograd": 2, "fused, Winograd 4x4": 4}  # with use_winograd("auto", tile)
DRAWN = dict(zip(("fused", *WINOGRAD), ("#3b6ea5", "#c8803a", "#8c2d19"), strict=True))  # colours of the bars


@dataclass(frozen=True)
class Measurement:
    """One implementation on one shape; times in milliseconds."""

    cell: str  # "conv_lstm2d", "pooled_gate_conv_lstm2d"
    task: str  # those of test_cpu.py, such as "inference float32"
    shape: str
    implementation: str  # "fused", those of WINOGRAD, "fused, gates recomputed", "eager", "channels_last", "compile"
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    flops: float
    peak_gflops: float  # the machine's measured matmul rate in this type
    peak_memory_mib: float | None = None  # of a training step, above what was there before
    backend: str | None = None

    @property
    def floor_ms(self) -> float:
        """Time of the direct convolutions alone at the measured matmul rate."""
        return self.flops / self.peak_gflops / 1e6


def machine() -> dict[str, str | int]:
    """Where and with what the numbers were measured."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fused_convlstm": fused_convlstm.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def tables(measurements: list[Measurement]) -> str:
    """One Markdown table for each cell and task."""
    groups: dict[tuple[str, str], dict[str, dict[str, Measurement]]] = {}
    for m in measurements:
        groups.setdefault((m.cell, m.task), {}).setdefault(m.shape, {})[m.implementation] = m
    return "\n\n".join(_table(cell, task, shapes) for (cell, task), shapes in groups.items())


def _table(cell: str, task: str, shapes: dict[str, dict[str, Measurement]]) -> str:
    training = task.startswith("training")
    header = ["shape", "fused ms", "strongest peer ms", "ratio", "floor ms", "share of floor"]
    header += ["recomputed ms", "memory", "recomputed"] if training else []
    winograd: dict[str, list[float]] = {
        name: [] for name in WINOGRAD if any(name in found for found in shapes.values())
    }
    for name in winograd:
        header += [f"{name.removeprefix('fused, ')} ms", "ratio"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    ratios = []
    for shape, by_name in shapes.items():
        fused = by_name["fused"]
        peers = {name: m for name, m in by_name.items() if not name.startswith("fused")}
        strongest = min(peers, key=lambda name: peers[name].median_ms)
        ratio = peers[strongest].median_ms / fused.median_ms
        ratios.append(ratio)
        row = [
            shape,
            f"{fused.median_ms:.3g}",
            f"{peers[strongest].median_ms:.3g} ({strongest})",
            f"{ratio:.2f}",
            f"{fused.floor_ms:.3g}",
            f"{fused.floor_ms / fused.median_ms:.0%}",
        ]
        if training:
            recomputed = by_name["fused, gates recomputed"]
            row += [f"{recomputed.median_ms:.3g}", _memory_ratio(fused, peers), _memory_ratio(recomputed, peers)]
        for name, its_ratios in winograd.items():
            if name in by_name:
                its_ratios.append(peers[strongest].median_ms / by_name[name].median_ms)
                row += [f"{by_name[name].median_ms:.3g}", f"{its_ratios[-1]:.2f}"]
        rows.append(row + [""] * (len(header) - len(row)))
    means = [cell for its_ratios in winograd.values() for cell in ("", f"{geometric_mean(its_ratios):.2f}")]
    rows.append(
        ["geometric mean", "", "", f"{geometric_mean(ratios):.2f}"] + [""] * (len(header) - 4 - len(means)) + means
    )
    body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return f"{cell}, {task}\n\n{body}"


def _memory_ratio(fused: Measurement, peers: dict[str, Measurement]) -> str:
    eager = peers["eager"].peak_memory_mib
    return "" if not eager or fused.peak_memory_mib is None else f"{fused.peak_memory_mib / eager:.2f}"


def chart(measurements: list[Measurement], path: Path) -> None:
    """Bars: how many times as fast as the strongest peer, a panel for each task (rows) and cell (columns)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for m in measurements:
        panels.setdefault(m.task, {}).setdefault(m.cell, {}).setdefault(m.shape, {})[m.implementation] = m.median_ms
    cells = list(dict.fromkeys(m.cell for m in measurements))
    figure, axes = plt.subplots(
        len(panels), len(cells), figsize=(7 * len(cells), 2.2 * len(panels)), squeeze=False, layout="constrained"
    )
    for row, (task, by_cell) in zip(axes, panels.items(), strict=True):
        for axis, cell in zip(row, cells, strict=True):
            shapes = by_cell.get(cell, {})
            peers = {
                shape: min(t for name, t in times.items() if not name.startswith("fused"))
                for shape, times in shapes.items()
            }
            drawn = [name for name in DRAWN if any(name in times for times in shapes.values())]
            width = 0.8 / max(1, len(drawn))
            for n, name in enumerate(drawn):
                ratios = {
                    k: peers[shape] / times[name] for k, (shape, times) in enumerate(shapes.items()) if name in times
                }
                places = [k + width * (n - (len(drawn) - 1) / 2) for k in ratios]
                bars = axis.bar(places, list(ratios.values()), width, color=DRAWN[name], label=name)
                axis.bar_label(bars, fmt="%.2f", fontsize=6)
            axis.axhline(1.0, color="black", linewidth=0.8)
            axis.set_title(f"{cell}, {task}", fontsize=9, loc="left")
            axis.set_ylabel("speed-up over peer", fontsize=8)
            axis.set_xticks(range(len(shapes)), list(shapes))
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(y=0.15)
    axes[0, 0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def faster_of_both(earlier: Path, measurements: list[Measurement]) -> list[Measurement]:
    """Those of the report ``earlier`` (.json), and of what was measured again the faster run, peers and all: other
    programs, and other guests of a virtual machine, only ever make a run slower.

    Raises:
        ValueError: the report is of another machine or other versions.
    """
    report, about = json.loads(earlier.read_text()), machine()
    differing = [key for key in about if key != "date" and about[key] != report["machine"].get(key)]
    if differing:
        raise ValueError(f"{earlier}: measured with other {', '.join(differing)}; measure all of it anew")
    kept = {(m.cell, m.task, m.shape, m.implementation): m for m in (Measurement(**m) for m in report["measurements"])}
    for m in measurements:
        key = m.cell, m.task, m.shape, m.implementation
        kept[key] = min(kept.get(key, m), m, key=lambda run: run.median_ms)
    return list(kept.values())


def write_report(measurements: list[Measurement], folder: Path, name: str, *, again: bool = False) -> str:
    """Writes ``name``.json, .md and .png into ``folder``; returns the Markdown. ``again``: see faster_of_both."""
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    if again:
        measurements = faster_of_both(folder / f"{name}.json", measurements)
    (folder / f"{name}.json").write_text(
        json.dumps({"machine": about, "measurements": [asdict(m) for m in measurements]}, indent=1) + "\n"
    )
    text = ", ".join(f"{key} {value}" for key, value in about.items()) + "\n\n" + tables(measurements) + "\n"
    (folder / f"{name}.md").write_text(text)
    chart(measurements, folder / f"{name}.png")
    return text
