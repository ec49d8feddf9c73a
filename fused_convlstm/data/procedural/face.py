"""Drawing a speaking face: a shaded relief for the head, lips as curves over it."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from ..video import Frames
from .speech import APERTURE, JAW, PRESS, ROUND, TEETH, TONGUE, TUCK, WIDTH

Array = npt.NDArray[np.float32]

FRAME = 256  # pixels of a frame, square
_CANVAS = 384  # the face is drawn larger, then moved, turned and reduced in one step
_UNIT = 92.0  # canvas pixels of the face's half width, the unit of length of everything below
_CENTRE = (192.0, 196.0)  # canvas position of the point between the cheeks
_MOUTH_Y = 0.64
_CHIN_Y = 1.2


@dataclass(frozen=True)
class Speaker:
    """How a person looks. Colours are RGB 0 to 1, lengths in half widths of the face."""

    skin: Array
    lips: Array
    hair: Array
    eyes: Array
    clothes: Array
    jaw: float  # roundness of the lower face
    long_hair: float
    brow: float
    eye_distance: float
    nose_width: float
    nose_length: float
    upper_lip: float
    lower_lip: float
    mouth_width: float
    bow: float
    beard: float
    teeth: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Speaker:
        """A random speaker."""
        darkness = rng.uniform(0, 1) ** 1.3
        skin = (1 - darkness) * np.array([0.93, 0.76, 0.66]) + darkness * np.array([0.56, 0.38, 0.29])
        skin = skin * rng.uniform(0.98, 1.02, 3)
        redness = rng.uniform(0.25, 0.6)
        lips = (1 - redness) * skin * np.array([0.92, 0.72, 0.70]) + redness * skin * np.array([0.88, 0.45, 0.47])
        hair_colours = (
            [0.10, 0.08, 0.07],
            [0.25, 0.16, 0.10],
            [0.42, 0.28, 0.16],
            [0.60, 0.47, 0.28],
            [0.45, 0.43, 0.42],
        )
        eye_colours = ([0.25, 0.15, 0.08], [0.30, 0.38, 0.45], [0.28, 0.34, 0.20])
        hair = np.array(hair_colours[0 if darkness > 0.6 else rng.integers(len(hair_colours))])
        eyes = np.array(eye_colours[0 if darkness > 0.6 else rng.integers(len(eye_colours))])
        man = rng.uniform() < 0.5
        return cls(
            skin=_float32(skin),
            lips=_float32(lips),
            hair=_float32(hair),
            eyes=_float32(eyes),
            clothes=_float32(rng.uniform(0.15, 0.5) + rng.uniform(-0.15, 0.2, 3)),
            jaw=rng.uniform(2.2, 2.7) if man else rng.uniform(1.9, 2.3),
            long_hair=0.0 if man else float(rng.uniform() < 0.8),
            brow=rng.uniform(0.8, 1.2) if man else rng.uniform(0.5, 0.8),
            eye_distance=rng.uniform(0.38, 0.43),
            nose_width=rng.uniform(0.9, 1.25),
            nose_length=rng.uniform(0.95, 1.05),
            upper_lip=rng.uniform(0.06, 0.10),
            lower_lip=rng.uniform(0.09, 0.135),
            mouth_width=rng.uniform(0.93, 1.1),
            bow=rng.uniform(0.1, 0.35),
            beard=rng.uniform(0, 0.5) * float(man and rng.uniform() < 0.6),
            teeth=rng.uniform(0.78, 0.95),
        )


@dataclass(frozen=True)
class Light:
    """A lamp far away: direction (x right, y down, z towards the viewer), strength, and light from everywhere."""

    direction: Array
    strength: float
    ambient: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Light:
        direction = np.array([rng.uniform(-0.5, 0.5), rng.uniform(-0.8, -0.3), 1.0])
        return cls(_float32(direction / np.linalg.norm(direction)), rng.uniform(0.45, 0.65), rng.uniform(0.4, 0.55))


class Face:
    """One speaker under one light: :meth:`draw` gives frames."""

    def __init__(self, speaker: Speaker, light: Light, rng: np.random.Generator) -> None:
        self.speaker = speaker
        self.light = light
        open_eyes, closed_eyes = _draw_head(speaker, light, rng)
        self._open = open_eyes
        self._closed = closed_eyes
        x, y = _coordinates(slice(0, _CANVAS), slice(0, _CANVAS))
        # how far the jaw carries a point: nothing above the mouth, all at the chin, less and less down the neck
        below = _step(_MOUTH_Y - 0.06, _MOUTH_Y + 0.1, y) * (1 - _step(_CHIN_Y, _CHIN_Y + 0.5, y))
        self._carried = below * (1 - _step(0.5, 1.15, np.abs(x)))
        self._rows = slice(_row(_MOUTH_Y - 0.1), _row(_CHIN_Y + 0.55))
        self._eye_rows = slice(_row(-0.4), _row(0.1))
        self._grid = np.meshgrid(np.arange(_CANVAS, dtype=np.float32), np.arange(_CANVAS, dtype=np.float32))

    def draw(self, shape: npt.NDArray[np.float64], blink: float, pose: tuple[float, float, float, float]) -> Array:
        """One frame.

        Args:
            shape: (8,), the mouth as of :func:`mouth_shapes`.
            blink: 0 for open eyes to 1 for closed.
            pose: x and y shift in pixels, turn in degrees, size (1 is normal).

        Returns:
            float32 (256, 256, 3), 0 to 1.
        """
        canvas = self._open.copy()
        if blink > 0:
            rows = self._eye_rows
            canvas[rows] += np.float32(blink) * (self._closed[rows] - canvas[rows])
        drop = np.float32(0.16 * _UNIT * shape[JAW])
        rows = self._rows
        columns = self._grid[0][rows]
        lines = self._grid[1][rows] - drop * self._carried[rows]
        canvas[rows] = cv2.remap(canvas, columns, lines, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        self._draw_mouth(canvas, shape)
        shift_x, shift_y, degrees, size = pose
        matrix = cv2.getRotationMatrix2D(_CENTRE, degrees, size * FRAME / _CANVAS)
        matrix[:, 2] += np.array([FRAME / 2 + shift_x, FRAME / 2 + shift_y]) - np.array(_CENTRE)
        blurred = cv2.GaussianBlur(canvas, (3, 3), 0)
        return np.asarray(
            cv2.warpAffine(blurred, matrix, (FRAME, FRAME), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        )

    def _draw_mouth(self, canvas: Array, shape: npt.NDArray[np.float64]) -> None:
        """Paint lips, teeth and tongue over the canvas."""
        speaker = self.speaker
        aperture = max(0.0, float(shape[APERTURE]))
        rounding, press, tuck = (float(np.clip(shape[index], 0, 1)) for index in (ROUND, PRESS, TUCK))
        half = float(shape[WIDTH]) * speaker.mouth_width
        lift, drop = 0.25 * aperture, 0.75 * aperture
        upper = speaker.upper_lip * (1 + 0.35 * rounding) * (1 - 0.45 * press)
        lower = speaker.lower_lip * (1 + 0.30 * rounding) * (1 - 0.50 * press) * (1 - 0.55 * tuck)
        middle = _MOUTH_Y - 0.015 * tuck

        # only the part of the canvas that the mouth and its shadows touch
        rows = slice(_row(middle - lift - 1.4 * upper - 0.05), _row(middle + drop + lower + 0.2))
        columns = slice(_column(-1.2 * half), _column(1.2 * half))
        patch = canvas[rows, columns]
        x, y = _coordinates(rows, columns)
        u = x / half
        inside = np.clip(1 - u * u, 0, 1)
        # The opening is narrower than the lips, more so when they are round.
        opening_half = 0.93 - 0.30 * rounding
        opening = np.clip(1 - (u / opening_half) ** 2, 0, 1) ** (0.55 + 0.1 * rounding)
        corner = 0.012 * (1 - inside)
        line = middle + corner + 0.012 * np.exp(-((u / 0.3) ** 2)) * (1 - rounding)  # where closed lips meet
        inner_top = line - lift * opening
        inner_bottom = line + drop * opening
        bow = 1 + speaker.bow * (1 - 0.6 * rounding) * (
            np.exp(-(((np.abs(u) - 0.22) / 0.16) ** 2)) - 0.9 * np.exp(-((u / 0.12) ** 2))
        )
        outer_top = inner_top - upper * inside ** (0.75 - 0.3 * rounding) * bow
        outer_bottom = inner_bottom + lower * inside ** (0.70 - 0.25 * rounding) * (
            1 - 0.06 * np.exp(-((u / 0.2) ** 2))
        )

        edge = 1.2 / _UNIT
        soft = 2.5 / _UNIT
        within = _step(-0.02, 0.03, 1 - np.abs(u))
        # shadow under the lower lip and in the corners
        shadow = np.exp(-(((y - outer_bottom - 0.05) / 0.05) ** 2)) * inside * 0.16
        shadow += np.exp(-(((np.abs(u) - 1.02) / 0.07) ** 2) - ((y - middle) / 0.035) ** 2) * 0.30
        patch *= 1 - shadow[..., None]

        light_y = float(self.light.direction[1])
        light_x = float(self.light.direction[0])
        brightness = self.light.ambient + self.light.strength
        side = 1 + 0.35 * light_x * u
        for top, bottom, away, gloss_at in (
            (outer_top, inner_top, 1.0, 0.35),
            (inner_bottom, outer_bottom, -1.0, 0.42),
        ):
            height = np.maximum(bottom - top, 1e-3)
            t = np.clip((y - top) / height, 0, 1)  # 0 at the lip's top, 1 at its bottom
            facing = (2 * t - 1) * 0.75  # y of the normal of a rounded lip
            shade = brightness * (0.80 + 0.42 * facing * light_y) * side
            if away > 0:
                shade *= 0.94
            texture = 1 + 0.025 * np.sin(90 * u + 6 * np.sin(7 * u))
            gloss = np.exp(-(((t - gloss_at) / 0.16) ** 2)) * inside * (0.10 if away < 0 else 0.04) * brightness
            alpha = _step(-soft, soft, y - top) * (1 - _step(-edge, edge, y - bottom))
            if away < 0:
                alpha = _step(-edge, edge, y - top) * (1 - _step(-soft, soft, y - bottom))
            alpha = (alpha * within * (height > 2e-3) * 0.92)[..., None]
            colour = speaker.lips * (shade * texture)[..., None] + gloss[..., None]
            patch += alpha * (colour - patch)

        # the mouth's inside: dark, then tongue, then teeth
        open_mask = _step(-edge, edge, y - inner_top) * (1 - _step(-edge, edge, y - inner_bottom))
        open_mask *= _step(0, 0.05, opening) * _step(0.004, 0.03, inner_bottom - inner_top)
        depth = np.clip((y - inner_top) / np.maximum(inner_bottom - inner_top, 1e-3), 0, 1)
        dark = _float32([0.20, 0.06, 0.06]) * (0.45 + 0.5 * depth)[..., None]
        tongue_top = (
            line + drop - (0.08 + 0.12 * float(shape[TONGUE])) * (0.5 + 2 * aperture) * (1 - 0.5 * (u / 0.8) ** 2)
        )
        tongue = _step(-0.02, 0.02, y - tongue_top) * _step(0.02, 0.12, 0.78 - np.abs(u))
        lit = 0.45 + 0.4 * np.clip((y - tongue_top) / 0.12, 0, 1)
        dark += (0.85 * tongue)[..., None] * (_float32([0.72, 0.36, 0.36]) * lit[..., None] - dark)
        gaps = 1 - 0.22 * np.exp(-((np.sin(np.pi * (x / 0.085 + 0.5)) / 0.16) ** 2))
        fade = np.clip(1.15 - (u / 0.85) ** 2, 0, 1)
        enamel = _float32([1.0, 0.97, 0.90]) * (speaker.teeth * brightness * 0.86 * gaps * fade)[..., None]
        reach = 0.085 * float(np.clip(shape[TEETH], 0, 1)) * np.clip(1 - (x / 0.42) ** 2, 0.2, 1) ** 0.5
        upper_teeth = 1 - _step(-edge, edge, y - (line - lift - 0.02 + reach + 0.02))
        lower_top = line + 0.095 + 0.22 * float(shape[JAW])
        lower_teeth = _step(-edge, edge, y - lower_top) * 0.75 * (1 - 0.8 * tongue)
        dark += (upper_teeth * 0.95)[..., None] * (enamel - dark)
        dark += lower_teeth[..., None] * (enamel * 0.9 - dark)
        shade = 0.62 + 0.38 * _step(0.0, 0.06, y - inner_top)  # the upper lip's shadow
        patch += open_mask[..., None] * (dark * shade[..., None] - patch)
        # the line between closed lips, and lower lip held by the teeth
        meet = np.exp(-(((y - line) / 0.014) ** 2)) * within * (1 - _step(0.0, 0.05, np.float32(aperture) + 0 * y))
        patch *= 1 - (0.55 * meet)[..., None]
        if tuck > 0:
            biting = np.exp(-(((y - (inner_bottom + 0.008)) / 0.016) ** 2)) * within * 0.35 * tuck
            patch *= 1 - biting[..., None]


def sensor(frame: Array, noise: Array, gain: float) -> Frames:
    """Float frame to uint8 (H, W, 3), with a gain and noise (H, W, 3)."""
    return np.asarray(np.clip(frame * np.float32(255 * gain) + noise, 0, 255), dtype=np.uint8)


def _draw_head(speaker: Speaker, light: Light, rng: np.random.Generator) -> tuple[Array, Array]:
    """The face without a mouth, eyes open and eyes closed, float32 (384, 384, 3), 0 to 1."""
    x, y = _coordinates(slice(0, _CANVAS), slice(0, _CANVAS))
    canvas = _background(x, y, rng)
    brightness = light.ambient + light.strength

    # hair behind the head, neck, shoulders
    if speaker.long_hair:
        behind = _inside(np.abs(x / 1.28) ** 2.6 + np.abs((y - 0.1) / 1.75) ** 3.0)
        _paint(canvas, behind, speaker.hair * 0.6 * brightness)
    shoulders = _inside(np.abs(x / 2.3) ** 2.2 + np.abs((y - 2.75) / 1.05) ** 2.2)
    fold = 1 + 0.1 * np.sin(5 * x + 2 * y)
    _paint(canvas, shoulders, speaker.clothes * (brightness * fold)[..., None])
    neck = (
        _inside(np.abs(x / (0.62 + 0.25 * _step(1.4, 2.0, y))) ** 4) * _step(0.6, 0.7, y) * (1 - _step(1.85, 1.95, y))
    )
    under_chin = 0.55 + 0.25 * _step(1.2, 1.7, y)
    _paint(canvas, neck, speaker.skin * (brightness * under_chin * (1 + 0.25 * light.direction[0] * x))[..., None])
    for sign in (-1, 1):
        ear = _inside(((x - sign * 1.0) / 0.13) ** 2 + ((y - 0.08) / 0.28) ** 2)
        _paint(canvas, ear * (1 - 0.9 * speaker.long_hair), speaker.skin * 0.78 * brightness)

    # head: an egg, narrower below
    narrow = 1 - 0.30 * np.clip(y / _CHIN_Y, 0, 1) ** speaker.jaw
    head_x = x / narrow
    head_y = np.where(y > 0, y / (_CHIN_Y + 0.03), y / 1.42)
    radius = head_x**2 + np.abs(head_y) ** 2.3
    head = _inside(radius)

    # relief, in the same units
    def bump(cx: float, cy: float, sx: float, sy: float) -> Array:
        return np.asarray(np.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2))

    def pair(cx: float, cy: float, sx: float, sy: float) -> Array:
        return bump(-cx, cy, sx, sy) + bump(cx, cy, sx, sy)

    tip = 0.30 * speaker.nose_length
    wide = speaker.nose_width
    eye = speaker.eye_distance
    ridge = np.exp(-((x / (0.085 * wide + 0.05 * np.clip((y + 0.2) / 0.5, 0, 1))) ** 2))
    ridge = ridge * _step(-0.35, 0.25, y) * (1 - _step(tip + 0.04, tip + 0.13, y))
    relief = 0.20 * ridge + 0.10 * bump(0, tip, 0.13 * wide, 0.10) + 0.05 * pair(0.145 * wide, tip + 0.03, 0.07, 0.07)
    relief += -0.13 * pair(eye, -0.17, 0.21, 0.13) + 0.06 * pair(eye, -0.42, 0.25, 0.09)
    relief += 0.04 * pair(eye, -0.19, 0.13, 0.08) + 0.10 * pair(0.56, 0.22, 0.25, 0.22)
    relief += 0.05 * bump(0, _MOUTH_Y, 0.40, 0.22) - 0.02 * bump(0, 0.50, 0.05, 0.09)
    relief += -0.035 * bump(0, 0.88, 0.30, 0.06) + 0.07 * bump(0, 1.05, 0.24, 0.12)
    fold_x = 0.22 + 0.30 * np.clip((y - 0.35) / 0.35, 0, 1)
    fold = np.exp(-(((np.abs(x) - fold_x) / 0.05) ** 2)) * _step(0.3, 0.42, y) * (1 - _step(0.6, 0.8, y))
    relief -= 0.012 * fold
    slope_y, slope_x = np.gradient(relief.astype(np.float32), 1 / _UNIT)
    height = np.sqrt(np.clip(1 - np.minimum(radius, 1), 0.02, 1))
    normal = np.stack([0.95 * head_x - slope_x, 0.55 * head_y - slope_y, height], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    lambert = np.clip(normal @ light.direction, 0, 1)
    gloss = 0.10 * np.clip(normal @ _unit(light.direction + np.array([0, 0, 1])), 0, 1) ** 18
    occluded = 1 - 0.20 * pair(eye, -0.19, 0.2, 0.1) - 0.10 * fold - 0.18 * bump(0, tip + 0.17, 0.18, 0.05)
    shade = (light.ambient * (0.75 + 0.25 * height) + light.strength * lambert) * occluded
    pores = cv2.GaussianBlur(rng.normal(0, 1, x.shape).astype(np.float32), (0, 0), 1.2) * 0.02
    blush = 0.06 * pair(0.55, 0.28, 0.22, 0.18) + 0.05 * bump(0, tip, 0.12, 0.1)
    skin = (
        speaker.skin * (1 + pores)[..., None] * (1 + blush[..., None] * np.array([1.0, -0.6, -0.6], dtype=np.float32))
    )
    colour = skin * shade[..., None] + gloss[..., None]
    stubble_at = _step(0.40, 0.62, y + 0.25 * np.abs(x)) * (1 - 0.6 * bump(0, 0.86, 0.10, 0.05)) * _step(0.30, 0.42, y)
    speckle = 0.75 + 0.6 * np.abs(cv2.GaussianBlur(rng.normal(0, 1, x.shape).astype(np.float32), (0, 0), 0.8))
    stubble = np.clip(speaker.beard * stubble_at * speckle, 0, 0.85)
    colour += stubble[..., None] * (speaker.hair * shade[..., None] - colour)
    _paint(canvas, head, colour)

    # nostrils
    for sign in (-1, 1):
        nostril = np.exp(-((((x - sign * 0.085 * wide) / 0.05) ** 2 + ((y - tip - 0.085) / 0.026) ** 2) ** 1.5))
        _paint(canvas, 0.75 * nostril, speaker.skin * 0.18)
    # brows
    for sign in (-1, 1):
        v = (sign * x - eye) / 0.25
        arch = -0.415 - 0.06 * (1 - (v - 0.25) ** 2) + 0.03 * v
        thick = 0.045 * speaker.brow * np.clip(1.1 - 0.5 * (v + 0.3), 0.3, 1.2)
        hairs = 0.85 + 0.15 * np.sin(80 * (x + 0.6 * sign * y))
        brow = np.exp(-(((y - arch) / thick) ** 4)) * (1 - _step(0.85, 1.1, np.abs(v))) * hairs
        _paint(canvas, 0.82 * brow, speaker.hair * 0.75 * brightness)
    # hair on top
    hairline = -0.93 + 0.30 * x * x - 0.10 * np.cos(3.1 * x + 1.0)
    sides = 0.90 - 0.07 * _step(-0.9, -0.1, y)
    hair_shape = _inside(np.abs(x / 1.16) ** 2.4 + np.abs((y + 0.1) / 1.52) ** 2.4)
    reach = 1.1 * speaker.long_hair
    temple = _step(-0.03, 0.05, np.abs(x) - sides) * (1 - _step(reach - 0.15, reach + 0.15, y))
    covered = np.maximum(1 - _step(-0.05, 0.05, y - hairline), temple) * hair_shape
    angle = np.arctan2(x, -(y - 0.6))
    strands = 0.78 + 0.16 * np.sin(45 * angle + 4 * np.sin(9 * angle)) + 0.14 * np.sin(17 * angle + 3 * y)
    sheen = 0.35 * np.exp(-(((y + 1.15 + 0.3 * x * x) / 0.16) ** 2))
    hair = speaker.hair * (brightness * (strands + sheen))[..., None] + 0.05 * sheen[..., None]
    _paint(canvas, covered, hair)

    closed = canvas.copy()
    for sign in (-1, 1):
        ex, ey = x - sign * eye, y + 0.17
        u = ex / 0.185
        lid = np.clip(1 - u * u, 0, 1)
        top, bottom = -0.085 * lid**0.8 - 0.012 * u * sign, 0.055 * lid - 0.012 * u * sign
        edge = 1.0 / _UNIT
        almond = _step(-edge, edge, ey - top) * (1 - _step(-edge, edge, ey - bottom)) * (np.abs(u) < 1)
        white = (
            _float32([0.93, 0.91, 0.89]) * (brightness * (0.62 + 0.28 * np.clip((ey - top) / 0.08, 0, 1)))[..., None]
        )
        distance = np.sqrt(ex**2 + (ey + 0.012) ** 2)
        iris = speaker.eyes * (brightness * (0.7 + 3.5 * distance))[..., None]
        white += (1 - _step(0.076, 0.09, distance))[..., None] * (iris - white)
        white *= _step(0.03, 0.042, distance)[..., None]
        glint = np.exp(-((ex + 0.028 - 0.05 * light.direction[0]) ** 2 + (ey + 0.045) ** 2) / 0.013**2)
        white += (0.85 * glint)[..., None]
        _paint(canvas, almond, white)
        lashes = np.exp(-(((ey - top) / 0.017) ** 2)) * (np.abs(u) < 1.03)
        _paint(canvas, 0.85 * lashes, speaker.hair * 0.25)
        crease = np.exp(-(((ey - top + 0.055) / 0.012) ** 2)) * (np.abs(u) < 0.9)
        _paint(canvas, 0.28 * crease, speaker.skin * 0.3)
        below = np.exp(-(((ey - bottom) / 0.012) ** 2)) * (np.abs(u) < 0.95)
        _paint(canvas, 0.25 * below, speaker.skin * 0.35)
        shut = np.exp(-(((ey - bottom + 0.005) / 0.016) ** 2)) * (np.abs(u) < 1.0)
        _paint(closed, 0.85 * shut, speaker.hair * 0.25)
    return np.clip(canvas, 0, 1), np.clip(closed, 0, 1)


def _background(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A room out of focus."""
    base = rng.uniform(0.25, 0.65) + rng.uniform(-0.08, 0.08, 3)
    canvas = np.empty((*x.shape, 3), dtype=np.float32)
    canvas[:] = _float32(base)
    for _ in range(6):
        cx, cy, size = rng.uniform(-2, 2), rng.uniform(-2, 2), rng.uniform(0.3, 1.0)
        blob = 1 / (1 + np.exp(np.clip((np.hypot(x - cx, y - cy) - size) / 0.15, -30, 30)))
        canvas += blob[..., None].astype(np.float32) * _float32(rng.uniform(-0.16, 0.16) + rng.uniform(-0.06, 0.06, 3))
    return np.clip(canvas, 0.03, 0.97)


