"""Where an action happens, from class labels alone: tubes of boxes from attention maps (VideoLSTM)."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .maps import resize_maps

Boxes = npt.NDArray[np.float64]  # (T, 4): x, y of the top left corner, width, height in pixels


def smooth_over_time(maps: Tensor, sigma: float) -> Tensor:  # (T, h, w) -> (T, h, w)
    """Each pixel's values over time through a Gaussian of ``sigma`` steps; the ends are continued."""
    if sigma <= 0.0:
        return maps
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    series = maps.float().flatten(1).T[:, None]  # (h * w, 1, T)
    padded = F.pad(series, (radius, radius), mode="replicate")
    return F.conv1d(padded, (weights / weights.sum())[None, None])[:, 0].T.view_as(maps)


def attention_tube(
    maps: Tensor,
    steps: int,
    size: tuple[int, int],
    *,
    sigma: float = 2.0,
    power: float = 1.0,
    spread: float = 0.0,
    threshold: float = 0.4,
) -> Boxes:
    """The box of the action in every frame.

    In each of :func:`attention_pictures`, what exceeds ``threshold`` of the way from its median to its largest value is
    kept, and the connected piece with the most attention gives the box.

    Args:
        maps: (T', h, w), at least zero.
        steps: frames T.
        size: (H, W) of the frames.
        sigma, power, spread: see :func:`attention_pictures`.
        threshold: 0 to 1.

    Returns:
        (T, 4): x, y, width, height in pixels of the frames.
    """
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"threshold: expected from 0 to less than 1, got {threshold}")
    return boxes_of(attention_pictures(maps, steps, size, sigma=sigma, power=power, spread=spread), threshold)


def attention_pictures(
    maps: Tensor, steps: int, size: tuple[int, int], *, sigma: float, power: float = 1.0, spread: float
) -> npt.NDArray[np.float32]:
    """Attention (T', h, w) over every frame, (T, H, W): smoothed over time, enlarged, and smoothed over the picture.

    Args:
        sigma: of the smoothing over time, in steps of ``maps``.
        power: to which the attention is raised. A softmax often puts most of the attention into one place; below 1,
            what is attended to less is seen as well.
        spread: of the smoothing over the picture, as a share of its height: what is attended to are features, which see
            their surroundings (Xu et al. 2015 show attention so).
    """
    if power <= 0.0:
        raise ValueError(f"power: expected more than 0, got {power}")
    if spread < 0.0:
        raise ValueError(f"spread: expected at least 0, got {spread}")
    smooth = smooth_over_time(maps.cpu(), sigma) ** power
    pictures: npt.NDArray[np.float32] = resize_maps(smooth, steps, size).numpy()
    if spread == 0.0:
        return pictures
    blurred = [
        cv2.GaussianBlur(picture, (0, 0), spread * size[0], borderType=cv2.BORDER_CONSTANT) for picture in pictures
    ]
    return np.stack(blurred).astype(np.float32)


def boxes_of(pictures: npt.NDArray[np.float32], threshold: float) -> Boxes:
    """The boxes of :func:`attention_tube` in attention (T, H, W)."""
    boxes = np.empty((len(pictures), 4))
    for t, picture in enumerate(pictures):
        middle, top = float(np.median(picture)), float(picture.max())
        kept = (picture >= middle + threshold * (top - middle)).astype(np.uint8)
        count, labels, statistics, _ = cv2.connectedComponentsWithStats(kept, connectivity=4)
        weights = np.bincount(labels.ravel(), weights=picture.ravel(), minlength=count)
        weights[0] = -np.inf  # the background
        boxes[t] = statistics[int(np.argmax(weights)), :4]
    return boxes


def peaks_inside(pictures: npt.NDArray[np.float32], boxes: Boxes) -> npt.NDArray[np.bool_]:  # (T, H, W), (T, 4) -> (T,)
    """Whether the most attended pixel of a frame lies in its box."""
    places = pictures.reshape(len(pictures), -1).argmax(axis=1)
    row, column = np.unravel_index(places, pictures.shape[1:])
    x, y, width, height = boxes.T
    inside: npt.NDArray[np.bool_] = (abs(column + 0.5 - x - width / 2) < width / 2) & (
        abs(row + 0.5 - y - height / 2) < height / 2
    )
    return inside


def box_iou(first: Boxes, second: Boxes) -> npt.NDArray[np.float64]:  # (T, 4), (T, 4) -> (T,)
    """Intersection over union of boxes in pairs; zero where both are empty."""
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    common = np.clip(high - low, 0, None).prod(axis=1)
    union = first[:, 2:].prod(axis=1) + second[:, 2:].prod(axis=1) - common
    shares: npt.NDArray[np.float64] = common / np.where(union > 0, union, 1.0)
    return shares
