"""What the models that read a whole clip share: one output a clip, frames seen alone, TensorFlow's padding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streaming import Carry, StreamingModel


class ClipModel(StreamingModel):
    """A model with one output a clip, given at every frame so that it trains and reads like the others.

    A clip has to be given whole. In evaluation clips of one length run together, without padding, so that an output
    does not depend on the other clips of the batch. In training they run padded with zeros, which convolutions and
    normalisation over time see.
    """

    streams = False

    def _run(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        if carry.before is not None:
            raise ValueError("state: expected None: this model needs the whole clip at once")
        if carry.valid is not None:
            # What stands in the padding must not be seen.
            frames = frames.masked_fill(~carry.valid[:, :, None, None, None], 0)
        if carry.lengths is None or self.training:
            output = self._clip(frames, carry, resets)
        else:
            lengths = carry.lengths.clamp_min(1)  # a clip without a valid step counts as one of a zero frame
            groups = [(length, torch.nonzero(lengths == length).flatten()) for length in lengths.unique().tolist()]
            parts = []
            for length, clips in groups:
                cut = {name: schedule[:length, clips] for name, schedule in resets.items()}
                parts.append(self._clip(frames[:length, clips], Carry(None, None, None), cut))
            output = torch.cat(parts)[torch.cat([clips for _, clips in groups]).argsort()]
        return output.expand(frames.size(0), -1, -1)

    @abstractmethod
    def _clip(self, frames: Tensor, carry: Carry, resets: Mapping[str, Tensor]) -> Tensor:
        """The output (B, num_classes) for frames (T, B, C, H, W)."""


def per_frame(module: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    """``module`` on every valid frame of (T, B, ...), zeros for the others: padding is neither computed nor counted
    among the statistics of a normalisation."""
    frames = x.flatten(0, 1)
    if valid is None:
        return module(frames).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]
    index = valid.flatten().nonzero().flatten()
    y = module(frames[index])
    return y.new_zeros((frames.size(0), *y.shape[1:])).index_copy(0, index, y).unflatten(0, x.shape[:2])


def mean_over_steps(x: Tensor, valid: Tensor | None) -> Tensor:
    """(T, B, ...) -> (B, ...), over the valid steps."""
    if valid is None:
        return x.mean(dim=0)
    weights = valid.to(x.dtype).reshape(*valid.shape, *(1,) * (x.dim() - 2))
    return (x * weights).sum(dim=0) / weights.sum(dim=0).clamp_min(1)


def strided_steps(flags: Tensor | None, stride: int) -> Tensor | None:
    """(T, B) -> (ceil(T / stride), B): whether any of the steps that make one is set."""
    if flags is None or stride == 1:
        return flags
    padded = F.pad(flags, (0, 0, 0, -flags.size(0) % stride))
    grouped: Tensor = padded.unflatten(0, (-1, stride)).any(dim=1)
    return grouped


def pad_same(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around the last dimensions of ``x``, as TensorFlow's "same" has them: the output has ceil(size / stride)
    steps, and where the padding does not split evenly the end gets more."""
    padding: list[int] = []
    for size, kernel, step in zip(x.shape[-len(kernel_size) :], kernel_size, stride, strict=True):
        total = max((-(-size // step) - 1) * step + kernel - size, 0)
        padding = [total // 2, total - total // 2, *padding]
    return F.pad(x, padding) if any(padding) else x


class SameConv3d(nn.Conv3d):
    """A 3D convolution with TensorFlow's "same" padding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad_same(input, self.kernel_size, self.stride))


class SameConv2d(nn.Conv2d):
    """A 2D convolution with TensorFlow's "same" padding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pad_same(input, self.kernel_size, self.stride))


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, to a multiple of 4."""
    return max(4, round(channels * width / 4) * 4)


def initialize_convolutions(module: nn.Module) -> None:
    """He-normal weights for every convolution and linear layer in ``module``, zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def to_volume(frames: Tensor) -> Tensor:
    """(T, B, C, H, W) -> (B, C, T, H, W)."""
    return frames.permute(1, 2, 0, 3, 4)


def to_frames(volume: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (T, B, C, H, W)."""
    return volume.permute(2, 0, 1, 3, 4)


def lengths_of(valid: Tensor | None) -> Tensor | None:
    """(T, B) boolean -> (B,) on the CPU."""
    return None if valid is None else valid.sum(dim=0).cpu()


class MaxPool3dSame(nn.Module):
    """3D max pooling whose stride is its size, the last window smaller where the size does not divide."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.max_pool3d(x, self.size, ceil_mode=True)
