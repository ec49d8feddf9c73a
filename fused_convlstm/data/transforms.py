"""Augmentation and test crops on tensors (Courtney & Sreenivas, section 4.1).

All of them take frames uint8 (T, B, C, H, W) and give float32 (T, B, C, size, size) with (x / 255 - MEAN) / STD. With
``flow`` the last two channels are optical flow: its vectors are turned, scaled and mirrored with the picture, and zero
motion becomes 0.
"""

from __future__ import annotations

import math

import torch
from kornia.geometry.transform import warp_affine
from torch import Tensor

from .dataset import Batch
from .flow import FLOW_LEVELS, FLOW_ZERO

MEAN = 0.45
STD = 0.22
FLOW_STD = 4 * FLOW_LEVELS  # 4 pixels


def normalise(frames: Tensor, lengths: Tensor | None = None, *, flow: bool = False) -> Tensor:
    """(T, B, ...) in 0 .. 255 to float32 of about zero mean and unit variance; zero after a clip's end."""
    scaled = (frames.float() / 255 - MEAN) / STD
    if flow:
        scaled[:, :, -2:] = (frames[:, :, -2:].float() - FLOW_ZERO) / FLOW_STD
    return scaled if lengths is None else _blank_padding(scaled, lengths)


class TrainTransform:
    """Random subsequence, crop, flip, rotation and brightness, drawn once per clip.

    Args:
        crop: smallest and largest side of the square crop, pixels of the cache.
        size: side that the crop is resized to.
        rotation: degrees, at most, to either side.
        brightness: relative change, at most, up or down.
        flip: probability of a mirror image.
        steps: frames of the random subsequence; None: the whole clip.
        shift: pixels that the crop may leave the middle ``crop[1]`` pixels, to either side.
        uniform: take one random frame from each of ``steps`` equal parts of the clip in place of consecutive frames:
            uniform sampling with temporal jitter (Zhang et al., section IV).
        flow: the last two channels are optical flow.

    A clip shorter than ``steps`` is taken whole: clip b comes out with min(lengths[b], steps) frames, and zeros after
    them. With ``uniform`` every clip comes out with ``steps`` frames, those of a shorter clip repeated.
    """

    def __init__(
        self,
        crop: tuple[int, int] = (48, 64),
        size: int = 48,
        rotation: float = 10.0,
        brightness: float = 0.1,
        flip: float = 0.5,
        steps: int | None = 24,
        shift: int = 4,
        uniform: bool = False,
        flow: bool = False,
    ) -> None:
        if not 0 < crop[0] <= crop[1]:
            raise ValueError(f"crop: expected 0 < smallest <= largest, got {crop}")
        if size < 1:
            raise ValueError(f"size: expected 1 or more, got {size}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps: expected 1 or more, or None, got {steps}")
        if not 0 <= flip <= 1:
            raise ValueError(f"flip: expected a probability, got {flip}")
        if uniform and steps is None:
            raise ValueError("steps: expected a number of frames with uniform=True, got None")
        self.crop = crop
        self.size = size
        self.rotation = rotation
        self.brightness = brightness
        self.flip = flip
        self.steps = steps
        self.shift = shift
        self.uniform = uniform
        self.flow = flow

    def __call__(self, batch: Batch, generator: torch.Generator | None = None) -> Tensor:
        """uint8 (T, B, C, H, W) to float32 (T', B, C, size, size), decided by the generator's state."""
        frames, lengths = batch.frames, batch.lengths
        count = frames.shape[1]
        # Drawn on the CPU: one generator serves data on any device.
        start, side, right, down, mirrored, angle, light = torch.rand(7, count, generator=generator).unbind()
        if self.uniform and self.steps is not None:
            jitter = torch.rand(self.steps, count, generator=generator)
            frames, lengths = _pick_uniform(frames, lengths, jitter), torch.full_like(lengths, self.steps)
        elif self.steps is not None:
            first = (start * (lengths.cpu() - self.steps + 1).clamp(min=1)).long()
            frames = _subsequences(frames, first.to(frames.device), min(self.steps, len(frames)))
            lengths = lengths.clamp(max=self.steps)
        smallest, largest = self.crop
        sides = smallest + side * (largest - smallest)  # (B,)
        reach = (largest - sides) / 2 + self.shift
        offsets = torch.stack([(2 * right - 1) * reach, (2 * down - 1) * reach], dim=1)  # (B, 2), x and y
        degrees = (2 * angle - 1) * self.rotation
        cropped = crop_squares(frames, sides, self.size, offsets, mirrored < self.flip, degrees, flow=self.flow)
        gain = (1 + (2 * light - 1) * self.brightness).to(cropped.device)
        picture = cropped[:, :, :-2] if self.flow else cropped
        picture.mul_(gain[None, :, None, None, None]).clamp_(0, 255)
        return normalise(cropped, lengths, flow=self.flow)


def center_crop(
    frames: Tensor, crop: int = 56, size: int = 48, lengths: Tensor | None = None, *, flow: bool = False
) -> Tensor:
    """The middle ``crop`` pixels of uint8 (T, B, C, H, W), resized to ``size`` and normalised: for validation."""
    sides = torch.full((frames.shape[1],), float(crop))
    return normalise(crop_squares(frames, sides, size, flow=flow), lengths, flow=flow)