def _float32(values: npt.ArrayLike) -> Array:
    return np.asarray(values, dtype=np.float32)


def _unit(vector: npt.NDArray[np.floating]) -> Array:
    return _float32(vector / np.linalg.norm(vector))


def _step(low: float, high: float, values: npt.NDArray[np.floating] | np.floating) -> Array:
    """0 below low, 1 above high, smooth between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)


def _inside(radius: npt.NDArray[np.floating]) -> Array:
    """1 where radius < 1, with a soft edge of about two pixels."""
    return 1 - _step(0.975, 1.025, radius)


def _paint(canvas: Array, alpha: npt.NDArray[np.floating], colour: Array) -> None:
    canvas += alpha[..., None].astype(np.float32) * (colour.astype(np.float32) - canvas)


def _coordinates(rows: slice, columns: slice) -> tuple[Array, Array]:
    """x and y of canvas pixels in half widths of the face from its centre."""
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) - _CENTRE[0]) / _UNIT
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) - _CENTRE[1]) / _UNIT
    grid_x, grid_y = np.meshgrid(x, y)
    return _float32(grid_x), _float32(grid_y)


def _row(y: float) -> int:
    return int(np.clip(_CENTRE[1] + y * _UNIT, 0, _CANVAS))


def _column(x: float) -> int:
    return int(np.clip(_CENTRE[0] + x * _UNIT, 0, _CANVAS))
