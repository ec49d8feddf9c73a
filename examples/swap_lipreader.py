"""Puts a fused ConvLSTM into a lipreader of the usual layout, where its feature maps are still spatial.

    pip install fused-convlstm[train]
    fused-convlstm generate clips && fused-convlstm prepare lrw clips cache     # or any cache of words: docs/data.md
    python examples/swap_lipreader.py cache

The lipreader is the one that most public lipreading code has: a 3D convolution over (B, 1, T, 88, 88), a ResNet-18 on
every frame, an average over the 3 x 3 pixels of its last maps (512 channels at full width), a two-layer bidirectional
LSTM over the clip (lengths given), and a linear layer. Its LSTM sees averages only: how things move within the maps is
lost to it. Here a recurrent layer over the maps goes in front of the average, with a weight that is zero at first, so
that fine-tuning starts from what the trained network could do.

Three networks are compared after the same number of epochs on the same clips: the one as it is, and with each of the
two layers. The times are CPU time, the shortest of several, taken in turns: with OMP_NUM_THREADS=1 they do not depend
on what else the machine does. ``--epochs 0 --tuning-epochs 0`` gives the times alone.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from fused_convlstm import ConvLSTM2d, PooledGateConvLSTM2d
from fused_convlstm.data import Batch, ClipDataset, TrainTransform, center_crop, collate

SIZE = 88


class Block(nn.Module):
    """The basic block of a ResNet-18."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            convolution = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.skip = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class Lipreader(nn.Module):
    """(B, 1, T, 88, 88) and lengths (B,) to logits (B, classes). ``width=64`` is the usual one: 512 channels last."""

    def __init__(self, classes: int, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.frontend = nn.Sequential(
            nn.Conv3d(1, width, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.trunk = nn.Sequential()
        channels = width
        for stage in range(4):
            out_channels = width << stage
            self.trunk.append(Block(channels, out_channels, 1 if stage == 0 else 2))
            self.trunk.append(Block(out_channels, out_channels, 1))
            channels = out_channels
        self.recurrence: SpatialRecurrence | None = None  # here a layer goes in
        self.lstm = nn.LSTM(channels, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, clips: Tensor, lengths: Tensor) -> Tensor:
        steps = clips.size(2)
        x = self.frontend(clips)  # (B, C, T, 22, 22)
        x = self.trunk(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, steps))  # (B, T, 8 C, 3, 3)
        if self.recurrence is not None:
            x = self.recurrence(x.transpose(0, 1), lengths).transpose(0, 1)
        x = x.mean(dim=(3, 4))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)  # zeros behind the end of a clip
        return self.head(x.sum(dim=1) / lengths[:, None])


class SpatialRecurrence(nn.Module):
    """A recurrent layer over maps (T, B, C, H, W), added to them with a weight that starts at zero."""

    def __init__(self, layer: ConvLSTM2d | PooledGateConvLSTM2d) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, maps: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.layer(maps, lengths=lengths)
        return maps + self.weight * output


def with_layer(model: Lipreader, kind: type[ConvLSTM2d] | type[PooledGateConvLSTM2d]) -> Lipreader:
    """A copy of ``model`` with a layer before its average."""
    model = copy.deepcopy(model)
    channels = model.lstm.input_size
    model.recurrence = SpatialRecurrence(kind(channels, channels, kernel_size=3))
    return model


def video(frames: Tensor) -> Tensor:
    """(T, B, 1, 88, 88), as the readers give it, to (B, 1, T, 88, 88)."""
    return frames.permute(1, 2, 0, 3, 4)


def train_step(model: Lipreader, optimiser: torch.optim.Optimizer, clips: Tensor, batch: Batch) -> None:
    loss = F.cross_entropy(model(clips, batch.lengths), batch.labels, label_smoothing=0.1)
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimiser.step()


def fit(model: Lipreader, loader: DataLoader[Batch], transform: TrainTransform, epochs: int, rate: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for batch in loader:
            train_step(model, optimiser, video(transform(batch)), batch)
            schedule.step()


@torch.no_grad()
def accuracy(model: Lipreader, loader: DataLoader[Batch], crop: int) -> float:
    model.eval()
    hits = total = 0
    for batch in loader:
        clips = video(center_crop(batch.frames, crop, SIZE, batch.lengths))
        hits += int((model(clips, batch.lengths).argmax(dim=1) == batch.labels).sum())
        total += len(batch.labels)
    return hits / total


def shortest_times(models: Mapping[str, Lipreader], batch: Batch, crop: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a forward pass and of a training step of each network on the same batch. The weights change."""
    clips = video(center_crop(batch.frames, crop, SIZE, batch.lengths))
    optimisers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()}

    @torch.no_grad()
    def predict(name: str) -> None:
        models[name].eval()(clips, batch.lengths)

    def train(name: str) -> None:
        train_step(models[name].train(), optimisers[name], clips, batch)

    shortest = {name: [float("inf"), float("inf")] for name in models}
    for _ in range(rounds):
        for name, best in shortest.items():
            for k, run in enumerate((predict, train)):
                start = time.process_time()
                run(name)
                best[k] = min(best[k], time.process_time() - start)
    return shortest


class Row(NamedTuple):
    name: str
    accuracy: float
    parameters: int
    forward_seconds: float  # CPU time of a batch
    training_seconds: float


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="a folder made by fused-convlstm prepare, of single words")
    parser.add_argument("--words", nargs="+", help="to tell apart; all of the cache by default")
    parser.add_argument("--width", type=int, default=64, help="channels of the first layer")
    parser.add_argument("--epochs", type=int, default=20, help="of the network before the layer goes in")
    parser.add_argument("--tuning-epochs", type=int, default=10, help="of each network afterwards")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10, help="of measuring times")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    parts = [ClipDataset(chosen.cache, part, classes=chosen.words) for part in ("train", "test")]
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(parts[0], chosen.batch, shuffle=True, collate_fn=collate, generator=generator)
    test = DataLoader(parts[1], chosen.batch, collate_fn=collate)
    batch = next(iter(train))
    side = batch.frames.size(-1)
    crop = round(0.85 * side)
    transform = TrainTransform(crop=(round(0.75 * side), round(0.95 * side)), size=SIZE, steps=None)

    model = Lipreader(len(parts[0].classes), chosen.width, hidden=4 * chosen.width)
    fit(model, train, transform, chosen.epochs, rate=1e-3)
    print(f"{len(parts[0])} clips to train on, {len(parts[1])} to test: accuracy {accuracy(model, test, crop):.3f}")
    makers: dict[str, Callable[[], Lipreader]] = {
        "as it was": lambda: copy.deepcopy(model),
        "with ConvLSTM2d": lambda: with_layer(model, ConvLSTM2d),
        "with PooledGateConvLSTM2d": lambda: with_layer(model, PooledGateConvLSTM2d),
    }
    models, accuracies = {}, {}
    for name, make in makers.items():
        torch.manual_seed(1)
        models[name] = make()
        fit(models[name], train, transform, chosen.tuning_epochs, rate=5e-4)
        accuracies[name] = accuracy(models[name], test, crop)
    counts = {name: sum(p.numel() for p in candidate.parameters()) for name, candidate in models.items()}
    times = shortest_times(models, batch, crop, chosen.rounds)
    rows = [Row(name, accuracies[name], counts[name], *times[name]) for name in models]
    print(f"{'after fine-tuning':26} {'accuracy':>8} {'parameters':>11} {'ms forward':>11} {'ms training step':>17}")
    for row in rows:
        print(
            f"{row.name:26} {row.accuracy:8.3f} {row.parameters:11,} {1e3 * row.forward_seconds:11.1f} "
            f"{1e3 * row.training_seconds:17.1f}"
        )
    return rows


if __name__ == "__main__":
    main()
