"""Reading a video: words with their times and probabilities, from a file or frame by frame."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data import Batch, Crop, MouthCrop, NoFaceError, center_crop
from ..models import ModelState
from ..training.clips import middle_view, run_batch, test_views
from ..training.tasks import TimedWord, WordTask, decode_characters
from .reader import TrainedReader

Frames = npt.NDArray[np.uint8]

WINDOW = 29  # frames of a word clip, where the model was trained on whole clips
TRACKED = 10  # frames that the mouth of a stream is tracked over


def read_words(
    reader: TrainedReader,
    frames: Frames,  # (T, C, H, W), as reader.read_video gives them
    *,
    threshold: float = 0.5,
    one_crop: bool = False,
) -> list[TimedWord]:
    """The words of a video.

    A model of characters reads the sentence at once; a model whose clips are sampled as a whole gives the video one
    class. Any other model of single words reads the window around every frame; where it gives the same word for a
    while, and at least ``threshold`` to it at its surest, that is a word. Its time is that of the middles of these
    windows.

    Args:
        one_crop: use one crop and not six: six times as fast.
    """
    views = (middle_view if one_crop else test_views)(reader.transform, reader.flow)
    if not isinstance(reader.task, WordTask):
        return decode_characters(run_batch(reader.model, _batch([frames]), views, None, reader.device)[:, 0])
    if reader.whole_clips:
        parts = reader.sample(_batch([frames]))
        runs = [run_batch(reader.model, part, views, None, reader.device)[:, 0] for part in parts]
        clip = torch.stack(runs).mean(dim=0)  # (T, K)
        probability, chosen = (clip[-1] if reader.readout == "last" else clip.mean(dim=0)).max(dim=0)
        surest = float(probability)
        return [TimedWord(reader.task.classes[int(chosen)], 0, len(frames), surest)] if surest >= threshold else []
    window = min(reader.frames or WINDOW, len(frames))
    starts = range(len(frames) - window + 1)
    results: list[Tensor] = []
    for first in range(0, len(starts), 16):
        windows = [frames[start : start + window] for start in starts[first : first + 16]]
        probabilities = run_batch(reader.model, _batch(windows), views, None, reader.device)  # (window, B, K)
        results += (probabilities[-1] if reader.readout == "last" else probabilities.mean(dim=0)).unbind()
    return _runs(torch.stack(results), reader.task.classes, threshold, window // 2, len(frames))


def _runs(
    probabilities: Tensor,  # (windows, K)
    classes: list[str],
    threshold: float,
    offset: int,
    steps: int,
) -> list[TimedWord]:
    """Runs of one most probable word. A single window stands for the whole clip."""
    best, chosen = probabilities.max(dim=1)
    words: list[TimedWord] = []
    start = 0
    for end in range(1, len(chosen) + 1):
        if end == len(chosen) or chosen[end] != chosen[start]:
            surest = float(best[start:end].max())
            if surest >= threshold:
                words.append(TimedWord(classes[int(chosen[start])], start + offset, end + offset, surest))
            start = end
    if len(chosen) == 1 and words:
        return [TimedWord(words[0].text, 0, steps, words[0].probability)]
    return words


@dataclass(frozen=True)
class StreamStep:
    """What is read after one more frame.

    Attributes:
        frame: its number.
        text: the most probable word of the clip that began ``reader.frames`` frames ago at most; of characters, the
            sentence so far.
        probability: of that word; of characters, of the last word.
    """

    frame: int
    text: str
    probability: float


@torch.no_grad()
def read_stream(reader: TrainedReader, pictures: Iterable[Frames], crop: Crop | None = None) -> Iterator[StreamStep]:
    """Reads a stream of pictures, each uint8 (H, W, C), and says after each what it has read.

    The state of the model is carried from frame to frame; nothing is computed twice. A model of words starts anew after
    as many frames as its training clips had. Frames without a face are passed over.

    Raises:
        ValueError: the model reads a clip from both ends, frames spread over a clip, or optical flow.
    """
    if not reader.model.streams:
        raise ValueError(f"model: {reader.name} reads a clip from both ends; it cannot read a stream")
    if reader.whole_clips:
        raise ValueError(f"model: this {reader.name} reads frames spread over a whole clip; it cannot read a stream")
    if reader.flow:
        raise ValueError(f"model: this {reader.name} reads optical flow; it cannot read a stream")
    crop = crop or reader.crop or MouthCrop()
    recent: deque[Frames] = deque(maxlen=TRACKED)
    state: ModelState | None = None
    outputs: list[Tensor] = []
    words = isinstance(reader.task, WordTask)
    for number, picture in enumerate(pictures):
        recent.append(picture)
        try:
            mouth = crop(np.stack(recent))[-1].transpose(2, 0, 1)
        except NoFaceError:
            continue
        if words and len(outputs) == (reader.frames or WINDOW):
            state, outputs = None, []
        frame = torch.from_numpy(np.ascontiguousarray(mouth))[None, None].to(reader.device)  # (1, 1, C, H, W)
        view = center_crop(frame, reader.transform.validation_crop, reader.transform.size)
        output, state = reader.model(view, state)
        outputs.append(output[0, 0].float().softmax(dim=-1).cpu())
        if words:
            now = torch.stack(outputs).mean(dim=0) if reader.readout == "mean" else outputs[-1]
            yield StreamStep(number, reader.task.classes[int(now.argmax())], float(now.max()))
        else:
            read = decode_characters(torch.stack(outputs))
            yield StreamStep(number, " ".join(word.text for word in read), read[-1].probability if read else 1.0)


def _batch(clips: list[Frames]) -> Batch:
    frames = torch.from_numpy(np.stack(clips, axis=1))
    count = len(clips)
    return Batch(
        frames, torch.full((count,), len(frames)), torch.zeros(count, dtype=torch.int64), [""] * count, [""] * count
    )
