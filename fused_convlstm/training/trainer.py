"""Training: the recipe of Courtney & Sreenivas (section 4), resumable at any step, on one process or several.

Everything random is a function of (seed, step, process): the order of the clips, augmentation, dropout. So a
checkpoint needs no state of a random number generator, and a run that was killed goes on exactly as if it had not been.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm  # type: ignore[import-untyped]

from ..configuration import remove_leftovers
from ..data import Batch, Clip, ClipDataset, TrainTransform, collate
from ..models import (
    ModelState,
    ResNetBiConvLSTM,
    StreamingModel,
    create_model,
    detach_state,
    load_model,
    reverse_frames,
    save_model,
)
from .checkpoint import load_checkpoint, save_checkpoint
from .clips import middle_view, run_clips, sampling
from .processes import Processes
from .recipe import Recipe, TrainingRecipe, load_recipe, save_recipe
from .report import plot_curves, write_csv, write_json
from .tasks import Task, WordTask, clip_records, find_task

CHECKPOINT, MODEL, RECIPE = "checkpoint.pt", "model.safetensors", "recipe.yaml"


def seed_of(*numbers: int) -> int:
    """A seed for each combination of ``numbers``."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_of(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*numbers))


# What a seed is for: the first of the numbers after the recipe's own.
WEIGHTS, FRACTION, ORDER, CUT, AUGMENT, DROPOUT = range(6)


