"""Training runs: they learn, resume bit for bit after a kill, and give the same on two processes as on one."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from synthetic_clips import make_sentence_cache, make_word_cache

from fused_convlstm.data.cache import read_index, write_index
from fused_convlstm.models import load_model
from fused_convlstm.training import Processes, Trainer
from fused_convlstm.training.checkpoint import load_checkpoint, save_checkpoint
from fused_convlstm.training.recipe import load_recipe
from fused_convlstm.training.report import write_json

MODEL = {
    "name": "resnet_convlstm",
    "options": {
        "blocks": [1], "mid_channels": [8], "out_channels": [8], "recurrent": [True], "head_channels": 16,
        "dropout": 0.1,
    },
}  # fmt: skip
TRANSFORM = {
    "crop": [26, 30], "size": 16, "rotation": 3, "flip": 0.0, "shift": 1, "validation_crop": 28, "test_crops": [26, 30],
}  # fmt: skip


@pytest.fixture(scope="module")
def word_cache(tmp_path_factory):
    return make_word_cache(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def ragged_cache(tmp_path_factory):
    return make_word_cache(tmp_path_factory.mktemp("ragged"), steps=(3, 8))


@pytest.fixture(scope="module")
def sentence_cache(tmp_path_factory):
    return make_sentence_cache(tmp_path_factory.mktemp("sentences"))


def write_recipe(folder, cache, *, task="words", model=MODEL, data=None, transform=None, **training):
    """A recipe file for a few steps; returns its path."""
    values = {
        "task": task,
        "data": {"cache": str(cache), **(data or {})},
        "transform": {**TRANSFORM, **(transform or {})},
        "model": model,
        "training": {
            "epochs": 2, "batch_size": 8, "frames": [], "tbptt": 4, "learning_rate": 1e-2, **training,
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(recipe, out, **options):
    trainer = Trainer(load_recipe(str(recipe)), out, Processes.join("cpu"), progress=False, **options)
    best = trainer.fit()
    return trainer, best


def weights(folder):
    return load_checkpoint(folder / "checkpoint.pt")["model"]


def assert_equal_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_it_learns_what_one_frame_cannot_tell(tmp_path):
    cache = make_word_cache(tmp_path / "cache", (16, 4, 4))
    still = {"crop": [28, 28], "rotation": 0}
    recipe = write_recipe(tmp_path / "r", cache, epochs=10, schedule="constant", transform=still)
    trainer, best = train(recipe, tmp_path / "run")
    losses = [row["train_loss"] for row in trainer.history]
    assert losses[-1] < 0.5 * losses[0]
    assert best["validation_top1"] >= 0.75


def test_the_report_folder(word_cache, tmp_path):
    trainer, best = train(write_recipe(tmp_path / "r", word_cache), tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "recipe.yaml", "metrics.csv", "metrics.json", "curves.png", "tensorboard", "model.safetensors", "checkpoint.pt",
    }  # fmt: skip
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == trainer.history
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == trainer.recipe
    model, name, extra = load_model(tmp_path / "run" / "model.safetensors")
    assert name == "resnet_convlstm"
    assert model.config.num_classes == 4
    assert extra["classes"] == ["down", "left", "right", "up"]
    assert best["validation_top1"] == max(row["validation_top1"] for row in trainer.history)


def test_models_tell_how_long_their_last_clips_were(word_cache, tmp_path):
    """The frames of the last epoch that is trained."""
    train(write_recipe(tmp_path / "r", word_cache, frames=[[0, 5], [1, 6], [2, 8]]), tmp_path / "run")
    assert load_model(tmp_path / "run" / "model.safetensors")[2]["frames"] == 6


@pytest.mark.parametrize("training", [{"tbptt": 0}, {"tbptt": 3}, {"precision": "bf16"}, {"optimizer": "sgd"}])
def test_variants_of_the_loop_run(training, ragged_cache, tmp_path):
    trainer, _ = train(write_recipe(tmp_path / "r", ragged_cache, epochs=1, **training), tmp_path / "run")
    assert trainer.step == trainer.steps_per_epoch == 4
    assert torch.isfinite(torch.tensor(trainer.history[0]["train_loss"]))


def gradients(trainer, batches=1):
    """The gradients of the first batch, before any step."""
    caught = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *_, **__: caught.append([p.grad.clone() for p in trainer.parameters])
    from fused_convlstm.data import TrainTransform

    transform = trainer.recipe.transform
    augment = TrainTransform(transform.crop, transform.size, 0.0, 0.0, 0.0, None, 0)
    trainer._train_step(next(trainer._batches(0, 0, None)), augment)
    trainer.optimizer.step = step
    return caught[0]


def test_truncation_cuts_gradients_but_not_the_forward_pass(word_cache, tmp_path):
    """Without truncation the gradient is another one; with chunks as long as the clip it is the same."""
    runs = {}
    for tbptt in (0, 4, 8):
        model = {**MODEL, "options": {**MODEL["options"], "dropout": 0.0, "norm": "group"}}
        recipe = write_recipe(tmp_path / f"r{tbptt}", word_cache, model=model, tbptt=tbptt, clip_norm=1e9)
        trainer = Trainer(load_recipe(str(recipe)), tmp_path / f"{tbptt}", Processes.join("cpu"), progress=False)
        runs[tbptt] = (gradients(trainer), trainer.sums["loss"])
    torch.testing.assert_close(runs[8][0], runs[0][0])
    assert runs[4][1] == pytest.approx(runs[0][1], rel=1e-5)
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(runs[4][0], runs[0][0], strict=True))


def test_ctc_with_a_curriculum(sentence_cache, tmp_path):
    recipe = write_recipe(
        tmp_path / "r", sentence_cache, task="characters", epochs=2, frames=[[0, 6], [1, 12]],
        model={**MODEL, "options": {**MODEL["options"], "head": "attention"}},
    )  # fmt: skip
    trainer, best = train(recipe, tmp_path / "run")
    assert {"validation_wer", "validation_cer", "validation_accuracy"} <= best.keys()
    lengths = [next(trainer._batches(epoch, 0, frames)).lengths.max() for epoch, frames in ((0, 6), (1, 12))]
    assert lengths == [6, 12]


def test_frozen_front_end_on_a_fraction_of_the_data(word_cache, tmp_path):
    train(write_recipe(tmp_path / "r1", word_cache, epochs=1), tmp_path / "first")
    recipe = write_recipe(
        tmp_path / "r2", word_cache, data={"fraction": 0.5}, init_from=str(tmp_path / "first" / "model.safetensors"),
        freeze=["modules_by_scale"], epochs=1,
    )  # fmt: skip
    trainer, _ = train(recipe, tmp_path / "second")
    assert len(trainer.clips) == 16
    assert torch.bincount(torch.tensor([trainer.dataset.labels[k] for k in trainer.clips])).tolist() == [4] * 4
    before, after = load_model(tmp_path / "first" / "model.safetensors")[0].state_dict(), weights(tmp_path / "second")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_fine_tuning_from_characters_to_words_takes_all_but_the_head(sentence_cache, word_cache, tmp_path):
    pretraining = write_recipe(
        tmp_path / "r1", sentence_cache, task="characters", epochs=1,
        model={**MODEL, "options": {**MODEL["options"], "head": "attention"}},
    )  # fmt: skip
    train(pretraining, tmp_path / "pretrained")
    path = str(tmp_path / "pretrained" / "model.safetensors")
    recipe = write_recipe(tmp_path / "r2", word_cache, init_from=path)
    trainer = Trainer(load_recipe(str(recipe)), tmp_path / "run", Processes.join("cpu"), progress=False)
    before = load_model(path)[0].state_dict()
    for name, tensor in trainer.model.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, before[name]), name


def test_the_reversed_network_of_a_bidirectional_model_is_trained_alone(word_cache, tmp_path):
    train(write_recipe(tmp_path / "r1", word_cache, epochs=1), tmp_path / "forward")
    path = str(tmp_path / "forward" / "model.safetensors")
    model = {**MODEL, "name": "resnet_biconvlstm"}
    trainer, _ = train(
        write_recipe(tmp_path / "r2", word_cache, epochs=1, model=model, init_from=path), tmp_path / "bi"
    )
    before = load_model(path)[0].state_dict()
    after = trainer.model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[f"forward_network.{name}"], tensor), name
    assert any(not torch.equal(after[f"reversed_network.{name}"], tensor) for name, tensor in before.items())
    assert load_model(tmp_path / "bi" / "model.safetensors")[1] == "resnet_biconvlstm"


# --- resuming ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_resuming_at_a_step_equals_an_unbroken_run(stop, ragged_cache, tmp_path):
    """In the middle of an epoch, at its end before validation, in the next."""
    recipe = write_recipe(tmp_path / "r", ragged_cache, checkpoint_seconds=0.0, epochs=3)
    whole, _ = train(recipe, tmp_path / "whole")

    class StopError(Exception):
        pass

    trainer = Trainer(load_recipe(str(recipe)), tmp_path / "broken", Processes.join("cpu"), progress=False)
    save = trainer._save

    def save_and_stop():
        save()
        if trainer.step == stop:
            raise StopError

    trainer._save = save_and_stop
    with pytest.raises(StopError):
        trainer.fit()
    resumed, _ = train(recipe, tmp_path / "broken", resume=True)
    assert_equal_weights(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    skip = ("seconds", "frames_per_second")
    for a, b in zip(resumed.history, whole.history, strict=True):
        assert {k: v for k, v in a.items() if k not in skip} == {k: v for k, v in b.items() if k not in skip}


def test_a_run_killed_at_a_random_moment_equals_an_unbroken_one(ragged_cache, tmp_path):
    recipe = write_recipe(tmp_path / "r", ragged_cache, checkpoint_seconds=0.0, epochs=12)
    train(recipe, tmp_path / "whole")
    out = tmp_path / "killed"
    code = (
        "import sys, torch; from pathlib import Path; from fused_convlstm.training import *; "
        f"torch.set_num_threads({torch.get_num_threads()}); "
        "Trainer(load_recipe(sys.argv[1]), Path(sys.argv[2]), Processes.join('cpu'), resume=True, progress=False).fit()"
    )
    # Not in the source folder, where the package would be found without its compiled kernels.
    process = subprocess.Popen([sys.executable, "-c", code, str(recipe), str(out)], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0.0, 1.0))
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = load_checkpoint(out / "checkpoint.pt")["step"]
    assert 0 < step < 48, "the run was not killed in its middle"
    train(recipe, out, resume=True)
    assert_equal_weights(weights(out), weights(tmp_path / "whole"))
    assert not list(out.glob(".*.tmp"))


def test_a_killed_write_leaves_nothing_for_good(word_cache, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".checkpoint.pt.123.tmp").write_bytes(b"half")
    train(write_recipe(tmp_path / "r", word_cache, epochs=1), tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_a_start_that_failed_does_not_take_the_folder(word_cache, tmp_path, monkeypatch):
    """Out of memory in the first step, for example: nothing was trained yet, so other values may be tried."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(write_recipe(tmp_path / "r1", word_cache), tmp_path / "run")
    smaller = write_recipe(tmp_path / "r2", word_cache, epochs=1, batch_size=4)
    train(smaller, tmp_path / "run")
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).training.batch_size == 4


