"""The rendered speakers: seen by the face finder, exact, repeatable, and told apart only by motion."""

import re
import resource
import shutil

import numpy as np
import pytest

from fused_convlstm.data import LRW, Item, MouthCrop, PrepareError, read_video
from fused_convlstm.data.crops import find_face, grey
from fused_convlstm.data.procedural import WORDS, generate
from fused_convlstm.data.procedural.face import FRAME, Face, Light, Speaker, sensor
from fused_convlstm.data.procedural.speech import APERTURE, PRESS, ROUND, TUCK, WIDTH, mouth_shapes, parse_phonemes


class Even(np.random.Generator):
    """A generator that draws the middle of every range."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))

    def uniform(self, low=0.0, high=1.0, size=None):
        return np.full(size or (), (low + high) / 2)


TIMES = (np.arange(29) + 0.5) / 25
MIDDLE = 29 / 50


def trajectory(word):
    return mouth_shapes(parse_phonemes(word, WORDS[word]), MIDDLE - 0.42, MIDDLE + 0.42, TIMES, Even())


def test_words_come_in_reversed_pairs():
    """No frame of a word, nor all of them in any order, tells it from its partner: only the order in time does."""
    sounds = {word: tuple(parse_phonemes(word, phonemes)) for word, phonemes in WORDS.items()}
    assert len(WORDS) >= 10
    assert len(set(sounds.values())) == len(WORDS)
    for word, shapes in sounds.items():
        (partner,) = [other for other, reverse in sounds.items() if reverse == shapes[::-1]]
        assert partner != word
        np.testing.assert_allclose(trajectory(word), trajectory(partner)[::-1], atol=1e-9)
        assert np.abs(trajectory(word) - trajectory(partner)).max() > 0.1
    for position in (0, -1):
        shared = [shapes[position] for shapes in sounds.values()]
        assert any(shared.count(shape) > 1 for shape in shared)


def test_shapes_are_reached_and_blend():
    omit = trajectory("OMIT")
    inside = slice(6, 23)
    assert omit[inside, PRESS].max() > 0.8
    assert omit[inside, WIDTH].max() > 0.43
    assert trajectory("TULIP")[inside, ROUND].max() > 0.85
    assert trajectory("FEEDBACK")[inside, TUCK].max() > 0.8
    assert trajectory("CAPTIVE")[inside, APERTURE].max() > 0.2
    for word in WORDS:  # no jumps: even a plosive next to an open vowel takes more than one frame
        aperture = trajectory(word)[:, APERTURE]
        assert np.abs(np.diff(aperture)).max() < 0.7 * np.ptp(aperture)
    rest = trajectory("OMIT")[[0, -1]]
    np.testing.assert_allclose(rest, trajectory("TULIP")[[0, -1]], atol=0.02)
    # the vowel colours its neighbours: the same consonant is rounder before a round vowel
    assert trajectory("DUTIES")[9, ROUND] > trajectory("DEPOT")[9, ROUND] + 0.05


def test_phonemes():
    assert parse_phonemes("team", "t iy1 m") == ["T", "IY", "M"]
    with pytest.raises(ValueError, match="unknown phoneme 'Q'"):
        parse_phonemes("queue", "Q UW")
    with pytest.raises(ValueError, match="no phonemes"):
        parse_phonemes("silence", " ")


@pytest.mark.parametrize("seed", range(10))
def test_the_face_is_found_and_the_mouth_centred(seed):
    """Any speaker in any light and pose: OpenCV's cascade finds the face, and the crop's middle is the drawn mouth."""
    rng = np.random.default_rng(seed)
    face = Face(Speaker.draw(rng), Light.draw(rng), rng)
    shift_x, shift_y, turn, size = rng.uniform(-10, 10), rng.uniform(-7, 7), rng.uniform(-4, 4), rng.uniform(0.92, 1.08)
    shapes = mouth_shapes(parse_phonemes("CAPTIVE", WORDS["CAPTIVE"]), 0.3, 0.8, TIMES, rng)
    frames = np.stack(
        [sensor(face.draw(shape, 0, (shift_x, shift_y, turn, size)), np.float32(0), 1) for shape in shapes]
    )
    assert all(find_face(grey(frame), 320) is not None for frame in frames[::7])
    boxes = MouthCrop().track(frames)
    # 0.64 face half widths (of 92 * 2 / 3 pixels) below the middle of the face, turned about it, counter-clockwise
    below = 0.64 * 92 * 2 / 3 * size
    angle = np.deg2rad(turn)
    mouth = np.array([FRAME / 2 + shift_x + below * np.sin(angle), FRAME / 2 + shift_y + below * 1.03 * np.cos(angle)])
    error = np.abs(boxes[:, :2] - mouth) / boxes[:, 2:]  # in sides of the crop
    assert error.max() < 0.13, error.max(axis=0)


def test_blink_and_pose_change_the_picture():
    rng = np.random.default_rng(0)
    face = Face(Speaker.draw(rng), Light.draw(rng), rng)
    rest = trajectory("OMIT")[0]
    plain = face.draw(rest, 0, (0, 0, 0, 1))
    assert plain.shape == (FRAME, FRAME, 3)
    assert plain.min() >= 0
    assert plain.max() <= 1
    shut = face.draw(rest, 1, (0, 0, 0, 1))
    changed = np.abs(shut - plain).max(axis=2) > 0.1
    assert changed[100:130].any()
    assert not changed[150:].any()
    moved = face.draw(rest, 0, (5, 0, 0, 1))
    np.testing.assert_allclose(moved[60:200, 65:200], plain[60:200, 60:195], atol=0.03)
    assert np.array_equal(face.draw(rest, 0, (0, 0, 0, 1)), plain)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("small") / "set", ["CAPTIVE"], 6, 1, seed=3, workers=0, progress=False)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_layout_of_lrw(small):
    found = list(LRW(small))
    assert all(isinstance(entry, Item) for entry in found)
    assert [(item.name, item.split) for item in found] == [
        ("CAPTIVE/CAPTIVE_00001", "train"),
        ("CAPTIVE/CAPTIVE_00002", "train"),
        ("CAPTIVE/CAPTIVE_00003", "train"),
        ("CAPTIVE/CAPTIVE_00004", "train"),
        ("CAPTIVE/CAPTIVE_00005", "val"),
        ("CAPTIVE/CAPTIVE_00006", "test"),
    ]
    frames, rate = read_video(small / "CAPTIVE/train/CAPTIVE_00001.mp4", rgb=True)
    assert frames.shape == (29, 256, 256, 3)
    assert rate == 25
    text = (small / "CAPTIVE/train/CAPTIVE_00001.txt").read_text()
    assert re.fullmatch(r"Duration: 0\.\d{3} seconds\n", text)


def test_the_word_is_where_the_text_file_says(small):
    """The picture of the mouth is at rest outside the word and moves inside."""
    for item in LRW(small):
        frames, _ = read_video(item.video)
        boxes = MouthCrop().track(frames)
        x, y, side = boxes[14, 0], boxes[14, 1], boxes[14, 2]
        mouth = frames[:, int(y - side / 4) : int(y + side / 4), int(x - side / 3) : int(x + side / 3), 0].astype(float)
        change = np.abs(np.diff(mouth, axis=0)).mean(axis=(1, 2))  # (28,), between frames
        word = item.words[0]
        first, last = round(word.start * 25), round(word.end * 25)
        assert change[first:last].max() > 1.8 * change[: max(1, first - 2)].max()
        assert change[first:last].max() > 1.8 * change[min(27, last + 2) :].max()


def test_same_arguments_same_files(small, tmp_path):
    again = generate(tmp_path / "set", ["CAPTIVE"], 6, 1, seed=3, workers=2, progress=False)
    assert files(again) == files(small)


def test_other_seed_other_files(small, tmp_path):
    other = generate(tmp_path / "set", ["CAPTIVE"], 6, 1, seed=4, workers=0, progress=False)
    assert files(other) != files(small)


def test_continued_after_an_interruption(small, tmp_path):
    shutil.copytree(small, tmp_path / "set")
    (tmp_path / "set/CAPTIVE/train/CAPTIVE_00002.mp4").unlink()
    (tmp_path / "set/CAPTIVE/test/CAPTIVE_00006.mp4").unlink()
    (tmp_path / "set/CAPTIVE/test/CAPTIVE_00006.txt").unlink()
    (tmp_path / "set/CAPTIVE/test/CAPTIVE_00006.mp4.77.unfinished").write_bytes(b"half")
    generate(tmp_path / "set", ["CAPTIVE"], 6, 1, seed=3, workers=0, progress=False)
    assert files(tmp_path / "set") == files(small)


def test_no_space_left(tmp_path):
    """Files may not grow beyond 2 kB: an error that says so, and nothing half written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(PrepareError, match=r"cannot write in .* the same call continues"):
            generate(tmp_path / "set", ["CAPTIVE"], 6, 1, workers=0, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(files(tmp_path / "set")) <= {"procedural.json", "CAPTIVE/train/CAPTIVE_00001.txt"}


def test_bad_arguments(small, tmp_path):
    with pytest.raises(ValueError, match=r"words: expected some of .* got"):
        generate(tmp_path / "new", ["SOUP"], workers=0)
    with pytest.raises(ValueError, match="unknown phoneme"):
        generate(tmp_path / "new", {"SOUP": "S QQ P"}, workers=0)
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        generate(tmp_path / "new", {"a/b": "S UW P"}, workers=0)
    with pytest.raises(ValueError, match="at least one"):
        generate(tmp_path / "new", {}, workers=0)
    with pytest.raises(ValueError, match="clips_per_word: expected 6"):
        generate(tmp_path / "new", clips_per_word=5, workers=0)
    with pytest.raises(ValueError, match="speakers: expected 1"):
        generate(tmp_path / "new", speakers=0, workers=0)
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="has a set made with"):
        generate(small, ["CAPTIVE"], 6, 1, seed=9, workers=0)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an empty or a new folder"):
        generate(tmp_path, workers=0)
