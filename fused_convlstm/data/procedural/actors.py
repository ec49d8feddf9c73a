"""Procedural actors before a moving background, with the actor's box in every frame.

A clip shows one acting figure among others who stand still; the camera moves. Which figure acts and what it does is
seen only in motion: the others look alike, and every action has its reverse, which is the same clip played backwards.
Who acts also sways from side to side, in every action alike, so that legs and trunk move where only the arms act.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from ..files import complete_file, write_text
from ..video import Frames, write_video
from .sets import PlannedClip, check_count, make_set

SIZE = 128  # pixels of a frame, square
NUM_FRAMES = 30
FPS = 25
_SCALE = 2  # drawn larger, then reduced
_BODY = 0.6  # height of a standing figure in frame heights

# Neighbours are each other's reverse.
ACTIONS = (
    "walk_left",
    "walk_right",
    "sit_down",
    "stand_up",
    "raise_arms",
    "lower_arms",
    "lean_left",
    "lean_right",
)


@dataclass(frozen=True)
class _Pose:
    """x (frame widths), knees bent 0 to 1, arms raised 0 to 1, lean -1 to 1, stride in radians of the gait."""

    x: float = 0.5
    bent: float = 0.0
    raised: float = 0.0
    lean: float = 0.0
    stride: float = 0.0


@dataclass(frozen=True)
class _Batch:
    seed: int
    camera: float
    clips: list[PlannedClip]


def generate_actors(
    out_dir: str | Path,
    clips_per_class: int = 60,
    seed: int = 0,
    *,
    camera: float = 1.0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render the eight :data:`ACTIONS`: ``CLASS/{train,val,test}/CLASS_00001.mp4`` + ``.boxes`` for ``WordFolders``.

    Clips have 30 frames of 128 x 128 at 25 fps; a line of the ``.boxes`` file is the actor's ``X Y WIDTH HEIGHT`` in
    a frame, pixels from the top left. ``camera`` is a factor of the camera's motion, 0 for a camera that stands still.
    Parts, repetition and continuation are those of :func:`generate`.

    Raises:
        ValueError: fewer than 6 clips per class, a negative ``camera``, or a folder with other files or another set.
        PrepareError: no space left or no right to write in ``out_dir``.
    """
    check_count("clips_per_class", clips_per_class, 6)
    if camera < 0.0:
        raise ValueError(f"camera: expected a factor of at least 0, got {camera}")

    def batches(missing: list[PlannedClip]) -> list[_Batch]:
        return [_Batch(seed, camera, missing[start : start + 10]) for start in range(0, len(missing), 10)]

    arguments: dict[str, object] = {
        "set": "actors", "clips_per_class": clips_per_class, "seed": seed, "camera": camera,
    }  # fmt: skip
    return make_set(out_dir, arguments, list(ACTIONS), clips_per_class, batches, _render_batch, workers, progress)


def _render_batch(job: _Batch) -> int:
    for clip in job.clips:
        rng = np.random.default_rng([job.seed, zlib.crc32(clip.label.encode()), clip.number])
        frames, boxes = actor_frames(clip.label, rng, job.camera)
        lines = [" ".join(f"{value:.1f}" for value in box) for box in boxes]
        write_text(clip.video.with_suffix(".boxes"), "\n".join(lines) + "\n")
        with complete_file(clip.video) as unfinished:
            write_video(unfinished, frames, FPS)
    return len(job.clips)


