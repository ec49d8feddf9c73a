"""Procedural gestures: a hand whose class is how it moves, not how it looks.

Every gesture has its reverse: a clip of one class played backwards is a clip of the other, so no single frame, and no
set of frames without their order, tells the two apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ..files import complete_file
from ..video import Frames, write_video
from .sets import PlannedClip, check_count, make_set

Colour = npt.NDArray[np.float64]  # RGB, 0 to 255

SIZE = 128  # pixels of a frame, square
NUM_FRAMES = 32
FPS = 25
_SCALE = 2  # drawn larger, then reduced

# What a gesture changes, and how far to either side: x and y in frame widths, angle in degrees, size as a factor.
GESTURES: dict[str, tuple[str, float]] = {
    "swipe_left": ("x", -0.24),
    "swipe_right": ("x", 0.24),
    "swipe_up": ("y", -0.20),
    "swipe_down": ("y", 0.20),
    "rotate_clockwise": ("angle", 55.0),
    "rotate_counterclockwise": ("angle", -55.0),
    "zoom_in": ("spread", 0.45),
    "zoom_out": ("spread", -0.45),
    "push": ("size", 0.40),
    "pull": ("size", -0.40),
}


@dataclass(frozen=True)
class _Batch:
    seed: int
    clips: list[PlannedClip]


def generate_gestures(
    out_dir: str | Path,
    clips_per_class: int = 60,
    seed: int = 0,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render hands doing the ten :data:`GESTURES`: ``CLASS/{train,val,test}/CLASS_00001.mp4`` for ``WordFolders``.

    Clips have 32 frames of 128 x 128 at 25 fps. The hand's shape, colour, place, turn, the background and the time at
    which the gesture starts and ends are random. Parts, repetition and continuation are those of :func:`generate`.

    Raises:
        ValueError: fewer than 6 clips per class, or a folder with other files or another set.
        PrepareError: no space left or no right to write in ``out_dir``.
    """
    check_count("clips_per_class", clips_per_class, 6)

    def batches(missing: list[PlannedClip]) -> list[_Batch]:
        return [_Batch(seed, missing[start : start + 10]) for start in range(0, len(missing), 10)]

    arguments: dict[str, object] = {"set": "gestures", "clips_per_class": clips_per_class, "seed": seed}
    return make_set(out_dir, arguments, list(GESTURES), clips_per_class, batches, _render_batch, workers, progress)


def _render_batch(job: _Batch) -> int:
    for clip in job.clips:
        rng = np.random.default_rng([job.seed, zlib.crc32(clip.label.encode()), clip.number])
        with complete_file(clip.video) as unfinished:
            write_video(unfinished, gesture_frames(clip.label, rng), FPS)
    return len(job.clips)


def gesture_path(label: str, rng: np.random.Generator) -> dict[str, npt.NDArray[np.float64]]:
    """The hand over time, each (T,): x, y (frame widths), angle (degrees), size (factor), spread of fingers (0, 1)."""
    changed, amount = GESTURES[label]
    start, end = sorted(rng.uniform(-0.5, NUM_FRAMES - 0.5, 2))
    middle, half = (start + end) / 2, max((end - start) / 2, NUM_FRAMES / 6)
    middle = float(np.clip(middle, half, NUM_FRAMES - 1 - half))
    progress = np.clip((np.arange(NUM_FRAMES) - middle) / half, -1, 1)
    progress = np.sin(progress * np.pi / 2)  # -1 to 1, as slow at the end as at the start
    drift = np.linspace(-1, 1, NUM_FRAMES)
    path = {
        "x": rng.uniform(0.42, 0.58) + rng.uniform(-0.03, 0.03) * drift,
        "y": rng.uniform(0.48, 0.60) + rng.uniform(-0.03, 0.03) * drift,
        "angle": rng.uniform(-20, 20) + rng.uniform(-5, 5) * drift,
        "size": rng.uniform(0.85, 1.1) * (1 + rng.uniform(-0.04, 0.04) * drift),
        "spread": rng.uniform(0.45, 0.55) + rng.uniform(-0.05, 0.05) * drift,
    }
    move = amount * progress * rng.uniform(0.8, 1.1)
    path[changed] = path[changed] * (1 + move) if changed == "size" else path[changed] + move
    return path


