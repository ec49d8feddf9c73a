"""Optical flow by OpenCV, kept as two uint8 channels."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from .crops import grey
from .video import Frames

FLOW_METHODS = ("dis", "farneback")
DIS_SIDE = 16  # pixels: OpenCV's search crashes on less
FLOW_ZERO = 128  # the stored value of no motion
FLOW_LEVELS = 6  # stored levels per pixel of motion: up to 21 pixels between two frames to either side


def check_flow(method: str | None) -> None:
    if method is not None and method not in FLOW_METHODS:
        raise ValueError(f"flow: expected None or one of {', '.join(FLOW_METHODS)}, got {method!r}")


def optical_flow(frames: Frames, method: str = "dis") -> Frames:
    """Motion from each frame's predecessor to it, in pixels: uint8 (T, H, W, C) to uint8 (T, H, W, 2).

    Channel 0 is x (right), channel 1 is y (down), stored as 128 + 6 per pixel; the first frame has no predecessor and
    no motion. ``"dis"`` is dense inverse search (Kroeger et al., 2016), ``"farneback"`` polynomial expansion
    (Farneback, 2003).

    Raises:
        ValueError: an unknown method, or frames of less than 16 pixels for ``"dis"``.
    """
    check_flow(method)
    if method == "dis" and min(frames.shape[1:3]) < DIS_SIDE:
        height, width = frames.shape[1:3]
        raise ValueError(f"flow: expected frames of at least {DIS_SIDE} x {DIS_SIDE} for 'dis', got {height} x {width}")
    stored = np.full((*frames.shape[:3], 2), FLOW_ZERO, dtype=np.uint8)
    search: Any = None
    if method == "dis":
        search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        search.setFinestScale(
            1
        )  # the preset's quarter of the resolution misses arms and hands in pictures of 128 pixels
    before = grey(frames[0])
    for index in range(1, len(frames)):
        after = grey(frames[index])
        if search is not None:
            moved = search.calc(before, after, None)
        else:
            moved = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)  # type: ignore[call-overload]
        stored[index] = np.clip(np.round(FLOW_ZERO + FLOW_LEVELS * moved), 0, 255)
        before = after
    return stored
