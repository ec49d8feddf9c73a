"""Phonemes to mouth shapes over time.

Every phoneme (ARPAbet) has a target shape of the mouth, and for each number of the shape a dominance. At each moment
the shape is the mean of the targets weighted by dominance functions that fall off with the distance in time, so that
neighbours blend (Cohen & Massaro, "Modeling coarticulation in synthetic visual speech", 1993). The functions are
symmetric in time: a word and the word of the reversed sounds pass through the same shapes in the opposite order, and no
single frame tells the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# The numbers of a shape; lengths in half widths of the face, the rest 0 to 1.
APERTURE, WIDTH, ROUND, PRESS, TUCK, TEETH, TONGUE, JAW = range(8)

#   aperture  width round press tuck teeth tongue jaw
_SHAPES: dict[str, tuple[float, ...]] = {
    "SIL": (0.00, 0.36, 0.10, 0.10, 0.0, 0.3, 0.1, 0.00),
    "M": (0.00, 0.35, 0.10, 1.00, 0.0, 0.3, 0.1, 0.05),
    "F": (0.05, 0.36, 0.05, 0.00, 1.0, 1.0, 0.0, 0.10),
    "T": (0.10, 0.38, 0.10, 0.00, 0.0, 1.0, 0.3, 0.15),
    "L": (0.17, 0.37, 0.05, 0.00, 0.0, 0.6, 1.0, 0.35),
    "CH": (0.12, 0.28, 0.90, 0.00, 0.0, 1.0, 0.0, 0.15),
    "K": (0.10, 0.36, 0.10, 0.00, 0.0, 0.5, 0.1, 0.25),
    "R": (0.10, 0.28, 0.60, 0.00, 0.0, 0.5, 0.3, 0.20),
    "TH": (0.10, 0.37, 0.00, 0.00, 0.0, 0.7, 1.0, 0.15),
    "UW": (0.08, 0.21, 1.00, 0.00, 0.0, 0.1, 0.0, 0.20),
    "AO": (0.20, 0.26, 0.80, 0.00, 0.0, 0.1, 0.0, 0.55),
    "AA": (0.33, 0.36, 0.10, 0.00, 0.0, 0.6, 0.1, 1.00),
    "AE": (0.26, 0.42, 0.00, 0.00, 0.0, 0.9, 0.1, 0.75),
    "IY": (0.12, 0.46, 0.00, 0.00, 0.0, 0.9, 0.2, 0.25),
}
#   dominance of the same numbers
_FIRM_LIPS = (3.0, 0.7, 0.5, 3.0, 3.0, 1.0, 0.5, 1.0)
_SOFT = (0.8, 0.4, 0.4, 1.0, 1.0, 1.0, 1.5, 0.8)
_SHAPED = (1.0, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0)
_DOMINANCE: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("M", "F"), _FIRM_LIPS),
    **dict.fromkeys(("T", "L", "K", "TH"), _SOFT),
    **dict.fromkeys(("SIL", "CH", "R", "UW", "AO", "AA", "AE", "IY"), _SHAPED),
}
# Phonemes that look alike share a shape.
_LOOKS_LIKE = {
    **dict.fromkeys(("M", "B", "P"), "M"),
    **dict.fromkeys(("F", "V"), "F"),
    **dict.fromkeys(("T", "D", "N", "S", "Z"), "T"),
    "L": "L",
    **dict.fromkeys(("CH", "JH", "SH", "ZH"), "CH"),
    **dict.fromkeys(("K", "G", "NG", "HH", "Y"), "K"),
    **dict.fromkeys(("R", "ER"), "R"),
    **dict.fromkeys(("TH", "DH"), "TH"),
    **dict.fromkeys(("UW", "UH", "W"), "UW"),
    **dict.fromkeys(("AO", "OW", "OY"), "AO"),
    **dict.fromkeys(("AA", "AH", "AW", "AY"), "AA"),
    **dict.fromkeys(("AE", "EH", "EY"), "AE"),
    **dict.fromkeys(("IY", "IH"), "IY"),
}
_VOWELS = frozenset(("UW", "AO", "AA", "AE", "IY"))

# Five pairs of real words, each the other's shapes reversed: the vowels of a word look different from each other, and
# their order is what tells it from its partner. Many share their first or last sound with another pair.
WORDS: Mapping[str, str] = {
    "BALLOON": "B AH L UW N",
    "CAPTIVE": "K AE P T IH V",
    "CRUSADE": "K R UW S EY D",
    "DEPOT": "D IY P OW",
    "DUTIES": "D UW T IY Z",
    "FEEDBACK": "F IY D B AE K",
    "NETWORK": "N EH T W ER K",
    "OMIT": "OW M IH T",
    "SEDUCE": "S IH D UW S",
    "TULIP": "T UW L AH P",
}


def parse_phonemes(word: str, phonemes: str) -> list[str]:
    """The mouth shapes of a word given as ARPAbet phonemes such as ``"OW M IH T"``; stress digits are ignored.

    Raises:
        ValueError: an unknown phoneme, or none.
    """
    shapes = []
    for phoneme in phonemes.upper().split():
        shape = _LOOKS_LIKE.get(phoneme.rstrip("012"))
        if shape is None:
            raise ValueError(
                f"words: {word!r} has the unknown phoneme {phoneme!r}; known: {', '.join(sorted(_LOOKS_LIKE))}"
            )
        shapes.append(shape)
    if not shapes:
        raise ValueError(f"words: {word!r} has no phonemes")
    return shapes


def mouth_shapes(
    shapes: Sequence[str], start: float, end: float, times: Array, rng: np.random.Generator, strength: float = 1.0
) -> Array:
    """The mouth during a word and the rest around it.

    Args:
        shapes: from :func:`parse_phonemes`.
        start: when the word starts, seconds.
        end: when it ends.
        times: (T,), when to look.
        rng: varies the phonemes' durations by up to a fifth.
        strength: 1 for the targets, below 1 for lazier, above for exaggerated speech.

    Returns:
        (T, 8): aperture, width, rounding, press, tuck, teeth, tongue, jaw.
    """
    durations = np.array([1.5 if shape in _VOWELS else 1.0 for shape in shapes]) * rng.uniform(0.8, 1.2, len(shapes))
    edges = start + (end - start) * np.concatenate([[0.0], np.cumsum(durations) / durations.sum()])
    rest = 0.5 * (end - start)
    phones = ["SIL", *shapes, "SIL"]
    starts = np.concatenate([[start - rest], edges])
    ends = np.concatenate([edges, [end + rest]])
    targets = np.array([_SHAPES[phone] for phone in phones])  # (N, 8)
    targets = _SHAPES_AT_REST + strength * (targets - _SHAPES_AT_REST)
    dominance = np.array([_DOMINANCE[phone] for phone in phones])
    # Distance from the middle of each phone; the rest goes on without end before the first and after the last.
    middle, half = (starts + ends) / 2, (ends - starts) / 2
    offset = times[:, None] - middle[None, :]  # (T, N)
    offset[:, 0] = np.maximum(offset[:, 0], 0)
    offset[:, -1] = np.minimum(offset[:, -1], 0)
    nearness = np.exp(-1.6 * (offset / half) ** 2)
    weights = nearness[:, :, None] * dominance[None]  # (T, N, 8)
    return np.asarray((weights * targets[None]).sum(axis=1) / weights.sum(axis=1))


_SHAPES_AT_REST = np.array(_SHAPES["SIL"])
