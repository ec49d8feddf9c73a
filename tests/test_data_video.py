"""Decoding and encoding video files."""

import gc
import multiprocessing
import struct

import av
import numpy as np
import pytest

from fused_convlstm.data import VideoError, read_video, write_video


def numbered_frames(count, height=48, width=64):
    """Frames whose brightness tells their number."""
    return [np.full((height, width), 20 + 8 * number, dtype=np.uint8) for number in range(count)]


def numbers(frames):
    return [round((float(frame.mean()) - 20) / 8) for frame in frames]


def test_written_frames_are_read_back(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_frames(12), fps=25)
    frames, rate = read_video(tmp_path / "a.mp4")
    assert frames.shape == (12, 48, 64, 1)
    assert frames.dtype == np.uint8
    assert rate == 25
    assert numbers(frames) == list(range(12))


def test_colour(tmp_path):
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:, :32, 0] = 200
    picture[:, 32:, 2] = 200
    write_video(tmp_path / "a.mp4", [picture] * 3)
    frames, _ = read_video(tmp_path / "a.mp4", rgb=True)
    assert frames.shape == (3, 48, 64, 3)
    assert np.abs(frames[0, 10, 5].astype(int) - [200, 0, 0]).max() < 12
    assert np.abs(frames[0, 10, 60].astype(int) - [0, 0, 200]).max() < 12


@pytest.mark.parametrize(
    ("codec", "pixel_format"),
    [
        ("ffv1", "yuv420p"),
        ("ffv1", "yuv444p"),
        ("ffv1", "yuv420p10le"),
        ("ffv1", "gray"),
        ("ffv1", "bgr0"),
        ("mjpeg", "yuvj420p"),
        ("mpeg1video", "yuv420p"),
    ],
)
@pytest.mark.parametrize("width", [64, 50])
def test_grey_equals_the_general_conversion(tmp_path, codec, pixel_format, width):
    """Whatever the pixel format, range and padding of the rows."""
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (48, width, 3))
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, 48, pixel_format
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(ramp), "rgb24")))
        container.mux(stream.encode())
    frames, _ = read_video(tmp_path / "a.mkv")
    with av.open(str(tmp_path / "a.mkv")) as container:
        expected = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
    assert np.abs(frames[..., 0].astype(int) - expected).max() <= 1
    assert np.abs(frames[0, 10, :, 0].astype(int) - ramp[10, :, 0]).mean() < 4


@pytest.mark.parametrize(
    ("rate", "count", "expected"),
    [
        (50, 12, [0, 2, 4, 6, 8, 10]),
        (10, 4, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (30, 12, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]),
    ],
)
def test_other_frame_rates_keep_time(tmp_path, rate, count, expected):
    write_video(tmp_path / "a.mp4", numbered_frames(count), fps=rate)
    frames, found = read_video(tmp_path / "a.mp4", 25.0)
    assert found == rate
    assert numbers(frames) == expected
    own, _ = read_video(tmp_path / "a.mp4", None)
    assert numbers(own) == list(range(count))


def test_variable_frame_rate_keeps_time(tmp_path):
    """Frames at 0, 1, 2 and 10 to 13 twenty-fifths of a second: the third stays until the fourth comes."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture, time in zip(numbered_frames(7), [0, 1, 2, 10, 11, 12, 13], strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "gray")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, _ = read_video(tmp_path / "a.mp4", 25.0)
    assert numbers(frames) == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 5, 6]


def test_no_video(tmp_path):
    (tmp_path / "a.mp4").write_text("this is no video")
    with pytest.raises(VideoError, match="cannot be decoded at its start"):
        read_video(tmp_path / "a.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    with pytest.raises(VideoError, match="cannot be decoded at its start"):
        read_video(tmp_path / "empty.mp4")
    with pytest.raises(VideoError, match="No such file"):
        read_video(tmp_path / "missing.mp4")


def test_sound_only(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        read_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("header_first", [False, True])
def test_truncated_file(tmp_path, kept, header_first):
    """A cut file is an error wherever its header is, never a shorter clip."""
    rng = np.random.default_rng(0)
    options = {"movflags": "faststart"} if header_first else {}
    with av.open(str(tmp_path / "a.mp4"), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(30):
            picture = rng.integers(0, 255, (48, 64), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "gray")))
        container.mux(stream.encode())
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(VideoError, match=r"damaged|cannot be decoded"):
        read_video(tmp_path / "cut.mp4")


def atom(data, name):
    """Where the content of an mp4's atom begins, after version and flags."""
    return data.index(name) + 8