def gesture_frames(label: str, rng: np.random.Generator) -> Iterator[Frames]:
    """The frames of a clip, uint8 (128, 128, 3) RGB."""
    path = gesture_path(label, rng)
    background = _scene(rng)
    tone = rng.uniform(0, 1)
    skin = (1 - tone) * np.array([236, 196, 170]) + tone * np.array([120, 82, 62])
    fingers = rng.integers(2, 6)  # thumb and index finger always, then up to three more
    sleeve = rng.uniform(30, 200, 3)
    light = rng.uniform(0.85, 1.1)
    noise = rng.normal(0, rng.uniform(1, 4), (SIZE + 16, SIZE + 16, 3)).astype(np.float32)
    for t in range(NUM_FRAMES):
        canvas = background.copy()
        pose = {key: float(values[t]) for key, values in path.items()}
        _draw_hand(canvas, pose, skin, sleeve, int(fingers))
        canvas = cv2.GaussianBlur(canvas, (3, 3), 0)
        small = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        top, left = rng.integers(0, 16, 2)
        noisy = small.astype(np.float32) * light + noise[top : top + SIZE, left : left + SIZE]
        yield np.clip(noisy, 0, 255).astype(np.uint8)


def _scene(rng: np.random.Generator) -> Frames:
    """A blurred room with a person's body behind the hand, uint8 (256, 256, 3)."""
    side = SIZE * _SCALE
    coarse = rng.uniform(70, 180) + rng.normal(0, 12, 3) + rng.normal(0, 25, (6, 6, 1)) + rng.normal(0, 6, (6, 6, 3))
    scene = cv2.resize(coarse.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    body = np.zeros((side, side), dtype=np.float32)
    x = int(side * rng.uniform(0.35, 0.65))
    cv2.ellipse(body, (x, int(1.1 * side)), (int(0.34 * side), int(0.55 * side)), 0, 0, 360, 1.0, -1, cv2.LINE_AA)
    cv2.ellipse(body, (x, int(0.36 * side)), (int(0.10 * side), int(0.14 * side)), 0, 0, 360, 1.0, -1, cv2.LINE_AA)
    body = np.asarray(cv2.GaussianBlur(body, (0, 0), 5), dtype=np.float32)
    alpha = body[..., None]
    clothed = scene * (1 - alpha) + alpha * (rng.uniform(40, 160) + rng.uniform(-25, 25, 3))
    return np.asarray(np.clip(clothed, 0, 255), dtype=np.uint8)


def _draw_hand(canvas: Frames, pose: dict[str, float], skin: Colour, sleeve: Colour, fingers: int) -> None:
    """Forearm, palm and fingers as thick rounded strokes: a dark rim below, the skin, and a lighter core."""
    side = SIZE * _SCALE
    unit = 0.085 * side * pose["size"]
    turn = np.deg2rad(pose["angle"])
    across = np.array([np.cos(turn), np.sin(turn)])
    up = np.array([np.sin(turn), -np.cos(turn)])
    palm = np.array([pose["x"], pose["y"]]) * side

    def at(right: float, above: float) -> npt.NDArray[np.float64]:
        return np.asarray(palm + unit * (right * across + above * up))

    def direction(degrees: float) -> tuple[float, float]:
        return float(np.sin(np.deg2rad(degrees))), float(np.cos(np.deg2rad(degrees)))

    spread = float(np.clip(pose["spread"], 0, 1))
    strokes = []  # start, end, thickness
    thumb_x, thumb_y = direction(-15 - 75 * spread)
    strokes.append((at(-0.6, 0.1), at(-0.6 + 2.0 * thumb_x, 0.1 + 2.0 * thumb_y), 0.62))
    finger_x, finger_y = direction(-8 + 30 * spread)
    strokes.append((at(-0.55, 0.9), at(-0.55 + 2.5 * finger_x, 0.9 + 2.5 * finger_y), 0.56))
    for number in range(fingers - 2):
        base = -0.1 + 0.42 * number
        other_x, other_y = direction(6 + 30 * spread + 9 * number)
        length = 2.5 - 0.25 * number
        strokes.append((at(base, 0.9), at(base + length * other_x, 0.9 + length * other_y), 0.52))
    arm = (at(0, -0.6), at(0.2, -9), 1.35)

    def stroke(start: npt.NDArray[np.float64], end: npt.NDArray[np.float64], thickness: float, colour: Colour) -> None:
        points = [tuple(round(16 * float(value)) for value in point) for point in (start, end)]
        cv2.line(canvas, points[0], points[1], colour.tolist(), max(1, round(thickness * unit)), cv2.LINE_AA, 4)

    def disc(centre: npt.NDArray[np.float64], radius: float, colour: Colour) -> None:
        place = tuple(round(16 * float(value)) for value in centre)
        cv2.circle(canvas, place, round(16 * radius * unit), colour.tolist(), -1, cv2.LINE_AA, 4)

    rim: Colour = skin * 0.62
    core: Colour = np.minimum(skin * 1.12, 255)
    stroke(arm[0], arm[1], arm[2] + 0.2, sleeve * 0.6)
    stroke(arm[0], arm[1], arm[2], sleeve)
    for extra, colour in ((0.2, rim), (0.0, skin), (-0.3, core)):
        disc(at(0, 0), 1.05 + extra / 2, colour)
        for start, end, thickness in strokes:
            stroke(start, end, max(thickness + extra, 0.1), colour)
