"""Puts a fused ConvLSTM into a lipreader of the usual layout, where its feature maps are still spatial.

    pip install fused-convlstm[train]
    python examples/swap_lipreader.py --folder lipreader

The lipreader is the one that most public lipreading code has: a 3D convolution over (B, 1, T, 88, 88), a ResNet-18 on
every frame, an average over the 3 x 3 pixels of its last maps (512 channels at full width), a two-layer bidirectional
LSTM over the clip (lengths given), and a linear layer. Its LSTM sees averages only: how things move within the maps is
lost to it. Here a recurrent layer over the maps goes in front of the average, with a weight that is zero at first, so
that fine-tuning starts from what the trained network could do.

The data are procedural: faces that speak words, each of which is the reverse of another. Three networks are compared
after the same number of epochs on the same clips: the one as it is, and with each of the two layers.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from fused_convlstm import ConvLSTM2d, PooledGateConvLSTM2d
from fused_convlstm.data import (
    LRW,
    Batch,
    ClipDataset,
    TrainTransform,
    center_crop,
    collate,
    prepare,
    procedural,
)

# Each the reverse of another: one average would not do.
WORDS = ("FEEDBACK", "CAPTIVE", "BALLOON", "TULIP", "DEPOT", "OMIT")
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
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        self.trunk = nn.Sequential(
            *(
                nn.Sequential(
                    Block(channels[k], channels[k + 1], 1 if k == 0 else 2), Block(*channels[k + 1 :][:1] * 2, 1)
                )
                for k in range(4)
            )
        )
        self.maps: nn.Module = nn.Identity()  # (T, B, C, 3, 3) to the same: what an added layer takes the place of
        self.lstm = nn.LSTM(8 * width, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, clips: Tensor, lengths: Tensor) -> Tensor:
        steps = clips.size(2)
        x = self.frontend(clips)  # (B, C, T, 22, 22)
        x = self.trunk(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, steps))  # (B, T, 8 C, 3, 3)
        if isinstance(self.maps, SpatialRecurrence):
            x = self.maps(x.transpose(0, 1), lengths).transpose(0, 1)
        x = x.mean(dim=(3, 4))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        valid = torch.arange(x.size(1)) < lengths[:, None]
        return self.head((x * valid[..., None]).sum(dim=1) / lengths[:, None])


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
    model.maps = SpatialRecurrence(kind(channels, channels, kernel_size=3))
    return model


def make_data(folder: Path, words: list[str]) -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    """Renders the clips of all words, finds the mouths, and returns loaders of the train and the test part of some."""
    procedural.generate(folder / "videos")
    prepare(LRW(folder / "videos"), folder / "cache")
    parts = [ClipDataset(folder / "cache", part, classes=words) for part in ("train", "test")]
    generator = torch.Generator().manual_seed(0)
    train = DataLoader(parts[0], batch_size=8, shuffle=True, collate_fn=collate, generator=generator)
    return train, DataLoader(parts[1], batch_size=8, collate_fn=collate)


def fit(model: Lipreader, loader: DataLoader[Batch], epochs: int, rate: float) -> float:
    """Trains; returns seconds per step, data not counted."""
    transform = TrainTransform(crop=(60, 76), size=SIZE, steps=None)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(loader))
    seconds, steps = 0.0, 0
    model.train()
    for _ in range(epochs):
        for batch in loader:
            clips = transform(batch).permute(1, 2, 0, 3, 4)  # (B, 1, T, 88, 88)
            start = time.perf_counter()
            loss = F.cross_entropy(model(clips, batch.lengths), batch.labels, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            seconds, steps = seconds + time.perf_counter() - start, steps + 1
    return seconds / steps


@torch.no_grad()
def accuracy(model: Lipreader, loader: DataLoader[Batch]) -> float:
    model.eval()
    hits = total = 0
    for batch in loader:
        clips = center_crop(batch.frames, 68, SIZE).permute(1, 2, 0, 3, 4)
        hits += int((model(clips, batch.lengths).argmax(dim=1) == batch.labels).sum())
        total += len(batch.labels)
    return hits / total


def main(arguments: list[str] | None = None) -> list[tuple[str, float, int, float]]:
    """Returns name, accuracy, parameters and seconds per training step of each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the clips; used again if it has them")
    parser.add_argument("--width", type=int, default=16, help="channels of the first layer; 64 is the usual network")
    parser.add_argument("--words", nargs="+", default=list(WORDS), choices=list(procedural.WORDS))
    parser.add_argument("--epochs", type=int, default=12, help="of the network before the layer goes in")
    parser.add_argument("--tuning-epochs", type=int, default=6, help="of each network afterwards")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    train, test = make_data(chosen.folder, chosen.words)
    model = Lipreader(len(chosen.words), chosen.width, hidden=4 * chosen.width)
    fit(model, train, chosen.epochs, rate=1e-3)
    print(f"trained: accuracy {accuracy(model, test):.3f}")
    candidates: dict[str, Callable[[], Lipreader]] = {
        "as it was": lambda: copy.deepcopy(model),
        "with ConvLSTM2d": lambda: with_layer(model, ConvLSTM2d),
        "with PooledGateConvLSTM2d": lambda: with_layer(model, PooledGateConvLSTM2d),
    }
    rows = []
    print(f"{'network':28} {'accuracy':>9} {'parameters':>11} {'ms a step':>10}")
    for name, make in candidates.items():
        torch.manual_seed(1)
        candidate = make()
        seconds = fit(candidate, train, chosen.tuning_epochs, rate=5e-4)
        parameters = sum(parameter.numel() for parameter in candidate.parameters())
        rows.append((name, accuracy(candidate, test), parameters, seconds))
        print(f"{name:28} {rows[-1][1]:9.3f} {parameters:11,} {1e3 * seconds:10.1f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