def with_edit_list(path, first, count, fps=25):
    """Makes players show only ``count`` frames from ``first`` on, as phones do that cut a video without copying it."""
    data = bytearray(path.read_bytes())
    movie, media = (struct.unpack_from(">I", data, atom(data, name) + 8)[0] for name in (b"mvhd", b"mdhd"))
    entry = atom(data, b"elst") + 4
    start = struct.unpack_from(">i", data, entry + 4)[0]
    struct.pack_into(">Ii", data, entry, count * movie // fps, start + first * media // fps)
    path.write_bytes(data)


@pytest.mark.parametrize("preset", ["ultrafast", "medium"])  # without and with B-frames
@pytest.mark.parametrize("key_every", [5, 250])
@pytest.mark.parametrize(("first", "count"), [(0, 12), (7, 17), (7, 10)])
def test_trimmed_file(tmp_path, preset, key_every, first, count):
    """Frames that an edit list hides are no frames that are lacking; a cut file still is found damaged."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        options = {"preset": preset, "g": str(key_every), "crf": "10"}
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for picture in numbered_frames(24):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "gray")))
        container.mux(stream.encode())
    with_edit_list(path, first, count)
    frames, _ = read_video(path)
    assert numbers(frames) == list(range(first, first + count))
    with av.open(str(path)) as container:
        last = max(packet.pos for packet in container.demux(video=0) if packet.size and not packet.is_discard)
    path.write_bytes(path.read_bytes()[:last])  # cut between two frames: the decoder has nothing to complain about
    with pytest.raises(VideoError, match=r"damaged|cannot be decoded"):
        read_video(path)


@pytest.mark.parametrize("rgb", [False, True])
@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda picture: picture),
        ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),  # a phone held upright: turned clockwise
        ((0, -1, 1, 0), lambda picture: np.rot90(picture, 1)),
        ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
        ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
        ((0, 1, 1, 0), lambda picture: picture.swapaxes(0, 1)),
    ],
)
def test_pictures_are_turned_as_the_file_says(tmp_path, rgb, matrix, shown):
    """The display matrix of a track: a pixel (x, y) is shown at (a x + c y, b x + d y)."""
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:24, :32] = 250  # the corners tell all eight ways apart
    picture[:24, 32:] = 100
    path = tmp_path / "a.mp4"
    write_video(path, [picture] * 3)
    upright, _ = read_video(path, rgb=rgb)
    data = bytearray(path.read_bytes())
    a, b, c, d = (65536 * entry for entry in matrix)
    struct.pack_into(">9i", data, atom(data, b"tkhd") + 36, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    turned, _ = read_video(path, rgb=rgb)
    assert turned.flags.c_contiguous
    assert np.array_equal(turned, [shown(frame) for frame in upright])


def test_a_forked_process_after_reading(tmp_path):
    """What reading leaves behind may be collected in a worker of a data loader: a fork without the reader's threads."""
    write_video(tmp_path / "a.mp4", [np.zeros((480, 640, 3), dtype=np.uint8)] * 3)
    gc.collect()
    gc.disable()
    try:
        read_video(tmp_path / "a.mp4", rgb=True)
        worker = multiprocessing.get_context("fork").Process(target=gc.collect)
        worker.start()
        worker.join(20)
        ended = worker.exitcode == 0
        worker.kill()
        worker.join()
    finally:
        gc.enable()
    assert ended


def test_write_needs_frames(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", [])