def test_resuming_with_what_does_not_change_the_result(word_cache, tmp_path):
    """Another number of workers, another time between checkpoints, the cache elsewhere."""
    cache = shutil.copytree(word_cache, tmp_path / "before")
    recipe = write_recipe(tmp_path / "r", cache, epochs=1)
    train(recipe, tmp_path / "run")
    cache.rename(tmp_path / "after")
    moved = write_recipe(
        tmp_path / "r2", tmp_path / "after", epochs=1, data={"workers": 1}, checkpoint_seconds=1.0
    )  # fmt: skip
    train(moved, tmp_path / "run", resume=True)
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")).data.cache == str(tmp_path / "after")


@pytest.mark.parametrize("split", ["train", "val"])
def test_resuming_after_the_cache_has_changed(split, word_cache, tmp_path):
    cache = shutil.copytree(word_cache, tmp_path / "cache")
    recipe = write_recipe(tmp_path / "r", cache, epochs=1)
    train(recipe, tmp_path / "run")
    records = read_index(cache)
    write_index(cache, [r for r in records if (r.split, r.name) != (split, "up_0")])
    with pytest.raises(ValueError, match=f"the clips of '{split}' in .* have changed since the run began"):
        train(recipe, tmp_path / "run", resume=True)
    write_index(cache, records)
    train(recipe, tmp_path / "run", resume=True)


