"""The command line, from a cache to a report, and what it says to wrong use."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_clips import SIDE, WORDS, make_sentence_cache, make_word_cache, moving_bar

from fused_convlstm.analysis import TrainedReader, read_stream, read_words, sensitivity
from fused_convlstm.analysis.sensitivity import _fraction
from fused_convlstm.cli import main
from fused_convlstm.data import WholeFrame, write_video
from fused_convlstm.models import create_model, save_model
from fused_convlstm.training import load_recipe

RECIPE = """
task: {task}
transform: {{crop: [26, 30], size: 16, flip: 0.0, validation_crop: 28, test_crops: [26, 30]}}
model:
  name: resnet_convlstm
  options: {{blocks: [1, 1], mid_channels: [4, 4], out_channels: [4, 8], recurrent: [true, true], head_channels: 8}}
training: {{epochs: 1, batch_size: 8, frames: [], learning_rate: 1e-2}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cache of words, one of sentences, and a run on each."""
    folder = tmp_path_factory.mktemp("cli")
    make_word_cache(folder / "cache")
    make_sentence_cache(folder / "sentences")
    for task, cache in (("words", "cache"), ("characters", "sentences")):
        (folder / f"{task}.yaml").write_text(RECIPE.format(task=task))
        arguments = [
            str(folder / f"{task}.yaml"),
            str(folder / cache),
            str(folder / task),
            "--device",
            "cpu",
            "--quiet",
        ]
        assert main(["train", *arguments]) == 0
    return folder


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_help(capsys):
    for arguments in ([], ["train"], ["prepare"], ["generate"], ["evaluate"], ["sensitivity"], ["predict"]):
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--help"])
        assert stop.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) > 4


def test_info(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out


def test_list(capsys):
    assert main(["train", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "resnet_convlstm_small" in printed
    assert "vggm_convlstm" in printed


def test_evaluate_words(folder, capsys):
    assert main(["evaluate", str(folder / "words"), "--device", "cpu", "--quiet"]) == 0
    out = folder / "words" / "evaluation"
    scores = json.loads((out / "scores.json").read_text())
    assert scores["clips"] == 16
    assert f"top1 {scores['top1']:.4f}" in capsys.readouterr().out
    words = rows_of(out / "words.csv")
    assert [row["word"] for row in words] == list(WORDS)
    assert sum(int(row["right"]) for row in words) == round(16 * scores["top1"])
    confusion = np.array([[int(row[word]) for word in WORDS] for row in rows_of(out / "confusion.csv")])
    assert confusion.sum(axis=1).tolist() == [4] * 4
    assert np.trace(confusion) == round(16 * scores["top1"])
    assert all((out / name).stat().st_size > 1000 for name in ("words.png", "confusion.png"))


def test_evaluate_sentences(folder):
    assert main(["evaluate", str(folder / "characters"), "--device", "cpu", "--quiet"]) == 0
    out = folder / "characters" / "evaluation"
    assert {"clips", "wer", "cer", "accuracy"} == json.loads((out / "scores.json").read_text()).keys()
    assert len(rows_of(out / "sentences.csv")) == 4


def test_six_crops_are_averaged(folder):
    from fused_convlstm.data import collate, six_crops
    from fused_convlstm.training.clips import run_batch, test_views

    reader = TrainedReader.load(folder / "words")
    dataset = reader.dataset(folder / "cache", "test")
    batch = collate([dataset[k] for k in range(3)])
    with torch.no_grad():
        averaged = run_batch(reader.model, batch, test_views(reader.transform, False), None, torch.device("cpu"))
        views = six_crops(batch.frames, (26, 30), 16, batch.lengths)
        assert len(views) == 4  # two sizes and their mirror images, which count if training had them
        used = views if reader.transform.flip > 0.0 else views[::2]
        each = [reader.model(view)[0].softmax(-1) for view in used]
    torch.testing.assert_close(averaged, torch.stack(each).mean(0))


def test_sensitivity(folder, capsys):
    assert main(["sensitivity", str(folder / "words"), "--periods", "1", "8", "--device", "cpu", "--quiet"]) == 0
    out = folder / "words" / "sensitivity"
    rows = rows_of(out / "sensitivity.csv")
    assert [row["scale"] for row in rows] == ["s/2", "s/4"]
    # Clips have 8 frames: a reset every 8 is none but that at the start.
    assert all(float(row["T=8"]) == pytest.approx(1.0) for row in rows)
    assert (out / "sensitivity.png").stat().st_size > 1000
    assert "s/4" in capsys.readouterr().out


@pytest.mark.parametrize(("scale", "label"), [("s2", "s/2"), ("s16", "s/16"), ("lstm", "lstm")])
def test_labels_of_scales(scale, label):
    assert _fraction(scale) == label


def test_sensitivity_of_a_model_without_memory(folder, tmp_path):
    reader = TrainedReader.load(folder / "words")
    frames = create_model("resnet_frames_small", num_classes=4).eval()
    object.__setattr__(reader, "model", frames)
    with pytest.raises(ValueError, match="no ConvLSTMs"):
        sensitivity(reader, folder / "cache", "val", tmp_path, progress=False)


@pytest.fixture(scope="module")
def video(folder):
    frames = np.concatenate([moving_bar(word, 10, np.random.default_rng(0)) for word in ("up", "left")])
    path = folder / "video.mp4"
    write_video(path, [np.repeat(np.repeat(frame[0], 4, 0), 4, 1) for frame in frames])
    return path


def test_predict(folder, video, capsys):
    box = ["--box", "0", "0", "128", "128"]
    arguments = ["predict", str(folder / "words"), str(video), "--threshold", "0", "--device", "cpu", *box]
    assert main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["start", "end", "probability", "word"]
    assert lines
    for line in lines:
        start, end, probability, word = line.split()
        assert 0 <= float(start) < float(end) <= 0.8
        assert 0 < float(probability) <= 1
        assert word in WORDS
    assert main([*arguments, "--stream"]) == 0
    steps = capsys.readouterr().out.splitlines()
    assert [round(float(step.split()[0]) * 25) for step in steps] == list(range(20))
    assert main(["predict", str(folder / "characters"), str(video), "--device", "cpu", *box]) == 0


def test_a_stream_gives_what_the_clip_gives(folder):
    reader = TrainedReader.load(folder / "words")
    clip = moving_bar("up", 8, np.random.default_rng(1))  # (T, 1, H, W)
    pictures = list(clip.transpose(0, 2, 3, 1))
    steps = list(read_stream(reader, pictures, WholeFrame(SIDE, SIDE)))
    whole = read_words(reader, clip, threshold=0.0, one_crop=True)
    assert [step.frame for step in steps] == list(range(8))
    assert whole[0].text == steps[-1].text
    assert whole[0].probability == pytest.approx(steps[-1].probability, abs=1e-5)
    assert (whole[0].start, whole[0].end) == (0, 8)


def test_generate_prepare_train(tmp_path, capsys):
    """From nothing to a run, on faces: the whole way of one's own data."""
    videos, cache = str(tmp_path / "videos"), str(tmp_path / "cache")
    words = ["--words", "BALLOON", "TULIP", "--clips-per-word", "6", "--speakers", "2", "--workers", "1"]
    assert main(["generate", videos, *words]) == 0
    (tmp_path / "videos" / "BALLOON" / "train" / "BALLOON_00001.txt").unlink()
    assert main(["prepare", "lrw", videos, cache, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "11 clips" in printed
    assert "skipped BALLOON/BALLOON_00001: BALLOON_00001.txt is missing" in printed
    options = ["--set", "training.epochs=1", "--set", "training.batch_size=2", "--set", "training.frames=[[0, 6]]"]
    run = str(tmp_path / "run")
    assert main(["train", "demo", cache, run, "--device", "cpu", "--quiet", *options]) == 0
    video = next((tmp_path / "videos" / "TULIP" / "test").glob("*.mp4"))
    assert main(["predict", run, str(video), "--threshold", "0", "--device", "cpu"]) == 0
    assert {"BALLOON", "TULIP"} & set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "resnet_convlsm", "cache", "run"], "did you mean 'resnet_convlstm'"),
        (["train", "{words.yaml}", "{cache}", "run", "--set", "training.epoch=2"], "did you mean 'epochs'"),
        (["train", "{words.yaml}", "{nothing}", "run"], "nothing"),
        (["train", "{words.yaml}", "{cache}", "{words}"], "there is a run in this folder"),
        (["train", "{words.yaml}", "{cache}", "run", "--set", "data.classes=[up, in]"], "'in'"),
        (["train", "{words.yaml}"], "expected RECIPE CACHE OUT"),
        (["evaluate", "{nothing}"], "nothing"),
        (["evaluate", "{words}", "--cache", "{sentences}"], "words"),
        (["evaluate", "{words}", "--split", "training"], "training"),
        (["sensitivity", "{words}", "--clips", "0"], "clips: expected at least 1, got 0"),
        (["visualize", "{words}", "--clips", "-1"], "clips: expected at least 1, got -1"),
        (["predict", "{words}", "{nothing}"], "no file"),
        (["predict", "{words}", "{words.yaml}"], "cannot be decoded"),
        (["prepare", "lrw", "{nothing}", "cache"], "nothing"),
        (["prepare", "lrw", "{cache}", "cache", "--words", "digit"], "only with the layout grid-words"),
        (["prepare", "grid-words", "{cache}", "cache", "--frames", "0"], "num_frames: expected 1 or more, got 0"),
        (["predict", "{words}", "{words.yaml}", "--fps", "0"], "--fps: expected more than 0"),
        (["generate", "gestures", "--set", "gestures", "--camera", "0"], "only with the set actors"),
    ],
)
def test_wrong_use(arguments, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [str(folder / a[1:-1]) if a.startswith("{") else a for a in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(folder, tmp_path, capsys):
    """One line and status 2, also where the system says no."""
    (tmp_path / "file").write_text("mine")
    recipe, cache, run = (str(folder / name) for name in ("words.yaml", "cache", "words"))
    for out in ("file", "file/below"):
        place = str(tmp_path / out)
        for arguments in (
            ["train", recipe, cache, place, "--device", "cpu", "--quiet"],
            ["evaluate", run, "--out", place, "--one-crop", "--device", "cpu", "--quiet"],
            ["sensitivity", run, "--out", place, "--periods", "1", "--device", "cpu", "--quiet"],
            ["generate", place, "--set", "gestures", "--clips-per-word", "1", "--workers", "0"],
            ["prepare", "lrw-npz", str(folder), place],
        ):
            assert main(arguments) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith(f"fused-convlstm {arguments[0]}: ")
            assert len(error.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["2024", "my #1 cache"])
def test_names_of_folders_are_text(name, folder, tmp_path, monkeypatch):
    """Names that would be something else in YAML."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).symlink_to(folder / "cache")
    model = f"{name}.safetensors"
    (tmp_path / model).symlink_to(folder / "words" / "model.safetensors")
    command = ["train", str(folder / "words.yaml"), name, "run", "--init-from", model, "--device", "cpu", "--quiet"]
    assert main(command) == 0
    recipe = load_recipe("run/recipe.yaml")
    assert (recipe.data.cache, recipe.training.init_from) == (name, model)


def test_one_run_at_a_time(folder, tmp_path, capsys):
    script = (
        "import sys; from pathlib import Path; from fused_convlstm.data.files import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = ["train", str(folder / "words.yaml"), str(folder / "cache"), str(tmp_path / "run"), "--resume", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), *sys.path])},
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == b"held\n"
        assert main([*command, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error == f"fused-convlstm train: {tmp_path / 'run'}: another process is writing to this folder\n"
        assert not (tmp_path / "run/recipe.yaml").exists()
    assert main([*command, "--device", "cpu"]) == 0
    assert not list((tmp_path / "run").glob("*.lock"))


def test_a_damaged_model(folder, tmp_path, capsys):
    shutil.copytree(folder / "words", tmp_path / "run")
    path = tmp_path / "run" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert main(["evaluate", str(tmp_path / "run")]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_model_that_no_run_wrote(tmp_path):
    model = create_model("resnet_convlstm_small")
    save_model(tmp_path / "model.safetensors", "resnet_convlstm_small", model)
    with pytest.raises(ValueError, match="not from a training run"):
        TrainedReader.load(tmp_path)
