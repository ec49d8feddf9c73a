"""ResNet50 on single frames: what Zhang et al. (table 2) compare with."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from .clips import ClipModel, initialize_convolutions, mean_over_steps, per_frame, scaled
from .gesture import GestureConfig
from .streaming import Carry

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # inner channels and blocks; a block's output has 4 times as many


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolution and a skip path (He et al. 2016)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.downsample(x) + self.bn3(self.conv3(y)))


def make_resnet50(in_channels: int, width: float) -> nn.Sequential:
    """(N, C, H, W) -> (N, 2048, H / 32, W / 32); parameters are named and shaped as in torchvision's ``resnet50()``."""
    before = scaled(64, width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, before, 7, 2, 3, bias=False),
        bn1=nn.BatchNorm2d(before),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(3, 2, 1),
    )
    for stage, (inner, count) in enumerate(STAGES, start=1):
        channels = scaled(inner, width)
        blocks = []
        for k in range(count):
            blocks.append(Bottleneck(before, channels, 2 if stage > 1 and k == 0 else 1))
            before = 4 * channels
        layers[f"layer{stage}"] = nn.Sequential(*blocks)
    return nn.Sequential(layers)


class ResNet50(ClipModel):
    """ResNet50 on every frame, a mean over space and time.

    ``model.backbone.load_state_dict(torchvision.models.resnet50(weights="DEFAULT").state_dict(), strict=False)`` loads
    weights of ImageNet.
    """

    config: GestureConfig
    scales = ()

    def __init__(self, config: GestureConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = make_resnet50(config.in_channels, config.width)
        self.head = nn.Linear(4 * scaled(STAGES[-1][0], config.width), config.num_classes)
        initialize_convolutions(self.backbone)

    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        x = per_frame(self.backbone, frames, carry.valid).mean(dim=(3, 4))
        x = F.dropout(mean_over_steps(x, carry.valid), self.config.dropout, self.training)
        return self.head(x)