class Trainer:
    """A run in the folder ``out``.

    Args:
        resume: go on with the run that ``out`` holds, if it holds one.
        progress: print progress bars and results.

    Raises:
        ValueError: the recipe does not fit the data, or ``out`` holds another run (any, unless ``resume``), or one that
            began with other clips. What tells a run is its first checkpoint.
    """

    def __init__(
        self, recipe: Recipe, out: Path, processes: Processes, *, resume: bool = False, progress: bool = True
    ) -> None:
        self.recipe = recipe
        self.training: TrainingRecipe = recipe.training
        self.out = out
        self.processes = processes
        self.progress = progress and processes.is_first
        # The first process looks, and all of them raise.
        if error := processes.gather(self._other_run(resume) if processes.is_first else None)[0]:
            raise ValueError(error)
        data = recipe.data
        self.dataset = ClipDataset(data.cache, data.train, data.classes, data.content)
        self.validation = ClipDataset(data.cache, data.validation, data.classes, data.content)
        for dataset in (self.dataset, self.validation):
            if not len(dataset):
                raise ValueError(f"data.classes: no clips in {dataset.split!r} of {', '.join(dataset.classes)}")
        self.task: Task = find_task(recipe.task).of(self.dataset, self.training.label_smoothing)
        self.clips = self._chosen_clips()
        if frames := [frames for start, frames in self.training.frames if start < self.training.epochs]:
            self.task.check_cuts(self.dataset, self.clips, min(frames))
        if self.training.batch_size % processes.count:
            raise ValueError(
                f"training.batch_size: expected a multiple of the {processes.count} processes, "
                f"got {self.training.batch_size}"
            )
        self.steps_per_epoch = -(-len(self.clips) // self.training.batch_size)

        torch.manual_seed(seed_of(recipe.seed, WEIGHTS))
        options = {**recipe.model.options, "num_classes": len(self.task.classes)}
        channels = self.dataset[0].frames.size(1)
        try:
            self.model = create_model(recipe.model.name, **{**options, "in_channels": channels})
        except ValueError as error:
            raise ValueError(f"model {recipe.model.name}: {error}") from None
        if self.training.init_from is not None:
            self._report(initialize_from(self.model, self.training.init_from))
        self.model.to(processes.device)
        # Of a bidirectional model, the reversed network is trained, alone.
        self.reversed = isinstance(self.model, ResNetBiConvLSTM)
        self.trained: StreamingModel = self.model.reversed_network if self.reversed else self.model  # type: ignore[assignment]
        if self.training.tbptt and not self.trained.streams:
            raise ValueError(
                f"training.tbptt: expected 0 with {recipe.model.name}, which takes a clip whole, "
                f"got {self.training.tbptt}; set training.tbptt=0"
            )
        freeze(self.trained, self.training.freeze)
        self.parameters = [p for p in self.trained.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.parameters, self.training)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=self.training.precision == "fp16")
        self.network: nn.Module = self.trained
        if processes.count > 1:
            # Processes may differ in their number of chunks: no exchange of running statistics in the forward pass.
            self.network = DistributedDataParallel(self.trained, broadcast_buffers=False)

        self.drawn = -float("inf")  # when the curves were
        self.step = 0  # optimiser steps done
        self.history: list[dict[str, Any]] = []  # one row for each epoch that is through, validation included
        self.sums = {"loss": 0.0, "weight": 0.0, "right": 0.0, "clips": 0.0, "seconds": 0.0, "frames": 0.0}
        self.clips_seen = {dataset.split: _digest(dataset) for dataset in (self.dataset, self.validation)}
        if resume and (out / CHECKPOINT).is_file():
            self._load()
        if processes.is_first:
            out.mkdir(parents=True, exist_ok=True)
            remove_leftovers(out)
            save_recipe(out / RECIPE, recipe)

    # --- the run -----------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end; returns the best epoch's row of metrics."""
        writer = SummaryWriter(self.out / "tensorboard", purge_step=self.step) if self.processes.is_first else None
        while len(self.history) < self.training.epochs:
            self._train_epoch(writer)
            self._close_epoch(writer)
        if writer is not None:
            writer.close()
        score = f"validation_{self.task.score}"
        return max(self.history, key=lambda row: row[score])

    def _train_epoch(self, writer: SummaryWriter | None) -> None:
        epoch = len(self.history)
        frames = self.training.frames_at(epoch)
        transform = self.recipe.transform
        augment = TrainTransform(
            crop=transform.crop, size=transform.size, rotation=transform.rotation, brightness=transform.brightness,
            flip=transform.flip, steps=self.task.subsequence(frames), shift=transform.shift,
            uniform=transform.uniform, flow=self.dataset.flow,
        )  # fmt: skip
        done = self.step - epoch * self.steps_per_epoch
        bar = tqdm(
            total=self.steps_per_epoch, initial=done, unit="step", disable=not self.progress,
            desc=f"epoch {epoch + 1}/{self.training.epochs}",
        )  # fmt: skip
        saved = started = time.monotonic()
        with bar:
            for batch in self._batches(epoch, done, frames):
                loss = self._train_step(batch, augment)
                now = time.monotonic()
                self.sums["seconds"] += now - started
                started = now
                self.step += 1
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {self.sums['frames'] / self.sums['seconds']:.0f} frames/s")
                if writer is not None:
                    writer.add_scalar("train/loss", loss, self.step)
                # Saving takes all processes, so all have to agree on it.
                if self.processes.sum(now - saved >= self.training.checkpoint_seconds):
                    self._save()
                    saved = started = time.monotonic()

    def _batches(self, epoch: int, done: int, frames: int | None) -> Iterator[Batch]:
        """This process's part of the batches of ``epoch``, from the one after ``done`` on."""
        generator = generator_of(self.recipe.seed, ORDER, epoch)
        order = torch.randperm(len(self.clips), generator=generator).tolist()
        # Every batch is full: the last one begins the order anew.
        size = self.training.batch_size
        order = (order * (1 + size // len(order)))[: self.steps_per_epoch * size] + order
        batches = []
        for k in range(done, self.steps_per_epoch):
            keys = [(self.clips[order[j]], epoch, j) for j in range(k * size, (k + 1) * size)]
            batches.append(self.processes.share(keys))
        return iter(
            DataLoader(
                _CutClips(self.dataset, self.task, frames, self.recipe.seed),
                batch_sampler=batches,
                collate_fn=collate,
                num_workers=self.recipe.data.workers,
                pin_memory=self.processes.device.type == "cuda",
            )
        )

    def _train_step(self, batch: Batch, augment: TrainTransform) -> float:
        """One optimiser step; returns the loss."""
        seed, rank = self.recipe.seed, self.processes.rank
        torch.manual_seed(seed_of(seed, DROPOUT, self.step, rank))
        device = self.processes.device
        batch = replace(batch, frames=batch.frames.to(device, non_blocking=True))
        frames = augment(batch, generator_of(seed, AUGMENT, self.step, rank))
        lengths = batch.lengths.clamp(max=frames.size(0))
        if augment.uniform:
            lengths = torch.full_like(lengths, frames.size(0))
        if self.reversed:
            frames = reverse_frames(frames, lengths)
        self.network.train()
        for module in frozen_modules(self.trained, self.training.freeze):
            module.eval()
        weight = self.processes.sum(self.task.weight(lengths))
        # DDP averages the gradients of the processes; the loss is a mean over all of them.
        loss, outputs = self._backward(frames, lengths, batch, self.processes.count / weight)
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.training.clip_norm)
        rate = learning_rate(self.training, self.step, self.steps_per_epoch, self._scores())
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums["loss"] += loss
        self.sums["weight"] += self.task.weight(lengths)
        self.sums["frames"] += int(lengths.sum()) * self.processes.count
        if isinstance(self.task, WordTask):
            last = outputs[lengths - 1, torch.arange(len(lengths))]
            self.sums["right"] += int((last.argmax(-1).cpu() == batch.labels).sum())
            self.sums["clips"] += len(lengths)
        return loss / self.task.weight(lengths)

    def _backward(self, frames: Tensor, lengths: Tensor, batch: Batch, scale: float) -> tuple[float, Tensor]:
        """Gradients of the summed loss times ``scale``; returns the summed loss and the outputs, without history."""
        steps = frames.size(0)
        chunk = self.training.tbptt or steps
        starts = list(range(0, steps, chunk))
        state: ModelState | None = None
        total = torch.zeros((), device=frames.device)
        outputs = []
        for start in starts:
            end = min(start + chunk, steps)
            left = (lengths - start).clamp(0, end - start)  # (B,)
            last = start == starts[-1]
            # Gradients add up over the chunks, and meet those of the other processes once.
            with self._no_sync(not last), self._autocast():
                output, state = self.network(frames[start:end], state, lengths=left)
            valid = (torch.arange(end - start)[:, None] < left).to(output.device)
            loss = self.task.chunk_loss(output, batch, valid)
            if loss is None:
                outputs.append(output)
            else:
                with self._no_sync(not last):
                    self.scaler.scale(loss * scale).backward()
                total += loss.detach()
                outputs.append(output.detach())
            state = detach_state(state)
        whole = torch.cat(outputs)
        if whole.requires_grad:
            loss = self.task.clip_loss(whole, batch, lengths)
            self.scaler.scale(loss * scale).backward()
            total = loss.detach()
        return float(total), whole.detach()

    def _no_sync(self, condition: bool) -> AbstractContextManager[Any]:
        if condition and isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.training.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.training.precision == "bf16" else torch.float16
        return torch.autocast(self.processes.device.type, dtype)

    def _close_epoch(self, writer: SummaryWriter | None) -> None:
        """Validates, and writes the epoch down."""
        epoch = len(self.history)
        self.processes.broadcast(self.model.buffers())
        transform = self.recipe.transform
        sample = sampling(transform, self.training.frames_at(epoch), min(1, transform.segments))
        with self._autocast():
            results = run_clips(
                self.model, self.task, self.validation, middle_view(transform, self.validation.flow),
                self.training.readout, sample=sample,
                batch_size=max(1, self.training.batch_size // self.processes.count), processes=self.processes,
                progress="validation" if self.progress else None,
            )  # fmt: skip
        sums = {name: sum(values) for name, values in _transpose(self.processes.gather(self.sums)).items()}
        row: dict[str, Any] = {
            "epoch": epoch + 1,
            "step": self.step,
            "learning_rate": learning_rate(self.training, self.step - 1, self.steps_per_epoch, self._scores()),
            "train_loss": sums["loss"] / sums["weight"],
        }
        if sums["clips"]:
            row[f"train_{self.task.score}"] = sums["right"] / sums["clips"]
        row |= {f"validation_{name}": value for name, value in self.task.scores(results).items()}
        row |= {"seconds": self.sums["seconds"], "frames_per_second": self.sums["frames"] / self.sums["seconds"]}
        best = max(self._scores(), default=-float("inf"))
        self.history.append(row)
        self.sums = dict.fromkeys(self.sums, 0.0)
        if self.processes.is_first:
            if self._scores()[-1] > best:
                self._save_model()
            write_csv(self.out / "metrics.csv", self.history)
            write_json(self.out / "metrics.json", self.history)
            # Drawing takes as long as a short epoch.
            if len(self.history) == self.training.epochs or time.monotonic() - self.drawn > 60:
                plot_curves(self.out / "curves.png", self.history, self.task.score)
                self.drawn = time.monotonic()
            if writer is not None:
                for name, value in row.items():
                    if name not in ("epoch", "step"):
                        writer.add_scalar(f"epoch/{name}", value, self.step)
        self._save()
        scores = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name.startswith("validation_"))
        self._report(f"epoch {epoch + 1}: training loss {row['train_loss']:.3f}, {scores}")

    def _scores(self) -> list[float]:
        return [row[f"validation_{self.task.score}"] for row in self.history]

    def _report(self, text: str) -> None:
        if self.progress:
            tqdm.write(text)

    def _chosen_clips(self) -> list[int]:
        """The training clips, or the recipe's fraction of those of each class."""
        fraction = self.recipe.data.fraction
        if fraction == 1.0:
            return list(range(len(self.dataset)))
        generator = generator_of(self.recipe.seed, FRACTION)
        chosen: list[int] = []
        labels = torch.tensor(self.dataset.labels)
        for label in labels.unique().tolist():
            clips = torch.nonzero(labels == label).flatten()
            count = max(1, round(fraction * len(clips)))
            chosen += clips[torch.randperm(len(clips), generator=generator)[:count]].tolist()
        return sorted(chosen)

    # --- files -------------------------------------------------------------------------------------------------

    def _other_run(self, resume: bool) -> str | None:
        """What is wrong if ``out`` holds another run than the one to go on with."""
        if not any((self.out / name).exists() for name in (CHECKPOINT, MODEL)):
            return None
        if not resume:
            return f"{self.out}: there is a run in this folder; resume it, or choose another folder"
        path = self.out / RECIPE
        try:
            before, now = _what_matters(load_recipe(str(path))), _what_matters(self.recipe)
        except ValueError as error:
            return f"{path}: {error}"
        if before != now:
            return f"{path}: the run in this folder has another recipe: {_difference(before, now)}"
        return None

    def _save(self) -> None:
        sums = self.processes.gather(self.sums)
        if not self.processes.is_first:
            return
        content = {
            "step": self.step,
            "history": self.history,
            "sums": sums,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "clips": self.clips_seen,
        }
        save_checkpoint(self.out / CHECKPOINT, content)

    def _load(self) -> None:
        content = load_checkpoint(self.out / CHECKPOINT)
        for split, digest in self.clips_seen.items():
            # Checkpoints of earlier versions do not tell their clips: they are believed.
            if content.get("clips", {}).get(split, digest) != digest:
                raise ValueError(
                    f"{self.out / CHECKPOINT}: the clips of {split!r} in {self.recipe.data.cache!r} have changed since "
                    "the run began; resume it with the cache as it was, or train in another folder"
                )
        self.step, self.history = content["step"], content["history"]
        if len(content["sums"]) != self.processes.count:
            raise ValueError(
                f"{self.out / CHECKPOINT}: expected a run of {self.processes.count} processes, "
                f"got one of {len(content['sums'])}"
            )
        self.sums = content["sums"][self.processes.rank]
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self._report(f"resumed at step {self.step}, {len(self.history)} epochs done")

    def _save_model(self) -> None:
        save_model(
            self.out / MODEL,
            self.recipe.model.name,
            self.model,
            task=self.task.name,
            classes=self.task.classes,
            readout=self.training.readout,
            frames=self.training.frames_at(self.training.epochs - 1),
            content=self.recipe.data.content,
            source=self.dataset.source,
            transform=self.recipe.to_dictionary()["transform"],
        )


class _CutClips(Dataset[Clip]):
    """Clips by (index, epoch, position): cut for the task, by a generator of that position's own."""

    def __init__(self, dataset: ClipDataset, task: Task, frames: int | None, seed: int) -> None:
        self.dataset, self.task, self.frames, self.seed = dataset, task, frames, seed

    def __getitem__(self, key: tuple[int, int, int]) -> Clip:
        index, epoch, position = key
        return self.task.cut(self.dataset[index], self.frames, generator_of(self.seed, CUT, epoch, position))


def make_optimizer(parameters: list[nn.Parameter], recipe: TrainingRecipe) -> torch.optim.Optimizer:
    if not parameters:
        raise ValueError(f"training.freeze: expected something left to train, got {list(recipe.freeze)}")
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, recipe.momentum, weight_decay=decay)
    return torch.optim.RMSprop(parameters, rate, momentum=recipe.momentum, weight_decay=decay)