def action_poses(label: str, rng: np.random.Generator) -> list[_Pose]:
    """The acting figure over time, in its place in the scene."""
    duration = rng.uniform(0.7, 0.95) * NUM_FRAMES
    middle = rng.uniform(duration / 2, NUM_FRAMES - 1 - duration / 2)
    progress = np.clip((np.arange(NUM_FRAMES) - middle) / duration + 0.5, 0, 1)
    progress = 0.5 - 0.5 * np.cos(np.pi * progress)  # 0 to 1, as slow at the end as at the start
    if label in ("walk_left", "stand_up", "lower_arms", "lean_left"):
        progress = 1 - progress
    # What the action leaves alone is any of what other actions do: a still pose says nothing.
    bent, raised, lean = rng.uniform(0, 0.35), rng.uniform(0, 1), rng.uniform(-0.4, 0.4)
    place = rng.uniform(0.32, 0.68)
    sway = np.sin(2 * np.pi * (np.arange(NUM_FRAMES) / rng.uniform(8, 16) + rng.uniform(0, 1)))
    places = place + rng.uniform(0.02, 0.035) * sway
    poses = []
    for place, value in zip(places, progress, strict=True):
        if label.startswith("walk"):
            poses.append(_Pose(place + 0.36 * (value - 0.5), bent, raised, lean, 9.0 * value))
        elif label in ("sit_down", "stand_up"):
            poses.append(_Pose(place, value, raised, lean))
        elif label.endswith("arms"):
            poses.append(_Pose(place, bent, value, lean))
        else:
            poses.append(_Pose(place, bent, raised, 2 * value - 1))
    return poses


