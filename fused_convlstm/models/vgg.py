"""VGG-M ConvLSTM (Courtney & Sreenivas, section 3.2, fig. 3a)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..modules import ConvLSTM2d
from .heads import Head
from .layers import FrameConv2d, FrameNorm, check_positive, set_forget_bias
from .streaming import Carry, ModelConfig, StreamingModel


@dataclass(frozen=True, kw_only=True)
class VGGMConvLSTMConfig(ModelConfig):
    """Options of :class:`VGGMConvLSTM`. The paper has fewer channels than VGG-M and does not say how many.

    Attributes:
        channels: of the first convolution, which is 2D, and of the four ConvLSTMs.
        fc_channels: of the fully connected layer.
        head, head_channels, dropout, norm, forget_bias: see :class:`ResNetConvLSTMConfig`.
    """

    channels: tuple[int, ...] = (48, 96, 128, 128, 128)
    fc_channels: int = 512
    head: str = "lstm"
    head_channels: int = 512
    dropout: float = 0.5
    norm: str = "batch"
    forget_bias: float = -1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.channels) != 5:
            raise ValueError(f"channels: expected 5 values, one a convolution, got {list(self.channels)}")
        check_positive("channels", self.channels)
        check_positive("fc_channels", [self.fc_channels])
        check_positive("head_channels", [self.head_channels])


class VGGMConvLSTM(StreamingModel):
    """VGG-M, whose convolutions after the first are ConvLSTMs: 7x7/2, pool, 5x5, pool, three 3x3, pool, FC, head."""

    config: VGGMConvLSTMConfig
    scales = ("s4", "s8")

    def __init__(self, config: VGGMConvLSTMConfig) -> None:
        super().__init__()
        self.config = config
        c1, c2, c3, c4, c5 = config.channels
        self.conv1 = FrameConv2d(config.in_channels, c1, 7, stride=2, padding=3, bias=config.norm == "none")
        self.norm1 = FrameNorm(c1, config.norm)
        self.conv2 = ConvLSTM2d(c1, c2, 5)
        self.conv3 = nn.ModuleList([ConvLSTM2d(c2, c3, 3), ConvLSTM2d(c3, c4, 3), ConvLSTM2d(c4, c5, 3)])
        set_forget_bias(self, config.forget_bias)
        # On the 3x3 map of a 48x48 frame, this is a fully connected layer.
        self.fc = FrameConv2d(c5, config.fc_channels, 3, bias=config.norm == "none")
        self.fc_norm = FrameNorm(config.fc_channels, config.norm)
        self.head = Head(config.head, config.fc_channels, config.head_channels, config.num_classes, config.dropout)

    def _run(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = _pool(F.relu(self.norm1(self.conv1(frames), carry.valid)))
        x = _pool(carry.scope("s4", resets.get("s4")).conv_lstm("conv2", self.conv2, x))
        s8 = carry.scope("s8", resets.get("s8"))
        for k, layer in enumerate(self.conv3):
            x = s8.conv_lstm(f"conv{k + 3}", layer, x)  # type: ignore[arg-type]
        x = F.relu(self.fc_norm(self.fc(_pool(x)), carry.valid))
        return self.head(x, carry.scope("head"))  # type: ignore[no-any-return]


def _pool(x: Tensor) -> Tensor:
    """3x3 max pooling of stride 2 of (T, B, C, H, W)."""
    return F.max_pool2d(x.flatten(0, 1), 3, stride=2, padding=1).unflatten(0, x.shape[:2])