def learning_rate(recipe: TrainingRecipe, step: int, steps_per_epoch: int, scores: list[float]) -> float:
    """The learning rate of ``step``; ``scores`` are those of the epochs before it."""
    rate = recipe.learning_rate
    if recipe.schedule == "polynomial":
        share = max(0.0, 1.0 - step / (recipe.epochs * steps_per_epoch))
        rate = recipe.final_learning_rate + (rate - recipe.final_learning_rate) * share**recipe.power
    elif recipe.schedule == "plateau":
        best, waited = -float("inf"), 0
        for score in scores:
            waited = 0 if score > best else waited + 1
            best = max(best, score)
            if waited > recipe.patience:
                rate, waited = rate * recipe.factor, 0
    return rate * min(1.0, (step + 1) / recipe.warmup) if recipe.warmup else rate


def freeze(model: nn.Module, beginnings: tuple[str, ...]) -> None:
    """Parameters whose names begin so are not trained."""
    for beginning in beginnings:
        named = [p for name, p in model.named_parameters() if name.startswith(beginning)]
        if not named:
            raise ValueError(f"training.freeze: no parameter's name begins with {beginning!r}")
        for parameter in named:
            parameter.requires_grad_(False)


def frozen_modules(model: nn.Module, beginnings: tuple[str, ...]) -> list[nn.Module]:
    """What is to stay in evaluation mode: no running statistics, no dropout."""
    return [m for name, m in model.named_modules() if beginnings and name.startswith(beginnings)]


