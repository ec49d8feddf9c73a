"""The procedural word set: rendered speakers in the layout of LRW."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..files import complete_file, write_text
from ..video import Frames, write_video
from .face import FRAME, Face, Light, Speaker, sensor
from .sets import PlannedClip, check_count, make_set
from .speech import WORDS, mouth_shapes, parse_phonemes

FPS = 25
NUM_FRAMES = 29
_SESSIONS = 3  # recordings of a speaker under one light, in front of one background


@dataclass(frozen=True)
class _Session:
    """The clips of one speaker under one light."""

    seed: int
    speaker: int
    session: int
    lexicon: dict[str, str]
    clips: list[PlannedClip]


def generate(
    out_dir: str | Path,
    words: Mapping[str, str] | Sequence[str] | None = None,
    clips_per_word: int = 60,
    speakers: int = 12,
    seed: int = 0,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render a lipreading set in the layout that :class:`~fused_convlstm.data.LRW` reads.

    Clips have 29 frames of 256 x 256 at 25 fps with the word in the middle; the text file gives its exact duration. Of
    a word's clips the first two thirds are train, then a sixth each val and test; every speaker is in all parts. The
    same arguments give the same pictures, whatever the number of workers. An interrupted call is continued by the same
    call.

    Args:
        out_dir: folder, made if needed.
        words: words with ARPAbet phonemes, such as ``{"OMIT": "OW M IH T"}``, or names of :data:`WORDS`; default all.
        clips_per_word: clips of each word, at least 6.
        speakers: different faces.
        seed: seed of everything random.
        workers: processes; default one per core; 0: in this process.
        progress: show a progress bar.

    Returns:
        ``out_dir``.

    Raises:
        ValueError: an unknown word or phoneme, or a folder with a set made from other arguments.
        PrepareError: no space left or no right to write in ``out_dir``.
    """
    lexicon = _lexicon(words)
    check_count("clips_per_word", clips_per_word, 6)
    check_count("speakers", speakers, 1)

    def sessions(missing: list[PlannedClip]) -> list[_Session]:
        together: dict[tuple[int, int], list[PlannedClip]] = {}
        for clip in missing:
            together.setdefault((clip.number % speakers, clip.number // speakers % _SESSIONS), []).append(clip)
        return [_Session(seed, *key, lexicon, clips) for key, clips in sorted(together.items())]

    arguments = {"set": "words", "words": lexicon, "clips_per_word": clips_per_word, "speakers": speakers, "seed": seed}
    labels = list(lexicon)
    return make_set(out_dir, arguments, labels, clips_per_word, sessions, _render_session, workers, progress)


def _lexicon(words: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    if words is None:
        lexicon = dict(WORDS)
    elif isinstance(words, Mapping):
        lexicon = dict(words)
    else:
        if unknown := [word for word in words if word not in WORDS]:
            raise ValueError(f"words: expected some of {', '.join(WORDS)}, or words with phonemes, got {unknown}")
        lexicon = {word: WORDS[word] for word in words}
    if not lexicon:
        raise ValueError("words: expected at least one, got none")
    for word, phonemes in lexicon.items():
        if not word or any(character in word for character in "/\\\0") or word.startswith("."):
            raise ValueError(f"words: {word!r} cannot be the name of a folder")
        parse_phonemes(word, phonemes)
    return lexicon


def _render_session(job: _Session) -> int:
    rng = np.random.default_rng([job.seed, job.speaker])
    speaker = Speaker.draw(rng)
    rng = np.random.default_rng([job.seed, job.speaker, 1 + job.session])
    face = Face(speaker, Light.draw(rng), rng)
    noise = rng.normal(0, rng.uniform(1, 3.5), (FRAME + 64, FRAME + 64, 3)).astype(np.float32)
    for clip in job.clips:
        clip_rng = np.random.default_rng([job.seed, zlib.crc32(clip.label.encode()), clip.number])
        shapes = parse_phonemes(clip.label, job.lexicon[clip.label])
        duration = clip_rng.uniform(0.72, 0.96)
        write_text(clip.video.with_suffix(".txt"), f"Duration: {duration:.3f} seconds\n")
        with complete_file(clip.video) as unfinished:
            write_video(unfinished, _frames(face, shapes, duration, noise, clip_rng), FPS)
    return len(job.clips)


def _frames(
    face: Face, shapes: list[str], duration: float, noise: np.ndarray, rng: np.random.Generator
) -> Iterator[Frames]:
    """One clip: the word in the middle, the head moving a little, perhaps a blink."""
    times = (np.arange(NUM_FRAMES) + 0.5) / FPS
    middle = NUM_FRAMES / FPS / 2
    strength = rng.uniform(0.92, 1.12)
    mouth = mouth_shapes(shapes, middle - duration / 2, middle + duration / 2, times, rng, strength)
    mouth = mouth + rng.normal(0, 0.004, mouth.shape[1])
    base = np.array([rng.uniform(-9, 9), rng.uniform(-6, 6), rng.uniform(-3, 3), rng.uniform(0.94, 1.06)])
    sway = np.array([2.5, 1.8, 1.2, 0.012]) * rng.uniform(0.2, 1, 4)
    pace, phase = rng.uniform(0.3, 1.0, 4), rng.uniform(0, 2 * np.pi, 4)
    poses = base + sway * np.sin(2 * np.pi * pace * times[:, None] + phase)
    blink_at = rng.uniform(0, NUM_FRAMES / FPS / 0.4)  # in two clips of five
    blinks = np.clip(1.6 - np.abs(times - blink_at) / 0.07, 0, 1)
    exposure = rng.uniform(0.92, 1.08) * (1 + 0.015 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * times))
    for shape, blink, pose, gain in zip(mouth, blinks, poses, exposure, strict=True):
        picture = face.draw(shape, float(blink), (pose[0], pose[1], pose[2], pose[3]))
        top, left = rng.integers(0, 64, 2)
        yield sensor(picture, noise[top : top + FRAME, left : left + FRAME], float(gain))
