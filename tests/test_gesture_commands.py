"""From the folder layouts of gesture and action sets to trained, fused and predicting models, on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from synthetic_clips import WORDS, moving_bar

from fused_convlstm.analysis import TrainedReader, read_stream, read_words
from fused_convlstm.analysis.visualize import _pictures
from fused_convlstm.cli import main
from fused_convlstm.data import ClipDataset, WholeFrame, split_by_name, write_video
from fused_convlstm.training import load_recipe

STEPS = 8
WHOLE = ["--whole", "32", "32", "--workers", "0"]
TINY = {
    "training.epochs": "1", "training.batch_size": "4", "training.frames": "[[0, 6]]", "transform.size": "24",
    "transform.crop": "[28, 32]", "transform.validation_crop": "30", "transform.shift": "1",
    "transform.test_crops": "[30]",
}  # fmt: skip
VIDEO = "{hidden_channels: 6, motion_channels: 5, backbone_channels: [4, 4, 6, 6], head_channels: 8}"


def bar(word: str, seed: int) -> np.ndarray:
    """(T, 32, 32, 3) uint8."""
    return moving_bar(word, STEPS, np.random.default_rng(seed))[:, 0, :, :, None].repeat(3, axis=3)


def write(path: Path, word: str, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, list(bar(word, seed)))


def prepare(layout: str, root: Path, cache: Path, *more: str) -> dict[str, list[tuple[str, str]]]:
    """Runs the command; returns name and class of the clips of each split."""
    assert main(["prepare", layout, str(root), str(cache), *WHOLE, *more]) == 0
    splits: dict[str, list[tuple[str, str]]] = {}
    for record in json.loads((cache / "index.json").read_text()):
        splits.setdefault(record["split"], []).append((record["name"], record["label"]))
    return {split: sorted(clips) for split, clips in splits.items()}


def train(recipe: str, cache: Path, run: Path, model: str, options: str, *settings: str) -> None:
    chosen = [*(f"{key}={value}" for key, value in TINY.items()), f"model.name={model}", f"model.options={options}"]
    arguments = [part for setting in [*chosen, *settings] for part in ("--set", setting)]
    assert main(["train", recipe, str(cache), str(run), *arguments, "--quiet", "--device", "cpu"]) == 0


# --- prepare -------------------------------------------------------------------------------------------------------


def test_jester(tmp_path: Path) -> None:
    root = tmp_path / "20bn-jester-v1"
    for identity, word in (("1", "left"), ("2", "right")):
        (root / identity).mkdir(parents=True)
        for number, frame in enumerate(bar(word, 0), start=1):
            cv2.imwrite(str(root / identity / f"{number:05d}.jpg"), frame)
    (tmp_path / "jester-v1-train.csv").write_text("1;Swiping Left\n")
    (tmp_path / "jester-v1-validation.csv").write_text("2;Swiping Right\n")
    splits = prepare("jester", root, tmp_path / "cache")
    assert splits == {"train": [("1", "Swiping Left")], "val": [("2", "Swiping Right")]}
    assert ClipDataset(tmp_path / "cache", "train")[0].frames.shape == (STEPS, 3, 32, 32)


@pytest.mark.parametrize("fold", [1, 2])
def test_ucf101_and_its_folds(fold: int, tmp_path: Path) -> None:
    root, lists = tmp_path / "UCF-101", tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    clips = [f"Archery/v_Archery_g{group}_c01" for group in ("01", "08", "24")]
    for clip in clips:
        write(root / f"{clip}.avi", "up")
    for number, order in ((1, clips), (2, [clips[1], clips[0], clips[2]])):
        (lists / f"testlist0{number}.txt").write_text(f"{order[0]}.avi\n")
        (lists / f"trainlist0{number}.txt").write_text(f"{order[1]}.avi 3\n{order[2]}.avi 3\n")
    splits = prepare("ucf101", root, tmp_path / "cache", *(["--fold", str(fold)] if fold > 1 else []))
    test, training = clips[:2] if fold == 1 else clips[1::-1]
    assert splits == {"train": [(training, "Archery")], "val": [(clips[2], "Archery")], "test": [(test, "Archery")]}


def test_hmdb51_and_its_folds(tmp_path: Path) -> None:
    root, lists = tmp_path / "hmdb51", tmp_path / "testTrainMulti_7030_splits"
    lists.mkdir()
    training = next(name for name in map(str, range(100)) if split_by_name(name) == "train")
    validation = next(name for name in map(str, range(100)) if split_by_name(name) == "val")
    names = [f"{film}_wave_f_cm" for film in (training, validation, "other")]
    for name in names:
        write(root / "wave" / f"{name}.avi", "down")
    (lists / "wave_test_split3.txt").write_text(f"{names[0]}.avi 1\n{names[1]}.avi 1\n{names[2]}.avi 2\n")
    splits = prepare("hmdb51", root, tmp_path / "cache", "--fold", "3")
    named = {"train": names[0], "val": names[1], "test": names[2]}
    assert splits == {split: [(f"wave/{name}", "wave")] for split, name in named.items()}
    assert main(["prepare", "hmdb51", str(root), str(tmp_path / "other"), *WHOLE]) == 2  # no lists of fold 1


def test_fold_is_for_sets_with_folds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "jester", str(tmp_path), str(tmp_path / "cache"), "--fold", "2"]) == 2
    assert "--fold: only with the layouts ucf101 and hmdb51" in capsys.readouterr().err


# --- late fusion of RGB, depth and flow ----------------------------------------------------------------------------


def test_isogd_rgb_depth_flow_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands of table 2's modalities and of their late fusion."""
    root = tmp_path / "IsoGD"
    for split, count in (("train", 2), ("valid", 1)):
        lines = []
        for label, word in enumerate(WORDS[:2], start=1):
            for number in range(count):
                clip = f"{split}/{label:03d}/{{}}_{number:05d}.avi"
                write(root / clip.format("M"), word, number)
                write(root / clip.format("K"), word, number + 10)
                lines.append(f"{clip.format('M')} {clip.format('K')} {label}")
        (root / f"{split}_list.txt").write_text("\n".join(lines) + "\n")
    (root / "test_list.txt").write_text("")
    rgb, depth = tmp_path / "rgb", tmp_path / "depth"
    splits = prepare("isogd-rgb", root, rgb, "--flow", "farneback")
    assert prepare("isogd-depth", root, depth) == splits
    assert [label for _, label in splits["val"]] == ["001", "002"]
    runs = [tmp_path / name for name in ("run-rgb", "run-depth", "run-flow")]
    for run, cache, content in zip(runs, (rgb, depth, rgb), ("picture", "null", "flow"), strict=True):
        train("gesture_isogd", cache, run, "res3d", "{width: 0.07}", f"data.content={content}")
        assert TrainedReader.load(run).model.config.in_channels == (2 if content == "flow" else 3)
    capsys.readouterr()
    assert main(["fuse", *map(str, runs), "--split", "val", "--weights", "2", "1", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("top1 ")


# --- segments, prediction ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def action(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of VideoLSTM on clips with flow, tested on segments."""
    folder = tmp_path_factory.mktemp("action")
    for word in WORDS[:2]:
        for split, count in (("train", 2), ("val", 1), ("test", 1)):
            for number in range(count):
                write(folder / "clips" / word / split / f"{word}_{split}_{number}.mp4", word, number)
    prepare("folders", folder / "clips", folder / "cache", "--rgb", "--flow", "dis")
    options = VIDEO.replace("{", "{backbone: small, ", 1)
    train("action", folder / "cache", folder / "run", "video_motion", options, "training.frames=[[0, 5]]")
    return folder


def test_actions_are_tested_on_segments(action: Path) -> None:
    """25 segments: the mean of what the model gives for each."""
    assert load_recipe("action").transform.segments == 25
    assert main(["evaluate", str(action / "run"), "--device", "cpu", "--quiet"]) == 0
    reader = TrainedReader.load(action / "run")
    clip = reader.dataset(action / "cache", "test")[0]
    (word,) = read_words(reader, clip.frames.numpy(), threshold=0.0)
    views = []
    for place in np.linspace(0, STEPS - 5, 25).round().astype(int):
        part = clip.frames[place : place + 5]
        (read,) = read_words(whole_clip(reader), part.numpy(), threshold=0.0)
        views.append((read.text, read.probability))
    probability = np.mean([p if text == word.text else 1 - p for text, p in views])  # of two classes
    assert word.probability == pytest.approx(probability, abs=1e-5)
    assert (word.start, word.end) == (0, STEPS)


def whole_clip(reader: TrainedReader) -> TrainedReader:
    """``reader`` without segments, on clips of as many frames as it was trained on."""
    return replace(reader, transform=replace(reader.transform, segments=0))


def test_predict_makes_the_flow_that_the_cache_has(action: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reader = TrainedReader.load(action / "run")
    assert reader.source["flow"] == "dis"
    assert reader.crop == WholeFrame(32, 32)
    clip = reader.dataset(action / "cache", "test")[0]
    video = action / "clips" / clip.text / "test" / f"{clip.text}_test_0.mp4"
    assert torch.equal(torch.from_numpy(reader.read_video(video)), clip.frames)
    (word,) = read_words(reader, clip.frames.numpy(), threshold=0.0)
    assert main(["predict", str(action / "run"), str(video), "--threshold", "0", "--device", "cpu"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["0.00", f"{STEPS / 25:.2f}", f"{word.probability:.3f}", word.text]
    with pytest.raises(ValueError, match="model: video_motion reads a clip from both ends"):
        next(read_stream(reader, []))


@pytest.mark.parametrize(("content", "channels"), [("flow", 2), ("picture", 3)])
def test_predict_of_gestures(content: str, channels: int, action: Path, tmp_path: Path) -> None:
    """Frames spread over the whole video, as in training, of the pictures or of the flow alone."""
    settings = [f"data.content={content}", "training.readout=mean"]
    options = VIDEO.replace("{", "{initial_state: false, ", 1)
    train("gesture_small", action / "cache", tmp_path / "run", "video_lstm_small", options, *settings)
    reader = TrainedReader.load(tmp_path / "run")
    clip = reader.dataset(action / "cache", "test")[0]
    frames = reader.read_video(action / "clips" / clip.text / "test" / f"{clip.text}_test_0.mp4")
    assert frames.shape == (STEPS, channels, 32, 32)
    assert torch.equal(torch.from_numpy(frames), clip.frames)
    (word,) = read_words(reader, frames, threshold=0.0)
    assert (word.start, word.end) == (0, STEPS)
    assert read_words(reader, frames, threshold=1.0) == []
    drawn = _pictures(reader, action / "cache", "test")[0].frames
    assert drawn.shape == (STEPS, 3, 32, 32), "pictures are drawn also where the model reads flow alone"
    with pytest.raises(ValueError, match="reads frames spread over a whole clip; it cannot read a stream"):
        next(read_stream(reader, []))