def initialize_from(model: StreamingModel, path: str) -> str:
    """Loads into ``model`` what the model file ``path`` has for it; says what came from there.

    The heads may differ (another task, other classes). A bidirectional model takes the weights of a one-directional
    one for both its networks.

    Raises:
        ValueError: the networks below the heads differ.
    """
    source, name, _ = load_model(path)
    weights = source.state_dict()
    if isinstance(model, ResNetBiConvLSTM) and not isinstance(source, ResNetBiConvLSTM):
        weights = {
            f"{network}.{key}": tensor
            for network in ("forward_network", "reversed_network")
            for key, tensor in weights.items()
        }
    own = model.state_dict()
    below = {key for key in own if "head." not in key}
    if different := [k for k in sorted(below) if k not in weights or weights[k].shape != own[k].shape]:
        raise ValueError(f"training.init_from: {path} ({name}) is another network; it does not fit {different[0]}")
    fitting = {key: tensor for key, tensor in weights.items() if key in own and own[key].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    left = sorted(own.keys() - fitting.keys())
    return f"{len(fitting)} of {len(own)} tensors from {path}" + (f"; at random: {', '.join(left)}" if left else "")


def _transpose(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _digest(dataset: ClipDataset) -> str:
    """Of the clips' names, texts and lengths, their order, the classes, and how they were prepared."""
    clips = [(record.name, record.text, record.num_frames) for record in clip_records(dataset)]
    return hashlib.sha256(json.dumps([dataset.classes, dataset.source, clips]).encode()).hexdigest()


def _what_matters(recipe: Recipe) -> Recipe:
    """``recipe`` without what does not change the result. What is in the cache is the checkpoint's matter."""
    data = replace(recipe.data, cache="", workers=0)
    return replace(recipe, data=data, training=replace(recipe.training, checkpoint_seconds=0.0))


def _difference(before: Recipe, now: Recipe) -> str:
    """The first key that differs."""

    def walk(a: Any, b: Any, where: str) -> str:
        if isinstance(a, dict) and isinstance(b, dict):
            key = next(k for k in {**a, **b} if a.get(k) != b.get(k))
            return walk(a.get(key), b.get(key), f"{where}.{key}" if where else key)
        return f"{where} was {a!r}, is {b!r}"

    return walk(before.to_dictionary(), now.to_dictionary(), "")