def six_crops(
    frames: Tensor,
    crops: tuple[int, ...] = (48, 56, 64),
    size: int = 48,
    lengths: Tensor | None = None,
    *,
    flow: bool = False,
) -> list[Tensor]:
    """The middle 48, 56, 64 pixels and their mirror images, each (T, B, C, size, size); outputs are averaged."""
    views = [center_crop(frames, crop, size, lengths, flow=flow) for crop in crops]
    mirrored = [view.flip(-1) for view in views]
    if flow:
        for view in mirrored:
            view[:, :, -2].neg_()
    return [view for pair in zip(views, mirrored, strict=True) for view in pair]


def uniform_frames(batch: Batch, steps: int) -> Batch:
    """The middle frame of each of ``steps`` equal parts of every clip: the sampling of tests, without jitter."""
    if steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps}")
    middle = torch.full((steps, batch.frames.shape[1]), 0.5)
    frames = _pick_uniform(batch.frames, batch.lengths, middle)
    return Batch(frames, torch.full_like(batch.lengths, steps), batch.labels, batch.texts, batch.names)


def segment_frames(batch: Batch, steps: int, count: int) -> list[Batch]:
    """``count`` runs of ``steps`` consecutive frames of every clip, from its start to its end at even distances, as one
    batch each; one run is the middle of the clip. A clip shorter than ``steps`` is taken whole."""
    if steps < 1 or count < 1:
        raise ValueError(f"steps, count: expected 1 or more, got {steps} and {count}")
    places = torch.linspace(0, 1, count) if count > 1 else torch.tensor([0.5])
    room = (batch.lengths.cpu() - steps).clamp(min=0)  # (B,)
    lengths = batch.lengths.clamp(max=steps)
    segments = []
    for place in places:
        first = (place * room).round().long().to(batch.frames.device)
        frames = _subsequences(batch.frames, first, min(steps, len(batch.frames)))
        segments.append(Batch(frames, lengths, batch.labels, batch.texts, batch.names))
    return segments


def crop_squares(
    frames: Tensor,
    sides: Tensor,
    size: int,
    offsets: Tensor | None = None,
    mirrored: Tensor | None = None,
    degrees: Tensor | None = None,
    *,
    flow: bool = False,
) -> Tensor:
    """Cut one square per clip with one bilinear sampling.

    Args:
        frames: (T, B, C, H, W), uint8 or float.
        sides: (B,), pixels.
        size: side of the result.
        offsets: (B, 2), x and y of the square's centre from the frame's centre, pixels.
        mirrored: (B,) bool.
        degrees: (B,), counter-clockwise turn of the picture.
        flow: the last two channels are optical flow, whose vectors change with the picture.

    Returns:
        float32 (T, B, C, size, size) in the range of ``frames``. Outside the frame its border is repeated.
    """
    steps, count, channels, height, width = frames.shape
    radians = torch.zeros(count) if degrees is None else degrees * (math.pi / 180)
    scale = size / sides
    sign = torch.ones(count) if mirrored is None else 1 - 2 * mirrored.float()
    # input pixel -> output pixel: move the square's centre to 0, turn, scale, mirror, move to the output's centre
    cosine, sine = torch.cos(radians) * scale, torch.sin(radians) * scale
    linear = torch.stack(
        [torch.stack([sign * cosine, sign * sine], 1), torch.stack([-sine, cosine], 1)], 1
    )  # (B, 2, 2)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2]).expand(count, 2)
    if offsets is not None:
        centre = centre + offsets
    move = (size - 1) / 2 - (linear @ centre[:, :, None])
    matrix = torch.cat([linear, move], dim=2).to(frames.device)  # (B, 2, 3)
    planes = frames.transpose(0, 1).reshape(count, steps * channels, height, width).float()
    cut = warp_affine(planes, matrix, (size, size), padding_mode="border", align_corners=True)
    cut = cut.view(count, steps, channels, size, size)
    if flow:
        vectors = cut[:, :, -2:].flatten(3) - FLOW_ZERO  # (B, T, 2, size * size)
        cut[:, :, -2:] = ((linear.to(frames.device)[:, None] @ vectors) + FLOW_ZERO).view_as(cut[:, :, -2:])
    return cut.transpose(0, 1)


def _subsequences(frames: Tensor, first: Tensor, steps: int) -> Tensor:
    """Frames first[b] to first[b] + steps of clip b: (T, B, C, H, W) to (steps, B, C, H, W)."""
    index = first[None, :] + torch.arange(steps, device=frames.device)[:, None]  # (steps, B)
    index = index.clamp(max=len(frames) - 1)
    return frames[index, torch.arange(frames.shape[1], device=frames.device)[None, :]]


def _pick_uniform(frames: Tensor, lengths: Tensor, place: Tensor) -> Tensor:
    """(T, B, ...) to (steps, B, ...): ``place`` (steps, B), 0 to 1, chooses the frame within each part of a clip."""
    steps, count = place.shape
    part = torch.arange(steps)[:, None] + place
    index = (part * (lengths.cpu() / steps)).long().minimum(lengths.cpu() - 1).to(frames.device)  # (steps, B)
    return frames[index, torch.arange(count, device=frames.device)[None, :]]


def _blank_padding(frames: Tensor, lengths: Tensor) -> Tensor:
    inside = torch.arange(len(frames), device=frames.device)[:, None] < lengths.to(frames.device)[None, :]  # (T, B)
    return frames * inside[:, :, None, None, None]
