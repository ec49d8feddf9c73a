"""The lipreading networks that Courtney & Sreenivas compare with (table 1): no ConvLSTM in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..functional import check_choice
from .clips import (
    ClipModel,
    initialize_convolutions,
    mean_over_steps,
    per_frame,
    scaled,
    strided_steps,
    to_frames,
    to_volume,
)
from .heads import Head
from .layers import check_positive
from .streaming import Carry, ModelConfig, StreamingModel

FRONTS = ("2d", "3d")
BACKENDS = ("bilstm", "conv")
RESNETS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


@dataclass(frozen=True, kw_only=True)
class LipResNetConfig(ModelConfig):
    """Options of :class:`LipResNet`.

    Attributes:
        front: first convolution, 7x7 of stride 2: "3d" (over 5 frames) or "2d".
        depth: of the ResNet, 18 or 34.
        backend: "bilstm" (two layers) or "conv" (two convolutions over time of stride 2, with pooling).
        features: of a frame, and hidden units of the LSTM in each direction.
        width: factor of the ResNet's channels.
        dropout: before the output layer.
    """

    front: str = "3d"
    depth: int = 18
    backend: str = "bilstm"
    features: int = 256
    width: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.front, "front", FRONTS)
        check_choice(self.backend, "backend", BACKENDS)
        if self.depth not in RESNETS:
            raise ValueError(f"depth: expected one of {', '.join(map(str, RESNETS))}, got {self.depth}")
        check_positive("features", [self.features])
        if self.width <= 0.0:
            raise ValueError(f"width: expected more than 0, got {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to less than 1, got {self.dropout}")


class PreActivationBlock(nn.Module):
    """Batch normalisation and ReLU before each of two 3x3 convolutions, and a skip path (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride != 1 or in_channels != channels
        self.project = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        y = F.relu(self.norm1(x))
        skip = x if self.project is None else self.project(y)
        return skip + self.conv2(F.relu(self.norm2(self.conv1(y))))  # type: ignore[no-any-return]


def make_resnet(depth: int, width: float) -> nn.Sequential:
    """A pre-activation ResNet behind its first convolution, with the mean over space: (N, 64, H, W) -> (N, 512)."""
    layers: list[nn.Module] = []
    before = scaled(64, width)
    for k, (channels, count) in enumerate(zip((64, 128, 256, 512), RESNETS[depth], strict=True)):
        for j in range(count):
            layers.append(PreActivationBlock(before, scaled(channels, width), 2 if k > 0 and j == 0 else 1))
            before = scaled(channels, width)
    return nn.Sequential(*layers, nn.BatchNorm2d(before), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class LipResNet(ClipModel):
    """A ResNet on every frame behind a 2D or a 3D convolution, then a BiLSTM or convolutions over time.

    Stafylakis & Tzimiropoulos 2017 (3D + ResNet34 + BiLSTM, 2D and 3D + ResNet34 + Conv) and its shallower successors
    (3D + ResNet18 + BiLSTM). The BiLSTM's output is averaged over time.
    """

    config: LipResNetConfig
    scales = ()

    def __init__(self, config: LipResNetConfig) -> None:
        super().__init__()
        self.config = config
        stem = scaled(64, config.width)
        channels = config.in_channels
        self.front: nn.Module
        if config.front == "3d":
            self.front = nn.Sequential(
                nn.Conv3d(channels, stem, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False), nn.BatchNorm3d(stem), nn.ReLU(),
                nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            )  # fmt: skip
        else:
            self.front = nn.Sequential(
                nn.Conv2d(channels, stem, 7, 2, 3, bias=False), nn.BatchNorm2d(stem), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
            )
        self.resnet = make_resnet(config.depth, config.width)
        wide, features = scaled(512, config.width), config.features
        self.projection = nn.Linear(wide, features)
        self.temporal: nn.Module
        if config.backend == "bilstm":
            self.temporal = nn.LSTM(features, features, num_layers=2, bidirectional=True)
        else:
            self.temporal = nn.Sequential(
                nn.Conv1d(features, 2 * features, 5, 2, 2, bias=False), nn.BatchNorm1d(2 * features), nn.ReLU(),
                nn.MaxPool1d(2, ceil_mode=True),
                nn.Conv1d(2 * features, 2 * features, 5, 2, 2, bias=False), nn.BatchNorm1d(2 * features), nn.ReLU(),
            )  # fmt: skip
        self.head = nn.Linear(2 * features, config.num_classes)
        for part in (self.front, self.resnet, self.temporal):
            initialize_convolutions(part)

    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        if self.config.front == "3d":
            x = to_frames(self.front(to_volume(frames)))
        else:
            x = per_frame(self.front, frames, carry.valid)
        x = self.projection(per_frame(self.resnet, x, carry.valid))  # (T, B, F)
        if isinstance(self.temporal, nn.LSTM):
            x = mean_over_steps(_bilstm(self.temporal, x, carry.lengths), carry.valid)
        else:
            if carry.valid is not None:
                x = x * carry.valid[:, :, None]
            x = self.temporal(x.permute(1, 2, 0)).permute(2, 0, 1)  # (T / 8, B, 2 * F)
            x = mean_over_steps(x, strided_steps(carry.valid, 8))
        return self.head(F.dropout(x, self.config.dropout, self.training))  # type: ignore[no-any-return]


def _bilstm(lstm: nn.LSTM, x: Tensor, lengths: Tensor | None) -> Tensor:  # (T, B, F) -> (T, B, 2 * F)
    if lengths is None:
        return lstm(x)[0]  # type: ignore[no-any-return]
    # A sample without a valid step counts as one of a zero frame; nothing of it is used.
    packed = pack_padded_sequence(x, lengths.clamp_min(1), enforce_sorted=False)
    output, _ = pad_packed_sequence(lstm(packed)[0], total_length=x.size(0))
    return output


@dataclass(frozen=True, kw_only=True)
class VGGMConfig(ModelConfig):
    """Options of :class:`VGGMMultitower` and :class:`VGGMLSTM`.

    Attributes:
        channels: of the five convolutions.
        fc_channels: of the fully connected layer.
        frames: how many the multitower network takes; shorter clips are filled with zeros at the end, and of longer
            ones, which it takes in evaluation only, the middle is seen.
        head_channels: of the LSTM.
        dropout: before the LSTM, or before the output layer.
    """

    channels: tuple[int, ...] = (96, 256, 256, 256, 256)
    fc_channels: int = 512
    frames: int = 25
    head_channels: int = 512
    dropout: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.channels) != 5:
            raise ValueError(f"channels: expected 5 values, got {list(self.channels)}")
        check_positive("channels", self.channels)
        for name in ("fc_channels", "frames", "head_channels"):
            check_positive(name, [getattr(self, name)])
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to less than 1, got {self.dropout}")


def _tower(in_channels: int, channels: int) -> nn.Sequential:
    """VGG-M's first layer: 7x7 of stride 2 and pooling."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )  # fmt: skip


def _upper(config: VGGMConfig, in_channels: int) -> nn.Sequential:
    """VGG-M's other layers, to a vector."""
    _, c2, *rest = config.channels
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, c2, 5, 2, 2, bias=False), nn.BatchNorm2d(c2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    before = c2
    for channels in rest:
        layers += [nn.Conv2d(before, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, config.fc_channels), nn.ReLU()]
    return nn.Sequential(*layers)


class VGGMMultitower(ClipModel):
    """VGG-M whose first layer sees every frame, and the others all of them as channels (Chung & Zisserman 2016)."""

    config: VGGMConfig
    scales = ()

    def __init__(self, config: VGGMConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.channels[0]
        self.tower = _tower(config.in_channels, channels)
        self.reduce = nn.Conv2d(config.frames * channels, channels, 1)
        self.upper = _upper(config, channels)
        self.head = nn.Linear(config.fc_channels, config.num_classes)
        initialize_convolutions(self)

    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        wanted = self.config.frames
        if frames.size(0) > wanted and self.training:
            raise ValueError(
                f"frames: expected at most {wanted} in training (the model's option 'frames'), got {frames.size(0)}"
            )
        if frames.size(0) > wanted:  # without padding, as ClipModel evaluates
            start = (frames.size(0) - wanted) // 2
            frames = frames[start : start + wanted]
        x = per_frame(self.tower, frames, carry.valid)
        x = torch.cat((x, x.new_zeros((wanted - x.size(0), *x.shape[1:])))).transpose(0, 1).flatten(1, 2)
        x = self.upper(F.relu(self.reduce(x)))
        return self.head(F.dropout(x, self.config.dropout, self.training))  # type: ignore[no-any-return]


class VGGMLSTM(StreamingModel):
    """VGG-M on every frame, and an LSTM (Courtney & Sreenivas, table 1)."""

    config: VGGMConfig
    scales = ()

    def __init__(self, config: VGGMConfig) -> None:
        super().__init__()
        self.config = config
        self.vggm = nn.Sequential(
            _tower(config.in_channels, config.channels[0]), _upper(config, config.channels[0])
        )  # fmt: skip
        self.head = Head("lstm", config.fc_channels, config.head_channels, config.num_classes, config.dropout)
        initialize_convolutions(self.vggm)

    def _run(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = per_frame(self.vggm, frames, carry.valid)
        return self.head(x[..., None, None], carry.scope("head"))  # type: ignore[no-any-return]
