"""Gesture recognition: the networks that Zhang et al. compare (NeurIPS 2018, tables 1 and 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import check_choice
from ..modules import (
    ConvLSTM2d,
    InputAttentionConvLSTM2d,
    InputGateAttentionConvLSTM2d,
    OutputGateAttentionConvLSTM2d,
    PooledGateConvLSTM2d,
)
from ..reference import GATE_ACTIVATIONS
from .clips import (
    ClipModel,
    MaxPool3dSame,
    SameConv2d,
    SameConv3d,
    initialize_convolutions,
    lengths_of,
    mean_over_steps,
    per_frame,
    scaled,
    strided_steps,
    to_frames,
    to_volume,
)
from .streaming import Carry, ModelConfig

# The ConvLSTM component, table 1: the first of its two layers. The second is a ConvLSTM behind a ConvLSTM, else (a).
COMPONENTS: dict[str, type[Any]] = {
    "convlstm": ConvLSTM2d,
    "pooled_gate": PooledGateConvLSTM2d,  # variant (a)
    "input_attention": InputAttentionConvLSTM2d,  # variant (b)
    "input_gate_attention": InputGateAttentionConvLSTM2d,  # variant (c)
    "output_gate_attention": OutputGateAttentionConvLSTM2d,  # variant (d)
}
BATCH_NORM_EPSILON = 1e-3  # Keras's


@dataclass(frozen=True, kw_only=True)
class GestureConfig(ModelConfig):
    """Options of every model in this module.

    Attributes:
        width: factor of all channels.
        dropout: before the output layer.
    """

    num_classes: int = 27
    in_channels: int = 3
    width: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width <= 0.0:
            raise ValueError(f"width: expected more than 0, got {self.width}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability from 0 to less than 1, got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class Res3DConvLSTMMobileNetConfig(GestureConfig):
    """Options of :class:`Res3DConvLSTMMobileNet`.

    Attributes:
        component: "convlstm", or "pooled_gate", "input_attention", "input_gate_attention", "output_gate_attention":
            variants (a) to (d).
        gate_activation: see :class:`~fused_convlstm.ConvLSTM2d`; the authors' code has "hard_sigmoid_keras2".
    """

    component: str = "pooled_gate"
    gate_activation: str = "sigmoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self.component, "component", tuple(COMPONENTS))
        check_choice(self.gate_activation, "gate_activation", tuple(GATE_ACTIVATIONS))


class Residual3d(nn.Module):
    """Two 3x3x3 convolutions and a skip path; with ``project`` a 1x1x1 convolution on it (Tran et al. 2017)."""

    def __init__(self, in_channels: int, channels: int, stride: tuple[int, int, int], project: bool) -> None:
        super().__init__()
        self.project = _conv3d(in_channels, channels, (1, 1, 1), stride) if project else None
        self.conv1 = _conv3d(in_channels, channels, (3, 3, 3), stride)
        self.conv2 = _conv3d(channels, channels, (3, 3, 3), (1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T, H, W)
        skip = x if self.project is None else self.project(x)
        return F.relu(skip + self.conv2(F.relu(self.conv1(x))))


def _conv3d(
    in_channels: int, channels: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]
) -> nn.Sequential:
    return nn.Sequential(
        SameConv3d(in_channels, channels, kernel, stride, bias=False),
        nn.BatchNorm3d(channels, eps=BATCH_NORM_EPSILON),
    )


def make_res3d(in_channels: int, channels: tuple[int, ...], strides: tuple[tuple[int, int, int], ...]) -> nn.Sequential:
    """A 3x7x7 convolution of stride (1, 2, 2), then two residual blocks for each of ``channels``."""
    stem = channels[0]
    layers: list[nn.Module] = [_conv3d(in_channels, stem, (3, 7, 7), (1, 2, 2)), nn.ReLU()]
    before = stem
    for width, stride in zip(channels, strides, strict=True):
        layers += [Residual3d(before, width, stride, True), Residual3d(width, width, (1, 1, 1), False)]
        before = width
    return nn.Sequential(*layers)


class SeparableConv2d(nn.Sequential):
    """Depthwise 3x3, pointwise with bias, batch normalisation, ReLU6: MobileNet's layer, as Keras has it."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__(
            SameConv2d(in_channels, in_channels, 3, stride, groups=in_channels, bias=False),
            nn.Conv2d(in_channels, channels, 1),
            nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON),
            nn.ReLU6(),
        )


