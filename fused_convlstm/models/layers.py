"""Layers that see every frame on its own, and the blocks built of them and of ConvLSTMs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import check_choice
from ..modules import ConvLSTM2d
from .streaming import Carry

NORMS = ("group", "batch", "none")
GROUP_CHANNELS = 8  # channels that share their statistics, where they divide evenly


class FrameConv2d(nn.Conv2d):
    """A 2D convolution of every frame of (T, B, C, H, W)."""

    def forward(self, input: Tensor) -> Tensor:
        # Channels innermost, which is what the kernels of the ConvLSTMs work on.
        frames = input.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        output: Tensor = super().forward(frames).contiguous(memory_format=torch.channels_last)
        return output.unflatten(0, input.shape[:2])


class FrameNorm(nn.Module):
    """Normalisation of (T, B, C, H, W), after a 2D convolution.

    "batch" takes its statistics over all valid frames of the batch while training, and running ones after, so that a
    stream then gives what the whole clip gives. Unlike "group" it leaves how bright or strong a frame is relative to
    the one before, and learns motion faster. "group" normalises each frame by itself: it does not mix samples, so
    several processes give what one gives.
    """

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        check_choice(kind, "norm", NORMS)
        self.norm: nn.Module
        if kind == "group":
            groups = channels // GROUP_CHANNELS if channels % GROUP_CHANNELS == 0 else 1
            self.norm = nn.GroupNorm(groups, channels)
        else:
            self.norm = nn.BatchNorm2d(channels) if kind == "batch" else nn.Identity()

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        frames = x.flatten(0, 1)
        if not isinstance(self.norm, nn.BatchNorm2d) or not self.training:
            return self.norm(frames).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]
        if valid is None:
            return _batch_norm(self.norm, frames).unflatten(0, x.shape[:2])
        # Padding must not count among the statistics.
        index = valid.flatten().nonzero().flatten()
        normed = _batch_norm(self.norm, frames[index])
        return torch.zeros_like(frames, dtype=normed.dtype).index_copy(0, index, normed).unflatten(0, x.shape[:2])


def _batch_norm(norm: nn.BatchNorm2d, frames: Tensor) -> Tensor:  # (N, C, H, W)
    """``norm`` in training. One value a channel, as the last chunk of a clip may have on maps of one pixel, has no
    variance: it is normalised by the running statistics, and leaves them as they are."""
    if frames.numel() > frames.size(1) or not norm.training:
        return norm(frames)  # type: ignore[no-any-return]
    return F.batch_norm(frames, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class SpatialLayer(nn.Module):
    """A ConvLSTM, or in its place a 2D convolution with normalisation and tanh, which has the same range."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int, recurrent: bool, norm: str
    ) -> None:
        super().__init__()
        self.layer: ConvLSTM2d | FrameConv2d
        if recurrent:
            self.layer = ConvLSTM2d(in_channels, channels, kernel_size, stride=stride)
        else:
            self.layer = FrameConv2d(
                in_channels, channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=norm == "none"
            )
            self.norm = FrameNorm(channels, norm)

    def forward(self, x: Tensor, carry: Carry, name: str) -> Tensor:
        if isinstance(self.layer, ConvLSTM2d):
            return carry.conv_lstm(name, self.layer, x)
        return torch.tanh(self.norm(self.layer(x), carry.valid))


class SubBlock(nn.Module):
    """A bottleneck: 1x1 convolution, 3x3 ConvLSTM, 1x1 convolution, and a skip path (fig. 4).

    Type A halves the frame, and its skip path is a 1x1 ConvLSTM of stride 2; type B leaves its input on the skip path.
    With ``recurrent`` False the ConvLSTMs are 2D convolutions.
    """

    def __init__(
        self, kind: str, in_channels: int, mid_channels: int, out_channels: int, recurrent: bool, norm: str
    ) -> None:
        super().__init__()
        check_choice(kind, "kind", ("A", "B"))
        if kind == "B" and in_channels != out_channels:
            raise ValueError(f"in_channels: expected {out_channels} like out_channels in type B, got {in_channels}")
        stride = 2 if kind == "A" else 1
        bias = norm == "none"
        self.reduce = FrameConv2d(in_channels, mid_channels, 1, bias=bias)
        self.reduce_norm = FrameNorm(mid_channels, norm)
        self.spatial = SpatialLayer(mid_channels, mid_channels, 3, stride, recurrent, norm)
        self.expand = FrameConv2d(mid_channels, out_channels, 1, bias=bias)
        self.expand_norm = FrameNorm(out_channels, norm)
        self.skip = SpatialLayer(in_channels, out_channels, 1, 2, recurrent, norm) if kind == "A" else None

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        y = F.relu(self.reduce_norm(self.reduce(x), carry.valid))
        y = self.spatial(y, carry, "main")
        y = self.expand_norm(self.expand(y), carry.valid)
        return F.relu(y + (x if self.skip is None else self.skip(x, carry, "skip")))


class ResConvLSTM(nn.ModuleList):
    """Res_ConvLSTM(n, in, mid, out): one sub-block A, then n - 1 sub-blocks B (section 3.3)."""

    def __init__(
        self, n: int, in_channels: int, mid_channels: int, out_channels: int, recurrent: bool, norm: str
    ) -> None:
        super().__init__(
            SubBlock("B" if k else "A", out_channels if k else in_channels, mid_channels, out_channels, recurrent, norm)
            for k in range(n)
        )

    def forward(self, x: Tensor, carry: Carry) -> Tensor:
        for k, block in enumerate(self):
            x = block(x, carry.scope(str(k)))
        return x


@torch.no_grad()
def set_forget_bias(model: nn.Module, bias: float) -> None:
    """The initial bias of the forget gates of every ConvLSTM in ``model``.

    Lower than the usual 1, layers remember less at the start, which shortens the memory of a deep stack.
    """
    for module in model.modules():
        if isinstance(module, ConvLSTM2d):
            module.get_parameter("bias_l0").chunk(4)[1].fill_(bias)


def check_positive(name: str, values: Sequence[int]) -> None:
    if not all(value >= 1 for value in values):
        raise ValueError(f"{name}: expected numbers of at least 1, got {list(values)}")
