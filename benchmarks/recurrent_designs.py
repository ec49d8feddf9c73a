"""The recurrent layers of the gesture and action papers, trained and measured under equal conditions on rendered clips.

    python benchmarks/recurrent_designs.py gestures runs/gestures   # table 1 of Zhang et al.
    python benchmarks/recurrent_designs.py actions runs/actions     # VideoLSTM and what it is compared with

Renders the set, trains every design with three seeds (--seeds) by the recipe of the set, evaluates each on the test
clips, measures parameters, multiply-adds and the time of a training step, and writes the table into
docs/gesture-action.md. What is done already is not done again: it goes on where it was interrupted. Delete the folder
to start anew.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from update_readme import ROOT, replace_sections

from fused_convlstm import MotionAttentionConvLSTM2d, use_backend
from fused_convlstm.cli import main as fused_convlstm
from fused_convlstm.models import create_model
from fused_convlstm.training import Recipe, load_recipe

DOCS = ROOT / "docs" / "gesture-action.md"
TIMED_STEPS = 3


@dataclass(frozen=True)
class Design:
    """A row of a table.

    Attributes:
        title: its name.
        model: name of the paper's network, and with ``_small`` behind it of the one that is trained.
        layer: name of the recurrent layer in both.
        paper: parameters and multiply-adds of the layer in the paper.
        localizes: whether its attention is compared with the true boxes.
    """

    title: str
    model: str
    layer: str
    paper: tuple[str, ...] = ()
    localizes: bool = False


@dataclass(frozen=True)
class Study:
    """A table.

    Attributes:
        generate: options of ``generate``.
        recipe: by which every design is trained.
        frames: (T, C, H, W) of what the recurrent layer of the paper's network sees of a clip.
        motion_channels: of the motion beside it.
    """

    designs: tuple[Design, ...]
    generate: tuple[str, ...]
    recipe: str
    frames: tuple[int, int, int, int]
    motion_channels: int = 0


COMPONENTS = (
    Design("ConvLSTM", "res3d_convlstm_mobilenet", "lstm1", paper=("4.719 M", "3700 M")),
    Design("variant (a)", "res3d_pooled_gate_mobilenet", "lstm1", paper=("0.529 M", "415 M")),
    Design("variant (b)", "res3d_input_attention_mobilenet", "lstm1", paper=("0.667 M", "522 M")),
    Design("variant (c)", "res3d_input_gate_attention_mobilenet", "lstm1", paper=("0.601 M", "472 M")),
    Design("variant (d)", "res3d_output_gate_attention_mobilenet", "lstm1", paper=("0.601 M", "472 M")),
)
VIDEO_DESIGNS = (
    Design("LSTM", "video_lstm", "lstm"),
    Design("ALSTM", "video_alstm", "lstm", localizes=True),
    Design("ConvLSTM", "video_convlstm", "lstm"),
    Design("ConvALSTM", "video_convalstm", "lstm", localizes=True),
    Design("ConvALSTM + motion (VideoLSTM)", "video_motion", "lstm", localizes=True),
)
PREPARE = ("--whole", "64", "64", "--rgb", "--flow", "dis")
# chosen on the validation clips for VideoLSTM, seeds 0 and 1
LOCALIZE = ("--power", "0.2", "--spread", "0.075", "--threshold", "0.3")
STUDIES = {
    "gestures": Study(COMPONENTS, ("--set", "gestures"), "gesture_small", (8, 256, 28, 28)),
    "actions": Study(VIDEO_DESIGNS, ("--set", "actors", "--camera", "0.25"), "action_small", (30, 512, 7, 7), 64),
}


# --- training ------------------------------------------------------------------------------------------------------


def train_all(study: Study, folder: Path, seeds: int) -> None:
    """All runs, seed by seed, so that a study that was interrupted has whole seeds."""
    clips, cache = folder / "clips", folder / "cache"
    run("generate", clips, *study.generate)
    run("prepare", "folders", clips, cache, *PREPARE)
    for seed in range(seeds):
        for design in study.designs:
            out = run_folder(folder, design, seed)
            if not (out / "evaluation" / "scores.json").is_file():
                settings = ("--set", f"model.name={design.model}_small", "--set", f"seed={seed}")
                run("train", study.recipe, cache, out, *settings, "--resume", "--quiet", "--device", "cpu")
                run("evaluate", out, "--quiet", "--device", "cpu")
            if design.localizes and not (out / "tubes" / "localization.json").is_file():
                run("localize", out, *LOCALIZE, "--device", "cpu")


def run(*arguments: object) -> None:
    """One command of ``fused-convlstm``."""
    if fused_convlstm([str(argument) for argument in arguments]):
        raise SystemExit(f"fused-convlstm {arguments[0]} failed")


def run_folder(folder: Path, design: Design, seed: int) -> Path:
    return folder / f"{design.model}-{seed}"


# --- measuring -----------------------------------------------------------------------------------------------------


def measure(study: Study, design: Design) -> dict[str, float]:
    """Parameters, multiply-adds of a step and CPU seconds of a training step of the paper's recurrent layer, and CPU
    seconds of a training step of the network that is trained."""
    steps, channels, height, width = study.frames
    layer = getattr(create_model(design.model), design.layer)
    size = () if isinstance(layer, nn.LSTM) else (height, width)
    clip = torch.randn(steps, 1, channels, *size)
    motion = [torch.randn(steps, 1, study.motion_channels, *size)] if needs_motion(layer) else []
    recipe = load_recipe(study.recipe, [f"model.name={design.model}_small"])
    return {
        "parameters": sum(p.numel() for p in layer.parameters()),
        "mult_adds": mult_adds(layer, clip[:1], *(m[:1] for m in motion)),
        "layer_seconds": training_seconds(layer, lambda: layer(clip, *motion)[0].square().mean()),
        "network_seconds": network_seconds(recipe),
    }


def needs_motion(layer: nn.Module) -> bool:
    return isinstance(layer, MotionAttentionConvLSTM2d)


def mult_adds(layer: nn.Module, *inputs: Tensor) -> float:
    """As PyTorch counts: the operators in plain PyTorch, ``nn.LSTM`` without oneDNN's."""
    with (
        torch.no_grad(), use_backend("reference"), torch.backends.mkldnn.flags(enabled=False),
        FlopCounterMode(display=False) as counter,
    ):  # fmt: skip
        layer(*inputs)
    return counter.get_total_flops() / 2