def make_mobilenet(in_channels: int, width: float) -> nn.Sequential:
    """The upper layers of MobileNet, from 28x28 maps to 4x4."""
    plan = [(256, 1), (256, 2), *[(512, 1)] * 5, (1024, 2), (1024, 2)]
    layers: list[nn.Module] = []
    for channels, stride in plan:
        layers.append(SeparableConv2d(in_channels, scaled(channels, width), stride))
        in_channels = scaled(channels, width)
    return nn.Sequential(*layers)


class Res3DConvLSTMMobileNet(ClipModel):
    """Blocks 1 to 4 of Res3D, a ConvLSTM component of two layers, the top of MobileNet, a mean over time and space.

    Zhang et al., section 2.1 and fig. 1. A clip of T frames of 112x112 gives T / 2 maps of 28x28 to the component.
    Steps past a clip's end are left out of the component, of MobileNet and of the mean.
    """

    config: Res3DConvLSTMMobileNetConfig
    scales = ("s4",)

    def __init__(self, config: Res3DConvLSTMMobileNetConfig) -> None:
        super().__init__()
        self.config = config
        blocks = tuple(scaled(c, config.width) for c in (64, 128, 256))
        self.res3d = make_res3d(config.in_channels, blocks, ((1, 1, 1), (2, 2, 2), (1, 1, 1)))
        channels = blocks[-1]
        second = ConvLSTM2d if config.component == "convlstm" else PooledGateConvLSTM2d
        options: dict[str, Any] = {"gate_activation": config.gate_activation}
        self.lstm1 = COMPONENTS[config.component](channels, channels, 3, **options)
        self.lstm2 = second(channels, channels, 3, **options)
        self.mobilenet = make_mobilenet(channels, config.width)
        self.head = nn.Linear(scaled(1024, config.width), config.num_classes)
        initialize_convolutions(self.res3d)
        initialize_convolutions(self.mobilenet)
        nn.init.kaiming_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = to_frames(self.res3d(to_volume(frames)))  # (T / 2, B, C, H / 4, W / 4)
        valid = strided_steps(carry.valid, 2)
        lengths, reset = lengths_of(valid), strided_steps(resets.get("s4"), 2)
        x, _ = self.lstm1(x, lengths=lengths, reset=reset)
        x, _ = self.lstm2(x, lengths=lengths, reset=reset)
        x = per_frame(self.mobilenet, x, valid).mean(dim=(3, 4))
        return self.head(_dropout(self, mean_over_steps(x, valid)))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class BiConvLSTMGestureConfig(GestureConfig):
    """Options of :class:`BiConvLSTMGesture`.

    Attributes:
        channels3d: of the four 3D convolutions.
        recurrent_channels: of each direction of the two bidirectional ConvLSTMs.
        channels2d: of the 2D convolutions, each followed by 2x2 pooling.
    """

    channels3d: tuple[int, ...] = (64, 128, 256, 256)
    recurrent_channels: tuple[int, ...] = (256, 256)
    channels2d: tuple[int, ...] = (128, 256, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.channels3d) != 4:
            raise ValueError(f"channels3d: expected 4 values, got {list(self.channels3d)}")


