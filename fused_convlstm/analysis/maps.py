"""What a model looks at: feature maps and attention of its recurrent layers over a clip, as pictures and as video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from matplotlib import colormaps
from torch import Tensor, nn

from ..data.video import write_video
from ..modules import MotionAttentionConvLSTM2d
from ..modules._recurrent import RecurrentConv2d
from ..modules.attention import AttentionConv2d
from ..training.report import new_figure, save_figure

Pictures = npt.NDArray[np.uint8]  # (T, H, W, 3), RGB


@dataclass
class Recording:
    """What :func:`recording` saw, by the name of the layer in the model, in the order of the calls.

    Attributes:
        hidden: (T, B, C, h, w), a layer's output. Of a stack of layers, the last one's.
        attention: (T, B, K, h, w), K = 1 for attention on the input, K = C for a gate. Of a stack, the first layer's.
    """

    hidden: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def recording(model: nn.Module) -> Iterator[Recording]:
    """Within the block, keeps what the recurrent layers in ``model`` compute; the model itself behaves as always.

    Works for any model with layers of this package in it. Attention maps are asked of the layers that have them.
    """
    record = Recording()
    handles: list[Any] = []

    def watch(name: str, layer: nn.Module) -> None:
        attends = isinstance(layer, (AttentionConv2d, MotionAttentionConvLSTM2d))

        def before(_: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
            return inputs, {**arguments, "return_attention": True}

        def after(_: nn.Module, inputs: tuple[Any, ...], results: tuple[Any, ...]) -> Any:
            output, state, *maps = results
            time_major = output.transpose(0, 1) if getattr(layer, "batch_first", False) else output
            if output.dim() == 5:
                record.hidden[name] = time_major.detach()
            if not maps:
                return None
            attention = maps[0] if isinstance(maps[0], Tensor) else maps[0][0]
            batch_first = getattr(layer, "batch_first", False)
            record.attention[name] = (attention.transpose(0, 1) if batch_first else attention).detach()
            return output, state

        if attends:
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after))

    try:
        for name, layer in model.named_modules():
            if isinstance(layer, (RecurrentConv2d, MotionAttentionConvLSTM2d)):
                watch(name, layer)
        yield record
    finally:
        for handle in handles:
            handle.remove()


def fusion_maps(hidden: Tensor) -> Tensor:  # (T, B, C, h, w) -> (T, B, h, w)
    """At every step the feature map of the channel with the largest sum of activations (Zhang et al., fig. 3)."""
    channel = hidden.sum(dim=(3, 4)).argmax(dim=2)  # (T, B)
    index = channel[:, :, None, None, None].expand(-1, -1, 1, *hidden.shape[3:])
    return hidden.gather(2, index).squeeze(2)


def attention_maps(attention: Tensor) -> Tensor:  # (T, B, K, h, w) -> (T, B, h, w)
    """Attention as one map a step; the gates of a layer are averaged over their channels."""
    return attention.mean(dim=2)


def resize_maps(maps: Tensor, steps: int, size: tuple[int, int]) -> Tensor:  # (T', h, w) -> (steps, H, W)
    """Maps for every frame: a network that halves the frames has one map for two of them."""
    index = (torch.arange(steps) * len(maps)) // steps
    scaled = torch.nn.functional.interpolate(maps[index][:, None].float(), size, mode="bilinear", align_corners=False)
    return scaled[:, 0]


def overlay(frames: Pictures, maps: Tensor, strength: float = 0.55) -> Pictures:
    """Heat maps over the frames, each map from its least value (blue) to its largest (red).

    Args:
        frames: (T, H, W, 3).
        maps: (T', h, w).
        strength: of the colours, 0 to 1.
    """
    scaled = resize_maps(maps.cpu(), len(frames), frames.shape[1:3]).numpy()
    low = scaled.min(axis=(1, 2), keepdims=True)
    span = np.maximum(scaled.max(axis=(1, 2), keepdims=True) - low, 1e-12)
    colours = colormaps["jet"]((scaled - low) / span)[..., :3] * 255.0
    mixed: Pictures = np.clip((1.0 - strength) * frames + strength * colours, 0, 255).astype(np.uint8)
    return mixed


def as_pictures(frames: Tensor) -> Pictures:  # uint8 (T, C, H, W) -> (T, H, W, 3)
    """Frames of a cache as RGB pictures: grey in all three channels, flow after the picture left out."""
    picture = frames[:, :3] if frames.size(1) >= 3 else frames[:, :1].expand(-1, 3, -1, -1)
    pictures: Pictures = picture.permute(0, 2, 3, 1).numpy()
    return pictures


def draw_boxes(pictures: Pictures, boxes: npt.NDArray[np.float64], colour: tuple[int, int, int]) -> Pictures:
    """A box (x, y, width, height) in pixels on each picture."""
    drawn = pictures.copy()
    for picture, (x, y, width, height) in zip(drawn, boxes, strict=True):
        first, second = (round(float(x)), round(float(y))), (round(float(x + width)) - 1, round(float(y + height)) - 1)
        cv2.rectangle(picture, first, second, colour, 1)
    return drawn


def save_grid(path: Path, rows: Sequence[tuple[str, Pictures]], columns: int = 8) -> None:
    """A picture with a row for each of ``rows``, and in it ``columns`` frames spread over the clip."""
    figure = new_figure(1.3 * columns + 1.0, 1.45 * len(rows) + 0.2)
    for axes, (title, pictures) in zip(figure.subplots(len(rows), squeeze=False).flat, rows, strict=True):
        chosen = np.linspace(0, len(pictures) - 1, columns).round().astype(int)
        framed = np.pad(pictures[chosen], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(framed, axis=1))
        middles = (np.arange(columns) + 0.5) * framed.shape[2]
        axes.set_xticks(middles, [f"frame {index + 1}" for index in chosen], fontsize=6)
        axes.set_yticks([])
        axes.set_ylabel(title, fontsize=7)
    save_figure(path, figure)


def save_video(path: Path, rows: Sequence[tuple[str, Pictures]], fps: int = 12, height: int = 192) -> None:
    """The rows side by side as a video, enlarged to ``height`` pixels."""
    beside = np.concatenate([pictures for _, pictures in rows], axis=2)
    factor = max(1, round(height / beside.shape[1]))
    large = beside.repeat(factor, axis=1).repeat(factor, axis=2)
    # Video codecs want even sides.
    write_video(path, large[:, : large.shape[1] // 2 * 2, : large.shape[2] // 2 * 2], fps)