def network_seconds(recipe: Recipe) -> float:
    """Of a batch of the recipe."""
    channels = {"flow": 2, "picture": 3}[recipe.data.content or "picture"]
    network = create_model(recipe.model.name, **{**recipe.model.options, "in_channels": channels})
    side, steps, batch = recipe.transform.size, recipe.training.frames_at(0) or 1, recipe.training.batch_size
    frames = torch.randn(steps, batch, channels, side, side)
    return training_seconds(network, lambda: network(frames)[0].square().mean())


def training_seconds(module: nn.Module, loss: Callable[[], Tensor]) -> float:
    """CPU seconds of forward, backward and an update: the median of some steps, after one that is not counted."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6)
    seconds = []
    for _ in range(TIMED_STEPS + 1):
        start = time.process_time()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def measured(study: Study, folder: Path) -> dict[str, dict[str, float]]:
    """:func:`measure` of each design, kept in ``folder``."""
    path = folder / "measured.json"
    found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.is_file() else {}
    for design in study.designs:
        if design.model not in found:
            found[design.model] = measure(study, design)
            path.write_text(json.dumps(found, indent=2) + "\n")
    return found


# --- the tables ----------------------------------------------------------------------------------------------------


def accuracy(folder: Path, design: Design, seeds: int) -> str:
    return spread([100 * read(folder, design, seed, "evaluation/scores.json")["top1"] for seed in range(seeds)], 1)


def localization(folder: Path, design: Design, score: str, seeds: int) -> str:
    if not design.localizes:
        return ""
    return spread([read(folder, design, seed, "tubes/localization.json")[score] for seed in range(seeds)], 2)


def read(folder: Path, design: Design, seed: int, name: str) -> Any:
    return json.loads((run_folder(folder, design, seed) / name).read_text())


def spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def counts(found: dict[str, float]) -> list[str]:
    return [f"{found['parameters']:,.0f}", f"{found['mult_adds'] / 1e6:,.0f} M"]


def seconds(found: dict[str, float]) -> list[str]:
    return [f"{found['layer_seconds']:.2f}", f"{found['network_seconds']:.2f}"]


def table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def gesture_table(study: Study, folder: Path, seeds: int) -> str:
    header = ["component", "top-1, %", "parameters", "paper", "mult-adds", "paper", "s/step", "network, s/step"]
    rows = []
    for design in study.designs:
        found = measured(study, folder)[design.model]
        parameters, adds = counts(found)
        cells = [parameters, design.paper[0], adds, design.paper[1]]
        rows.append([design.title, accuracy(folder, design, seeds), *cells, *seconds(found)])
    return table(header, rows)


def action_table(study: Study, folder: Path, seeds: int) -> str:
    header = ["design", "top-1, %", "mean IoU", "pointing", "parameters", "mult-adds", "s/step", "network, s/step"]
    rows = []
    for design in study.designs:
        found = measured(study, folder)[design.model]
        where = [localization(folder, design, score, seeds) for score in ("mean_iou", "pointing")]
        rows.append([design.title, accuracy(folder, design, seeds), *where, *counts(found), *seconds(found)])
    return table(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    chosen = STUDIES[options.study]
    train_all(chosen, options.folder, options.seeds)
    made = (gesture_table if options.study == "gestures" else action_table)(chosen, options.folder, options.seeds)
    DOCS.write_text(replace_sections(DOCS.read_text(), {options.study: made}))
    print(made)