class BiConvLSTMGesture(ClipModel):
    """3DCNN + BiConvLSTM + 2DCNN (Zhang et al. 2017, compared with in table 2).

    Four 3D convolutions with pooling after the first (1, 2, 2) and the second (2, 2, 2), bidirectional ConvLSTMs, 2D
    convolutions of every step, a mean over time and space. The channels of the last two parts are this package's.
    """

    config: BiConvLSTMGestureConfig
    scales = ("s4",)

    def __init__(self, config: BiConvLSTMGestureConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = config.in_channels
        for k, count in enumerate(config.channels3d):
            width = scaled(count, config.width)
            layers += [_conv3d(channels, width, (3, 3, 3), (1, 1, 1)), nn.ReLU()]
            if k < 2:
                layers.append(MaxPool3dSame((1, 2, 2) if k == 0 else (2, 2, 2)))
            channels = width
        self.cnn3d = nn.Sequential(*layers)
        hidden = [scaled(count, config.width) for count in config.recurrent_channels]
        self.lstm = ConvLSTM2d(channels, hidden, 3, len(hidden), bidirectional=True)
        channels = 2 * hidden[-1]
        layers = []
        for count in config.channels2d:
            width = scaled(count, config.width)
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            channels = width
        self.cnn2d = nn.Sequential(*layers)
        self.head = nn.Linear(channels, config.num_classes)
        initialize_convolutions(self.cnn3d)
        initialize_convolutions(self.cnn2d)

    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = to_frames(self.cnn3d(to_volume(frames)))
        valid = strided_steps(carry.valid, 2)
        x, _ = self.lstm(x, lengths=lengths_of(valid), reset=strided_steps(resets.get("s4"), 2))
        x = per_frame(self.cnn2d, x, valid).mean(dim=(3, 4))
        return self.head(_dropout(self, mean_over_steps(x, valid)))  # type: ignore[no-any-return]


class Res3D(ClipModel):
    """Res3D alone (Tran et al. 2017): five blocks, a mean over time and space."""

    config: GestureConfig
    scales = ()

    def __init__(self, config: GestureConfig) -> None:
        super().__init__()
        self.config = config
        channels = tuple(scaled(c, config.width) for c in (64, 128, 256, 512))
        self.res3d = make_res3d(config.in_channels, channels, ((1, 1, 1), *[(2, 2, 2)] * 3))
        self.head = nn.Linear(channels[-1], config.num_classes)
        initialize_convolutions(self.res3d)

    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = to_frames(self.res3d(to_volume(frames))).mean(dim=(3, 4))
        return self.head(_dropout(self, mean_over_steps(x, strided_steps(carry.valid, 8))))  # type: ignore[no-any-return]


class C3D(ClipModel):
    """C3D (Tran et al. 2015): eight 3x3x3 convolutions, five poolings, two layers of 4096.

    The fully connected layers see the mean over time and space, so that a clip may have any size.
    """

    config: GestureConfig
    scales = ()

    def __init__(self, config: GestureConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        before = config.in_channels
        for k, (channels, count) in enumerate([(64, 1), (128, 1), (256, 2), (512, 2), (512, 2)]):
            for _ in range(count):
                layers += [nn.Conv3d(before, scaled(channels, config.width), 3, padding=1), nn.ReLU()]
                before = scaled(channels, config.width)
            layers.append(MaxPool3dSame((1, 2, 2) if k == 0 else (2, 2, 2)))
        self.features = nn.Sequential(*layers)
        hidden = scaled(4096, config.width)
        self.fc = nn.ModuleList([nn.Linear(self._parts * before, hidden), nn.Linear(hidden, hidden)])
        self.head = nn.Linear(hidden, config.num_classes)
        initialize_convolutions(self)

    _parts = 1  # of the clip, whose features are put side by side

    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = self._features(frames, carry.valid)
        for layer in self.fc:
            x = _dropout(self, F.relu(layer(x)))
        return self.head(x)

    def _features(self, frames: Tensor, valid: Tensor | None) -> Tensor:  # (T, B, C, H, W) -> (B, parts * K)
        x = to_frames(self.features(to_volume(frames))).mean(dim=(3, 4))
        return mean_over_steps(x, strided_steps(valid, 16))


class PyramidalC3D(C3D):
    """C3D on a pyramid of parts of the clip (Zhu et al. 2016): the whole clip, its halves and its quarters, each with a
    quarter of the clip's frames, evenly spread.

    The parts go through the same convolutions; their features are put side by side before the fully connected layers.
    """

    _levels = 3
    _parts = 2**_levels - 1

    def _features(self, frames: Tensor, valid: Tensor | None) -> Tensor:
        clips = frames.size(1)
        lengths = torch.full((clips,), frames.size(0)) if valid is None else valid.sum(dim=0).cpu()
        index, part_valid = pyramid_steps(lengths.clamp_min(1), self._levels)  # (parts, steps of a part, B)
        parts = frames[index, torch.arange(clips)].transpose(0, 1).flatten(1, 2)  # (steps, parts * B, C, H, W)
        if valid is not None:
            valid = part_valid.transpose(0, 1).flatten(1, 2).to(frames.device)
            parts = parts.masked_fill(~valid[:, :, None, None, None], 0)
        x = super()._features(parts, valid)  # (parts * B, K)
        return x.unflatten(0, (len(index), -1)).transpose(0, 1).flatten(1)


def pyramid_steps(
    lengths: Tensor,  # (B,)
    levels: int,
) -> tuple[Tensor, Tensor]:  # (parts, steps of a part, B) each
    """Which steps the parts of a pyramid have of clips of ``lengths`` frames, and which of these are valid.

    The parts of a shorter clip have fewer. A step past a clip's last is the last.
    """
    finest = 2 ** (levels - 1)  # parts of the last level
    counts = -(-lengths // finest)  # (B,)
    steps = torch.arange(int(counts.max()))[:, None]  # (steps, 1)
    parts = []
    for level in range(levels):
        stride = finest >> level
        parts += [(steps + part * counts) * stride for part in range(2**level)]
    index = torch.stack(parts).minimum(lengths - 1)
    return index, (steps < counts).expand_as(index)


def _dropout(model: ClipModel, x: Tensor) -> Tensor:
    config = model.config
    assert isinstance(config, GestureConfig)
    return torch.nn.functional.dropout(x, config.dropout, model.training)
