"""A tiny prepared cache whose words are directions of motion: one frame never tells them apart."""

import numpy as np

from fused_convlstm.data.cache import Record, clip_path, write_clip, write_index, write_parameters

WORDS = ("down", "left", "right", "up")
SIDE = 32


def moving_bar(word, steps, rng):
    """A bright bar that moves: (T, 1, SIDE, SIDE) uint8."""
    start, speed = rng.integers(SIDE), 3
    frames = np.full((steps, SIDE, SIDE), 60, np.uint8)
    for t in range(steps):
        place = (start + (speed if word in ("right", "down") else -speed) * t) % SIDE
        rows = (place + np.arange(4)) % SIDE
        frames[t, rows] = 200
    frames = frames if word in ("up", "down") else frames.transpose(0, 2, 1)
    noise = rng.normal(0, 4, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)[:, None]


def make_word_cache(folder, per_word=(8, 4, 4), steps=(8, 8), seed=0):
    """Clips of one word each, ``per_word`` in train, val and test."""
    rng = np.random.default_rng(seed)
    records = []
    for split, count in zip(("train", "val", "test"), per_word, strict=True):
        for word in WORDS:
            for k in range(count):
                length = int(rng.integers(steps[0], steps[1] + 1))
                write_clip(clip_path(folder, split, f"{word}_{k}"), moving_bar(word, length, rng), ())
                records.append(Record(split, f"{word}_{k}", word, word, length))
    return _finish(folder, records)


def make_sentence_cache(folder, count=(8, 4, 4), seed=0, timed=True):
    """Clips of two or three words of 6 frames each, with their boundaries if ``timed``."""
    rng = np.random.default_rng(seed)
    records = []
    for split, number in zip(("train", "val", "test"), count, strict=True):
        for k in range(number):
            words = list(rng.choice(WORDS, rng.integers(2, 4)))
            frames = np.concatenate([moving_bar(word, 6, rng) for word in words])
            times = tuple((str(word), 6 * i, 6 * i + 6) for i, word in enumerate(words))
            write_clip(clip_path(folder, split, str(k)), frames, times if timed else ())
            records.append(Record(split, str(k), " ".join(words), None, len(frames)))
    return _finish(folder, records)


def _finish(folder, records):
    write_parameters(folder, {"made by": "tests"})
    write_index(folder, records)
    return folder
