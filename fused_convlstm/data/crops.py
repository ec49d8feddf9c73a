"""What ``prepare`` keeps of a frame: the mouth found with OpenCV's cascades, a fixed box, or the whole frame."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from .video import Frames

Boxes = npt.NDArray[np.float64]  # (T, 4): centre x, centre y, width, height in pixels


class NoFaceError(Exception):
    """No face in a clip."""


class Crop(Protocol):
    """Turns the frames of a clip, uint8 (T, H, W, C), into those kept, uint8 (T, H', W', C)."""

    def __call__(self, frames: Frames) -> Frames: ...


@dataclass(frozen=True)
class MouthCrop:
    """A square of ``size`` pixels around the mouth, at a scale at which the face is equally wide in every clip.

    The face is looked for in every ``every``-th frame, reduced to ``search_width`` pixels, with OpenCV's frontal-face
    cascade. The mouth's centre is at (``mouth_x``, ``mouth_y``) of the face's box and the side of the square is
    ``scale`` times the box's width, one for the whole clip. The track is cleaned by a running median, interpolated and
    smoothed.

    Raises (when called):
        NoFaceError: a face in fewer than ``min_found`` of the frames looked at.
    """

    size: int = 80
    scale: float = 0.6
    mouth_x: float = 0.5
    mouth_y: float = 0.8
    every: int = 5
    search_width: int = 320
    min_found: float = 0.3

    def __post_init__(self) -> None:
        for name in ("size", "scale", "every", "search_width"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        if not 0 < self.min_found <= 1:
            raise ValueError(f"min_found: expected more than 0 and at most 1, got {self.min_found}")

    def __call__(self, frames: Frames) -> Frames:
        return cut_boxes(frames, self.track(frames), (self.size, self.size))

    def track(self, frames: Frames) -> Boxes:
        """The square around the mouth in every frame of uint8 (T, H, W, C)."""
        looked_at = sorted({*range(0, len(frames), self.every), len(frames) - 1})
        found: dict[int, npt.NDArray[np.float64]] = {}
        last = None
        for index in looked_at:
            face = find_face(grey(frames[index]), self.search_width, near=last)
            if face is None and last is not None:
                face = find_face(grey(frames[index]), self.search_width)
            if face is not None:
                found[index] = last = face
        if len(found) < max(1.0, self.min_found * len(looked_at)):
            raise NoFaceError(f"a face in {len(found)} of {len(looked_at)} frames looked at")
        times = np.array(list(found))
        faces = _running_median(np.stack(list(found.values())), 5)  # (N, 4): x, y, width, height
        side = float(np.median(faces[:, 2]))
        centre = faces[:, :2] + faces[:, 2:] / 2  # steadier than a corner: the box's size jitters about its centre
        mouth = centre + side * np.array([self.mouth_x - 0.5, self.mouth_y - 0.5])
        every_frame = np.arange(len(frames))
        x, y = (_smooth(np.interp(every_frame, times, mouth[:, axis]), self.every) for axis in (0, 1))
        sides = np.full(len(frames), self.scale * side)
        return np.stack([x, y, sides, sides], axis=1)


@dataclass(frozen=True)
class BoxCrop:
    """A fixed box of the picture, in pixels from its top left corner, resized to ``size`` pixels square."""

    x: float
    y: float
    width: float
    height: float
    size: int = 80

    def __post_init__(self) -> None:
        if self.width <= 0 or self.height <= 0:
            raise ValueError(f"width, height: expected positive pixels, got {self.width} x {self.height}")
        if self.size <= 0:
            raise ValueError(f"size: expected more than 0, got {self.size}")

    def __call__(self, frames: Frames) -> Frames:
        box = [self.x + self.width / 2, self.y + self.height / 2, self.width, self.height]
        return cut_boxes(frames, np.tile(np.array(box, dtype=np.float64), (len(frames), 1)), (self.size, self.size))


@dataclass(frozen=True)
class WholeFrame:
    """The whole picture, resized to ``height`` x ``width``."""

    height: int = 128
    width: int = 171

    def __post_init__(self) -> None:
        if self.width <= 0 or self.height <= 0:
            raise ValueError(f"width, height: expected positive pixels, got {self.width} x {self.height}")

    def __call__(self, frames: Frames) -> Frames:
        height, width = frames.shape[1:3]
        box = np.tile(np.array([width / 2, height / 2, width, height], dtype=np.float64), (len(frames), 1))
        return cut_boxes(frames, box, (self.height, self.width))


def centre_square(frames: Frames, size: int) -> Frames:
    """The middle ``size`` x ``size`` of crops uint8 (T, H, W, C), enlarged where they are smaller."""
    height, width = frames.shape[1:3]
    scale = max(1.0, size / height, size / width)
    box = np.array([width / 2, height / 2, size / scale, size / scale])
    return cut_boxes(frames, np.tile(box, (len(frames), 1)), (size, size))


def grey(frame: Frames) -> Frames:
    """(H, W, C) to (H, W)."""
    return (
        frame[..., 0] if frame.shape[-1] == 1 else np.asarray(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    )


@lru_cache(maxsize=1)
def _face_cascade() -> Any:
    path = Path(cv2.__file__).parent / "data" / "haarcascade_frontalface_alt2.xml"
    cascade = cv2.CascadeClassifier(str(path))
    if cascade.empty():
        raise RuntimeError(f"OpenCV's face cascade cannot be read from {path}")
    return cascade


def find_face(
    frame: Frames, search_width: int, near: npt.NDArray[np.float64] | None = None
) -> npt.NDArray[np.float64] | None:
    """The largest face in a grey frame (H, W): x, y, width, height in pixels, or None.

    With ``near``, the face's last box, only its neighbourhood and similar sizes are searched, several times faster.
    """
    left = top = 0
    smallest, largest = 0.12, 1.0
    if near is not None:
        x, y, width, height = near
        margin = 0.3 * width
        left, top = max(0, int(x - margin)), max(0, int(y - margin))
        frame = frame[top : int(y + height + margin), left : int(x + width + margin)]
        smallest, largest = 0.85 * width, 1.2 * width
        reduce = min(1.0, 80 / width)
    else:
        reduce = min(1.0, search_width / frame.shape[1])
        smallest, largest = smallest * min(frame.shape), float(min(frame.shape))
    if min(frame.shape) * reduce < 24:
        return None
    small = cv2.resize(frame, None, fx=reduce, fy=reduce, interpolation=cv2.INTER_AREA) if reduce < 1 else frame
    sizes = [max(20, round(limit * reduce)) for limit in (smallest, largest)]
    faces = _face_cascade().detectMultiScale(small, 1.1, 3, minSize=(sizes[0],) * 2, maxSize=(sizes[1],) * 2)
    if len(faces) == 0:
        return None
    best = max(faces, key=lambda box: box[2] * box[3])
    x, y, width, height = (float(value) / reduce for value in best)
    return np.array([x + left, y + top, width, height])


def cut_boxes(frames: Frames, boxes: Boxes, size: tuple[int, int]) -> Frames:
    """Cut one box from every frame of uint8 (T, H, W, C), resized to ``size`` (H', W'); the border is repeated."""
    height, width = size
    cut = np.empty((len(frames), height, width, frames.shape[-1]), dtype=np.uint8)
    for index, (frame, (x, y, box_width, box_height)) in enumerate(zip(frames, boxes, strict=True)):
        reduce = int(min(box_width / width, box_height / height))
        if reduce >= 2:  # bilinear sampling alone would skip pixels
            shape = (max(1, frame.shape[1] // reduce), max(1, frame.shape[0] // reduce))
            frame = cv2.resize(np.ascontiguousarray(frame), shape, interpolation=cv2.INTER_AREA)
            frame = frame.reshape(shape[1], shape[0], -1)
            x, y, box_width, box_height = x / reduce, y / reduce, box_width / reduce, box_height / reduce
        step_x, step_y = box_width / width, box_height / height
        # pixel centre of the output -> pixel centre of the input
        matrix = np.array(
            [
                [step_x, 0, x - box_width / 2 + step_x / 2 - 0.5],
                [0, step_y, y - box_height / 2 + step_y / 2 - 0.5],
            ]
        )
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        piece = cv2.warpAffine(frame, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
        cut[index] = piece.reshape(height, width, -1)
    return cut


def _running_median(values: npt.NDArray[np.float64], length: int) -> npt.NDArray[np.float64]:
    """Median over a window of ``length`` along axis 0, the ends repeated."""
    padded = np.pad(values, ((length // 2, length // 2), (0, 0)), mode="edge")
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(padded, length, axis=0), axis=-1))


def _smooth(values: npt.NDArray[np.float64], sigma: float) -> npt.NDArray[np.float64]:
    """Gaussian smoothing of (T,), the ends repeated."""
    radius = int(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, radius, mode="edge"), kernel / kernel.sum(), mode="valid")