def test_a_run_is_not_overwritten_nor_mixed_with_another(word_cache, tmp_path):
    recipe = write_recipe(tmp_path / "r", word_cache, epochs=1)
    train(recipe, tmp_path / "run")
    with pytest.raises(ValueError, match="there is a run in this folder"):
        train(recipe, tmp_path / "run")
    other = write_recipe(tmp_path / "other", word_cache, epochs=3)
    with pytest.raises(ValueError, match=r"training\.epochs was 1, is 3"):
        train(other, tmp_path / "run", resume=True)


def test_damaged_checkpoints(word_cache, tmp_path):
    recipe = write_recipe(tmp_path / "r", word_cache, epochs=1)
    train(recipe, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    middle = whole.index(b"format")  # of the pickled names
    for content in (
        whole[: len(whole) // 2], b"", b"text", whole[:middle] + b"\xff" * 6 + whole[middle + 6 :],
    ):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: a damaged checkpoint"):
            train(recipe, tmp_path / "run", resume=True)
    save_checkpoint(path, {})
    torch.save({"format": "other"}, path)
    with pytest.raises(ValueError, match="expected a checkpoint in format"):
        load_checkpoint(path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("save", [save_checkpoint, write_json])
def test_a_full_disk(save, tmp_path):
    (tmp_path / f".file.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"^[^\n]*/file\b[^\n]*$"):
        save(tmp_path / "file", {"numbers": list(range(10000))})
    assert not list(tmp_path.iterdir())


class Malicious:
    def __reduce__(self):
        return (os.system, ("echo never",))


def test_checkpoints_run_no_pickle(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": Malicious()}, path)
    with pytest.raises(ValueError, match="damaged checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match="damaged checkpoint"):
        load_checkpoint(path)


# --- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "local", "expected"),
    [("cuda", None, "cuda:0"), ("cuda", "3", "cuda:3"), (None, "2", "cuda:2"), ("cuda:1", "3", "cuda:1")],
)
def test_which_gpu_a_process_takes(asked, local, expected, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert Processes.join(asked).device == torch.device(expected)
    assert chosen == [torch.device(expected)]


@pytest.mark.parametrize("device", ["foo", f"cuda:{torch.cuda.device_count()}"])
def test_devices_that_are_not_there(device):
    with pytest.raises(ValueError, match=rf"^device: '{device}' cannot be used: [^\n]+$"):
        Processes.join(device)


# --- several processes ---------------------------------------------------------------------------------------------

DISTRIBUTED = """
import sys, torch
from pathlib import Path
from fused_convlstm.training import Processes, Trainer, load_recipe
torch.set_num_threads(1)
processes = Processes.join("cpu")
trainer = Trainer(load_recipe(sys.argv[1]), Path(sys.argv[2]), processes, progress=False)
caught = []
step = trainer.optimizer.step
def catch(*args, **kwargs):
    caught.append([p.grad.clone() for p in trainer.parameters])
    return step(*args, **kwargs)
trainer.optimizer.step = catch
trainer.fit()
torch.save({"gradients": caught, "history": trainer.history}, sys.argv[3] + f"{processes.rank}.pt")
processes.leave()
"""


@pytest.mark.parametrize("task", ["words", "characters"])
def test_two_processes_give_the_gradients_of_one(task, ragged_cache, sentence_cache, tmp_path):
    cache = ragged_cache if task == "words" else sentence_cache
    head = "lstm" if task == "words" else "attention"
    options = {**MODEL["options"], "dropout": 0.0, "norm": "group", "head": head}
    recipe = write_recipe(
        tmp_path / "r", cache, task=task, epochs=1, tbptt=3, optimizer="sgd", clip_norm=1e9, learning_rate=1e-3,
        model={**MODEL, "options": options},
        transform={"crop": [28, 28], "rotation": 0, "brightness": 0, "shift": 0},
    )  # fmt: skip
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    results = []
    for count in (1, 2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
            str(script), str(recipe), str(tmp_path / f"run{count}"), str(tmp_path / f"result{count}_"),
        ]  # fmt: skip
        subprocess.run(command, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        results.append([torch.load(tmp_path / f"result{count}_{rank}.pt") for rank in range(count)])
    (one,), (first, second) = results
    assert len(one["gradients"]) == len(first["gradients"]) > 0
    for a, b, c in zip(one["gradients"], first["gradients"], second["gradients"], strict=True):
        for single, shared, other in zip(a, b, c, strict=True):
            torch.testing.assert_close(shared, single, rtol=1e-4, atol=1e-6)
            assert torch.equal(shared, other)
    score = "validation_top1" if task == "words" else "validation_cer"
    assert first["history"][0][score] == pytest.approx(one["history"][0][score])
    assert first["history"][0]["train_loss"] == pytest.approx(one["history"][0]["train_loss"], rel=1e-5)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"classes": ["down", "sideways"]}}, "sideways"),
        ({"data": {"train": "training"}}, "training"),
        ({"freeze": ["front"]}, "no parameter's name begins with 'front'"),
        ({"init_from": "missing.safetensors"}, "no model file"),
        ({"task": "characters", "label_smoothing": 0.1}, "label_smoothing"),
        ({"model": {"name": "res3d", "options": {"width": 0.07}}}, r"training\.tbptt: expected 0 with res3d, .* got 4"),
        ({"model": {**MODEL, "options": {"norm": "layer"}}}, "model resnet_convlstm: norm: expected one of"),
    ],
)
def test_recipes_that_do_not_fit(changes, message, word_cache, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(write_recipe(tmp_path / "r", word_cache, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_classes_without_clips(tmp_path):
    cache = make_word_cache(tmp_path / "cache")
    write_index(cache, [r for r in read_index(cache) if r.split != "val" or r.label in ("left", "right")])
    recipe = write_recipe(tmp_path / "r", cache, data={"classes": ["down", "up"]})
    with pytest.raises(ValueError, match=r"data\.classes: no clips in 'val' of down, up"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sentences_to_be_cut_need_the_times_of_their_words(tmp_path):
    cache = make_sentence_cache(tmp_path / "cache", timed=False)
    recipe = write_recipe(tmp_path / "r", cache, task="characters", frames=[[0, 18], [1, 12]])
    with pytest.raises(
        ValueError, match=r"^training\.frames: clips of more than 12 frames .* clip '\d' of 'train', 18"
    ):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for frames in ([], [[0, 18]], [[0, 18], [2, 12]]):  # of two epochs
        recipe = write_recipe(tmp_path / "r", cache, task="characters", frames=frames)
        Trainer(load_recipe(str(recipe)), tmp_path / "run", Processes.join("cpu"), progress=False)


def test_texts_outside_of_the_alphabet(tmp_path):
    cache = make_sentence_cache(tmp_path / "cache")
    records = [replace(r, text=r.text.replace("up", "\u00fcp").upper()) for r in read_index(cache)]
    wrong = [r.name for r in records if r.split == "train" and "\u00dc" in r.text]
    assert len(wrong) > 3
    write_index(cache, records)
    named = ", ".join(f"{name!r} has ['\u00fc']" for name in wrong[:3])
    with pytest.raises(
        ValueError, match=re.escape(f"got others in {len(wrong)} of 8 clips of {str(cache)!r}: {named}, ...")
    ):
        train(write_recipe(tmp_path / "r", cache, task="characters"), tmp_path / "run")


def test_words_from_sentences(sentence_cache, tmp_path):
    with pytest.raises(ValueError, match="expected word clips"):
        train(write_recipe(tmp_path / "r", sentence_cache), tmp_path / "run")


def test_another_network_to_start_from(word_cache, tmp_path):
    train(write_recipe(tmp_path / "r1", word_cache, epochs=1), tmp_path / "run")
    model = {**MODEL, "options": {**MODEL["options"], "mid_channels": [16]}}
    recipe = write_recipe(tmp_path / "r2", word_cache, model=model, init_from=str(tmp_path / "run/model.safetensors"))
    with pytest.raises(ValueError, match="another network"):
        train(recipe, tmp_path / "second")