def actor_frames(
    label: str, rng: np.random.Generator, camera: float = 1.0
) -> tuple[list[Frames], npt.NDArray[np.float64]]:
    """The frames of a clip, uint8 (128, 128, 3) RGB, and the actor's boxes (T, 4): x, y, width, height in pixels."""
    poses = action_poses(label, rng)
    side = SIZE * _SCALE
    margin = side // 4
    scene = _scene(rng, side + 2 * margin)
    size = rng.uniform(0.85, 1.1)
    ground = rng.uniform(0.85, 0.95)
    clothes = [_Clothes.draw(rng) for _ in range(3)]
    # one or two bystanders, who stand where the actor does not go
    places = [x for x in rng.permutation(np.linspace(0.0, 1.0, 9)) if all(abs(x - pose.x) > 0.28 for pose in poses)]
    bystanders = [
        (
            _Pose(float(x), rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(-1, 1), rng.uniform(0, 6)),
            rng.uniform(-0.03, 0.03),
        )
        for x in places[:2]
    ]
    for (pose, higher), worn in zip(bystanders, clothes[1:], strict=False):
        _draw_figure(scene, pose, size, ground + higher, worn, margin, side)
    speed = rng.uniform(-1, 1, 2) * np.array([1.6, 0.6]) * _SCALE  # of the camera, per frame
    sway = rng.uniform(0, 2 * np.pi)
    noise = rng.normal(0, rng.uniform(0.5, 2.5), (SIZE + 16, SIZE + 16, 3)).astype(np.float32)
    frames, boxes = [], []
    for t, pose in enumerate(poses):
        canvas = scene.copy()
        points = _draw_figure(canvas, pose, size, ground, clothes[0], margin, side)
        shift = speed * (t - NUM_FRAMES / 2) + 1.5 * _SCALE * np.sin(0.5 * t + sway + np.array([0, 1]))
        shift = np.clip(camera * shift, -margin, margin)
        matrix = np.array([[1, 0, shift[0] - margin], [0, 1, shift[1] - margin]])
        seen = cv2.warpAffine(canvas, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        small = cv2.resize(seen, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32)
        top, left = rng.integers(0, 16, 2)
        frames.append(np.clip(small + noise[top : top + SIZE, left : left + SIZE], 0, 255).astype(np.uint8))
        corners = np.clip((points + shift - margin) / _SCALE, 0, SIZE)  # (2, 2): top left, bottom right
        boxes.append(np.concatenate([corners[0], corners[1] - corners[0]]))
    return frames, np.stack(boxes)


@dataclass(frozen=True)
class _Clothes:
    """Colours of a figure."""

    skin: list[float]
    shirt: list[float]
    trousers: list[float]

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Clothes:
        tone = rng.uniform(0, 1)
        skin = (1 - tone) * np.array([230, 190, 165]) + tone * np.array([115, 80, 60])
        return cls(skin.tolist(), rng.uniform(30, 230, 3).tolist(), rng.uniform(20, 140, 3).tolist())


def _scene(rng: np.random.Generator, side: int) -> Frames:
    """A wall with patches and a floor, uint8 (side, side, 3), textured so that camera motion is seen."""
    scene = np.empty((side, side, 3), dtype=np.float32)
    scene[:] = rng.uniform(100, 190) + rng.uniform(-25, 25, 3)
    for _ in range(14):
        x, y = rng.integers(0, side, 2)
        width, height = rng.integers(side // 14, side // 4, 2)
        shade = (scene[0, 0] + rng.uniform(-45, 45) + rng.uniform(-20, 20, 3)).tolist()
        cv2.rectangle(scene, (int(x), int(y)), (int(x + width), int(y + height)), shade, -1)
    floor = int(0.68 * side)
    scene[floor:] = rng.uniform(60, 150) + rng.uniform(-20, 20, 3)
    for x in range(-side, 2 * side, side // 9):
        cv2.line(scene, (x, floor), (x + (x - side // 2) // 2, side), (scene[-1, 0] * 0.8).tolist(), 2, cv2.LINE_AA)
    grain = cv2.GaussianBlur(rng.normal(0, 70, (side, side, 1)).astype(np.float32), (0, 0), 2)
    blurred = np.asarray(cv2.GaussianBlur(scene, (0, 0), 1.2), dtype=np.float32)
    return np.asarray(np.clip(blurred + grain[..., None], 0, 255), dtype=np.uint8)


def _draw_figure(
    canvas: Frames, pose: _Pose, size: float, ground: float, clothes: _Clothes, margin: int, side: int
) -> npt.NDArray[np.float64]:
    """Draw a figure of strokes; returns the corners of its box, (2, 2), in pixels of the canvas."""
    unit = _BODY * size * side
    feet = np.array([margin + pose.x * side, margin + ground * side])
    hip_height = unit * (0.50 - 0.24 * pose.bent)
    tilt = 0.55 * pose.lean
    hip = feet + np.array([0.0, -hip_height])
    spine = np.array([np.sin(tilt), -np.cos(tilt)])
    neck = hip + unit * 0.32 * spine
    head = neck + unit * 0.12 * spine
    step = 0.12 * np.sin(pose.stride)
    thick = unit * 0.09
    strokes: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float, list[float]]] = []
    for sign in (-1, 1):
        foot = feet + unit * np.array([sign * (0.07 + step), 0.0])
        knee = (hip + foot) / 2 + unit * np.array([sign * (0.03 + 0.16 * pose.bent), 0.0])
        strokes += [(hip, knee, thick, clothes.trousers), (knee, foot, thick * 0.9, clothes.trousers)]
    strokes.append((hip, neck, thick * 1.7, clothes.shirt))
    for sign in (-1, 1):
        angle = sign * (0.25 + 2.45 * pose.raised) + tilt
        shoulder = neck + unit * 0.07 * sign * np.array([np.cos(tilt), np.sin(tilt)])
        elbow = shoulder + unit * 0.16 * np.array([np.sin(angle), np.cos(angle)])
        hand = elbow + unit * 0.15 * np.array([np.sin(angle * 1.1), np.cos(angle * 1.1)])
        strokes += [(shoulder, elbow, thick * 0.75, clothes.shirt), (elbow, hand, thick * 0.6, clothes.skin)]
    for start, end, thickness, colour in strokes:
        points = [tuple(round(16 * float(value)) for value in point) for point in (start, end)]
        cv2.line(canvas, points[0], points[1], colour, max(1, round(thickness)), cv2.LINE_AA, 4)
    radius = 0.075 * unit
    cv2.circle(canvas, tuple(round(16 * float(v)) for v in head), round(16 * radius), clothes.skin, -1, cv2.LINE_AA, 4)
    reach = np.array(
        [[*(point - thickness / 2), *(point + thickness / 2)] for a, b, thickness, _ in strokes for point in (a, b)]
    )
    reach = np.concatenate([reach, [[*(head - radius), *(head + radius)]]])
    return np.stack([reach[:, :2].min(axis=0), reach[:, 2:].max(axis=0)])
