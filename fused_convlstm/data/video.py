"""Video files in and out, through PyAV."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

Frames = npt.NDArray[np.uint8]


class VideoError(Exception):
    """A file that cannot be read as video, or not to its end."""


def read_video(path: str | Path, fps: float | None = 25.0, *, rgb: bool = False) -> tuple[Frames, float]:
    """Decode a file to frames uint8 (T, H, W, C), C = 1 grey or 3 RGB, and its own frame rate.

    Where the file has another rate than ``fps``, the frame shown at each time k / fps is taken; None keeps its own
    frames. The frames are those that a player shows, as it shows them: without what an edit list hides, and turned or
    mirrored as the file says.

    Raises:
        VideoError: no video file, damaged, shorter than its header says, or empty.
    """
    frames: list[Frames] = []
    times: list[float | None] = []
    rate = 0.0
    visible, lasting = 0, 0  # packets of frames to show, and their time
    matrix: Any = None
    convert = VideoReformatter()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            declared, duration = stream.frames, stream.duration
            for packet in container.demux(stream):
                if packet.pts is not None and not packet.is_discard:
                    visible, lasting = visible + 1, lasting + (packet.duration or 0)
                for frame in packet.decode():
                    if frame.is_corrupt:
                        raise VideoError(f"damaged at frame {len(frames)}")
                    if not frames:
                        matrix = frame.side_data.get("DISPLAYMATRIX")
                    frames.append(_convert(frame, "rgb24", convert) if rgb else _luma(frame, convert))
                    times.append(frame.time)
            lacking = ((duration or 0) - lasting) * float(stream.time_base or 0) * rate  # frames
    except (av.FFmpegError, OSError) as error:
        where = f"after {len(frames)} frames" if frames else "at its start"
        raise VideoError(f"cannot be decoded {where}: {error.strerror or error}") from error
    if not frames:
        raise VideoError("no frames")
    # A header counts the frames that an edit list hides, but not in the duration, which may end within a frame.
    if len(frames) < declared and (duration is None or len(frames) < visible or lacking > 0.95):
        raise VideoError(f"damaged: {len(frames)} of {declared} frames can be decoded")
    if rate <= 0:
        raise VideoError("no frame rate")
    if any(frame.shape != frames[0].shape for frame in frames):
        raise VideoError("the frame size changes")
    stacked = np.stack(frames) if rgb else np.stack(frames)[..., None]
    if fps is not None and abs(rate - fps) > 1e-3 * fps:
        shown = [index / rate if time is None else time - (times[0] or 0.0) for index, time in enumerate(times)]
        wanted = np.arange(max(1, round(len(frames) / rate * fps))) / fps
        stacked = stacked[np.clip(np.searchsorted(shown, wanted + 1e-6, side="right") - 1, 0, len(frames) - 1)]
    return _upright(stacked, matrix), rate


def _upright(frames: Frames, matrix: Any) -> Frames:
    """Frames (T, H, W, C) turned and mirrored by a display matrix: nine int32 [a b u; c d v; x y w], or None.

    It takes a pixel (x, y) to (a x + c y, b x + d y).
    """
    if matrix is None:
        return frames
    a, b, _, c, d = (int(entry) for entry in np.frombuffer(matrix, dtype=np.int32)[:5])
    if abs(b) > abs(a):  # a quarter turn
        frames, a, d = frames.swapaxes(1, 2), c, b
    if d < 0:
        frames = frames[:, ::-1]
    if a < 0:
        frames = frames[:, :, ::-1]
    return np.ascontiguousarray(frames)


def read_pictures(folder: str | Path, *, rgb: bool = False) -> Frames:
    """The pictures of a folder (.jpg, .png), sorted by name, as frames uint8 (T, H, W, C).

    Raises:
        VideoError: none, one that cannot be decoded, or different sizes.
    """
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise VideoError("no pictures")
    frames = []
    for path in paths:
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR if rgb else cv2.IMREAD_GRAYSCALE)
        if picture is None:
            raise VideoError(f"{path.name} cannot be decoded")
        frames.append(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) if rgb else picture[..., None])
    if any(frame.shape != frames[0].shape for frame in frames):
        raise VideoError("the frame size changes")
    return np.asarray(np.stack(frames), dtype=np.uint8)


# The usual pixel formats with 8 bit luma in a plane of its own; 16 is black and 235 white unless the range is full.
_LUMA_FIRST = frozenset(("yuv420p", "yuv422p", "yuv444p", "yuvj420p", "yuvj422p", "yuvj444p", "nv12", "nv21"))
_EXPAND = np.clip(np.round((np.arange(256) - 16) * (255 / 219)), 0, 255).astype(np.uint8)


def _convert(frame: av.VideoFrame, pixel_format: str, convert: VideoReformatter) -> Frames:
    """The picture in another format.

    A frame that has been asked for its side data is in a cycle of references, which a process that was forked
    meanwhile may be the one to collect. If it had a converter of its own, that would wait there for threads that are
    not.
    """
    return np.asarray(convert.reformat(frame, format=pixel_format).to_ndarray(), dtype=np.uint8)


def _luma(frame: av.VideoFrame, convert: VideoReformatter) -> Frames:
    """The grey picture (H, W): for most videos one table look-up, several times faster than the general conversion."""
    if frame.format.name not in _LUMA_FIRST:
        return _convert(frame, "gray", convert)
    plane = frame.planes[0]
    luma = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)[: frame.height, : frame.width]
    full_range = frame.format.name.startswith("yuvj") or frame.color_range == av.video.reformatter.ColorRange.JPEG
    return luma.copy() if full_range else np.take(_EXPAND, luma)


def write_video(path: str | Path, frames: Iterable[Frames], fps: int = 25, *, crf: int = 18) -> None:
    """Write frames uint8 (H, W, 3) RGB or (H, W) grey as H.264 mp4."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(
                    "libx264", rate=Fraction(fps), options={"crf": str(crf), "preset": "ultrafast"}
                )
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.thread_count = 1
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24" if frame.ndim == 3 else "gray")
            container.mux(stream.encode(picture))
        if stream is None:
            raise ValueError("frames: expected at least one frame, got none")
        container.mux(stream.encode())
