"""Recipes of the gesture, action and lipreading-baseline tables on tiny clips: train, stop, resume, evaluate, look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic_clips import make_word_cache
from test_gesture_models import NAMES

from fused_convlstm.analysis import TrainedReader, fuse, localize, visualize
from fused_convlstm.cli import main
from fused_convlstm.models.gesture import COMPONENTS
from fused_convlstm.models.video_lstm import DESIGNS
from fused_convlstm.training import Processes, Trainer, load_recipe

TINY = [
    "training.epochs=2", "training.batch_size=8", "training.checkpoint_seconds=0", "training.frames=[[0, 6]]",
    "transform.size=24", "transform.crop=[28, 32]", "transform.validation_crop=30", "transform.shift=1",
    "transform.test_crops=[30]", "data.content=null",
]  # fmt: skip
VIDEO = "{hidden_channels: 6, motion_channels: 5, backbone_channels: [4, 4, 6, 6], head_channels: 8}"
ACTION = (
    "{backbone: small, motion: difference, hidden_channels: 6, motion_channels: 5, backbone_channels: [4, 4, 6, 6]}"
)
LIPS = "{width: 0.1, features: 8}"
VGGM = "{channels: [4, 6, 6, 6, 6], fc_channels: 8, frames: 8, head_channels: 8}"
RUNS = {  # a recipe, the model, options that make it tiny
    "gesture_jester": ("res3d_pooled_gate_mobilenet", "{width: 0.07}"),
    "action_small": ("video_motion_small", VIDEO),
    "lip_baseline": ("resnet18_3d_bilstm", LIPS),
}
ROWS = {  # every row of the papers' tables: its recipe, options that make it tiny
    **{f"res3d_{component}_mobilenet": ("gesture_jester", "{width: 0.07}") for component in COMPONENTS},
    "cnn3d_biconvlstm_cnn2d": ("gesture_isogd", "{width: 0.05}"),
    "res3d": ("gesture_isogd", "{width: 0.07}"),
    "c3d": ("gesture_isogd", "{width: 0.03}"),
    "pyramidal_c3d": ("gesture_isogd", "{width: 0.03}"),
    "resnet50": ("gesture_isogd", "{width: 0.05}"),
    **{f"video_{design}": ("action", ACTION) for design in DESIGNS},
    "vggm_multitower": ("lip_baseline", VGGM),
    "vggm_lstm": ("lip_baseline", VGGM),
    **{f"resnet{row}": ("lip_baseline", LIPS) for row in ("34_2d_conv", "34_3d_conv", "34_3d_bilstm", "18_3d_bilstm")},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_word_cache(tmp_path_factory.mktemp("cache"), per_word=(4, 2, 2))


def make_trainer(
    name: str, model: str, options: str, cache: Path, out: Path, *more: str, resume: bool = False
) -> Trainer:
    settings = [f"data.cache={cache}", *TINY, f"model.name={model}", f"model.options={options}", *more]
    return Trainer(load_recipe(name, settings), out, Processes.join("cpu"), resume=resume, progress=False)


def train(name: str, model: str, options: str, cache: Path, out: Path, *more: str, resume: bool = False) -> Trainer:
    trainer = make_trainer(name, model, options, cache, out, *more, resume=resume)
    trainer.fit()
    return trainer


def test_rows_are_all_models() -> None:
    assert sorted(ROWS) == sorted(NAMES)


@pytest.mark.parametrize("model", ROWS)
def test_every_row_trains_and_resumes(model: str, tmp_path: Path) -> None:
    name, options = ROWS[model]
    cache = make_word_cache(tmp_path / "cache", per_word=(2, 1, 1))
    two_steps = ("training.epochs=1", "training.batch_size=4")
    whole = train(name, model, options, cache, tmp_path / "whole", *two_steps)
    assert whole.step == 2
    assert whole.history[0]["train_loss"] < 20

    class StopError(Exception):
        pass

    stopped = make_trainer(name, model, options, cache, tmp_path / "stopped", *two_steps)
    step = stopped._train_step

    def stop_after_one(*args: Any) -> float:
        if stopped.step == 1:
            raise StopError
        return step(*args)

    stopped._train_step = stop_after_one  # type: ignore[method-assign]
    with pytest.raises(StopError):
        stopped.fit()
    resumed = train(name, model, options, cache, tmp_path / "stopped", *two_steps, resume=True)
    for key, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[key], value, rtol=0, atol=0, msg=key)
    # The saved model is the trained one: one epoch, so the best.
    for key, value in TrainedReader.load(tmp_path / "stopped").model.state_dict().items():
        torch.testing.assert_close(value, resumed.model.state_dict()[key], rtol=0, atol=0, msg=key)


def test_fine_tuning_takes_all_but_the_head(cache: Path, tmp_path: Path) -> None:
    """Jester, then IsoGD: other classes, other lengths, the same network."""
    model, options = RUNS["gesture_jester"]
    first = train("gesture_jester", model, options, cache, tmp_path / "jester")
    more = [f"training.init_from={tmp_path / 'jester' / 'model.safetensors'}", "data.classes=[left, right, up]"]
    tuned = make_trainer("gesture_isogd", model, options, cache, tmp_path / "isogd", *more)
    assert tuned.model.head.out_features == 3
    saved = TrainedReader.load(tmp_path / "jester").model.state_dict()
    for key, value in tuned.model.state_dict().items():
        if not key.startswith("head"):
            torch.testing.assert_close(value, saved[key], rtol=0, atol=0)
    assert first.recipe.training.optimizer == "sgd"
    tuned.fit()


def test_learning_rate_of_the_paper() -> None:
    """From 1e-3 to 1e-6 with exponent 0.9 (the authors' code)."""
    from fused_convlstm.training.trainer import learning_rate

    recipe = load_recipe("gesture_jester").training
    assert learning_rate(recipe, 0, 100, []) == pytest.approx(1e-3)
    assert learning_rate(recipe, 1500, 100, []) == pytest.approx((1e-3 - 1e-6) * 0.5**0.9 + 1e-6)
    assert learning_rate(recipe, 2999, 100, []) < 2e-6


def test_reports(cache: Path, tmp_path: Path) -> None:
    model, options = RUNS["action_small"]
    train("action_small", model, options, cache, tmp_path / "run")
    reader = TrainedReader.load(tmp_path / "run")
    paths = visualize(reader, cache, "test", tmp_path / "maps", clips=2)
    assert len(paths) == 2
    assert {path.stem.split("_")[0] for path in paths} == {"down", "left"}, "one of each class first"
    assert all(path.stat().st_size > 1000 and path.with_suffix(".mp4").stat().st_size > 500 for path in paths)
    scores = localize(reader, cache, "test", tmp_path / "tubes", pictures=1)
    assert scores == json.loads((tmp_path / "tubes" / "localization.json").read_text())
    rows = (tmp_path / "tubes" / "tubes.csv").read_text().splitlines()
    assert len(rows) == 1 + 8 * 8, "a box for each of 8 frames of 8 clips"
    assert len(list((tmp_path / "tubes").glob("*.png"))) == 1


def test_late_fusion(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, options = RUNS["lip_baseline"]
    for k in range(2):
        train("lip_baseline", model, options, cache, tmp_path / str(k), f"seed={k}")
    readers = [TrainedReader.load(tmp_path / str(k)) for k in range(2)]
    alone = [fuse([reader, reader], [cache, cache], "test") for reader in readers]
    assert fuse(readers, [cache, cache], "test", weights=[1.0, 0.0]) == alone[0]
    assert fuse(readers, [cache, cache], "test", weights=[0.0, 2.0]) == alone[1]
    assert main(["fuse", str(tmp_path / "0"), str(tmp_path / "1")]) == 0
    assert capsys.readouterr().out.startswith("top1 ")
    with pytest.raises(ValueError, match="fuse: expected two models or more"):
        fuse(readers[:1], [cache], "test")
    with pytest.raises(ValueError, match="weights: expected 2 numbers"):
        fuse(readers, [cache, cache], "test", weights=[1.0])


def test_commands(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    settings = [s for value in TINY for s in ("--set", value)]
    arguments = ["--set", "model.name=video_convalstm_small", "--set", f"model.options={VIDEO}", "--quiet"]
    assert main(["train", "action_small", str(cache), run, *settings, *arguments, "--device", "cpu"]) == 0
    assert main(["visualize", run, "--clips", "1", "--device", "cpu"]) == 0
    assert main(["localize", run, "--device", "cpu"]) == 0
    assert "report:" in capsys.readouterr().out
    assert len(list((tmp_path / "run" / "maps").iterdir())) == 2
