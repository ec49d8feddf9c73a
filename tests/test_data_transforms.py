"""Crops and augmentation."""

import pytest
import torch

from fused_convlstm.data import Batch, Clip, TrainTransform, center_crop, collate, cut_words, normalise, six_crops
from fused_convlstm.data.transforms import MEAN, STD, crop_squares


def random_batch(lengths=(29, 29, 29), channels=1, side=80):
    generator = torch.Generator().manual_seed(0)
    clips = [
        Clip(
            torch.randint(0, 256, (length, channels, side, side), generator=generator, dtype=torch.uint8),
            i,
            "w",
            str(i),
        )
        for i, length in enumerate(lengths)
    ]
    return collate(clips)


def still_batch(count=6, steps=29):
    """Every clip is one picture, repeated."""
    generator = torch.Generator().manual_seed(1)
    picture = torch.randint(0, 256, (1, count, 1, 80, 80), generator=generator, dtype=torch.uint8)
    zeros = torch.zeros(count, dtype=torch.int64)
    return Batch(picture.expand(steps, -1, -1, -1, -1), zeros + steps, zeros, [""] * count, [""] * count)


def test_collate_pads_with_zeros():
    batch = random_batch((5, 3))
    assert batch.frames.shape == (5, 2, 1, 80, 80)
    assert batch.frames.dtype == torch.uint8
    assert batch.lengths.tolist() == [5, 3]
    assert batch.labels.tolist() == [0, 1]
    assert not batch.frames[3:, 1].any()
    assert batch.frames[3:, 0].any()


def test_collate_errors():
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    with pytest.raises(ValueError, match=r"one \(C, H, W\)"):
        collate([Clip(torch.zeros(2, 1, 8, 8), 0, "", ""), Clip(torch.zeros(2, 3, 8, 8), 0, "", "")])


def test_crop_without_scaling_is_exact():
    batch = random_batch()
    cut = crop_squares(batch.frames, torch.full((3,), 48.0), 48)
    torch.testing.assert_close(cut, batch.frames[..., 16:64, 16:64].float(), atol=0.02, rtol=0)
    moved = crop_squares(batch.frames, torch.full((3,), 48.0), 48, offsets=torch.tensor([[3.0, -2.0]]).expand(3, 2))
    torch.testing.assert_close(moved, batch.frames[..., 14:62, 19:67].float(), atol=0.02, rtol=0)


def test_crop_mirrors_and_turns():
    batch = random_batch()
    plain = crop_squares(batch.frames, torch.full((3,), 48.0), 48)
    mirrored = crop_squares(batch.frames, torch.full((3,), 48.0), 48, mirrored=torch.tensor([True, False, True]))
    torch.testing.assert_close(mirrored[:, 0], plain[:, 0].flip(-1), atol=0.02, rtol=0)
    torch.testing.assert_close(mirrored[:, 1], plain[:, 1], atol=0.02, rtol=0)
    turned = crop_squares(batch.frames, torch.full((3,), 48.0), 48, degrees=torch.tensor([90.0, 0.0, -90.0]))
    torch.testing.assert_close(turned[:, 0], plain[:, 0].rot90(1, (-2, -1)), atol=0.02, rtol=0)
    torch.testing.assert_close(turned[:, 2], plain[:, 2].rot90(-1, (-2, -1)), atol=0.02, rtol=0)


def test_crop_scales():
    """A ramp stays a ramp: 64 pixels on 32 have twice the slope, and the same middle."""
    ramp = torch.arange(80).expand(1, 1, 1, 80, 80).to(torch.uint8)
    cut = crop_squares(ramp, torch.tensor([64.0]), 32)[0, 0, 0, 0]
    torch.testing.assert_close(cut, 39.5 + 2.0 * (torch.arange(32) - 15.5), atol=0.01, rtol=0)


def test_one_draw_per_clip():
    """A still clip stays still, different clips are treated differently."""
    out = TrainTransform()(still_batch(), torch.Generator().manual_seed(0))
    assert out.shape == (24, 6, 1, 48, 48)
    torch.testing.assert_close(out, out[:1].expand_as(out))
    copies = still_batch(1).frames.expand(-1, 6, -1, -1, -1)
    zeros = torch.zeros(6, dtype=torch.int64)
    same = TrainTransform()(Batch(copies, zeros + 29, zeros, [], []), torch.Generator().manual_seed(0))
    assert all((same[0, 0] - same[0, other]).abs().max() > 0.1 for other in range(1, 6))


def test_generator_decides():
    batch = random_batch()
    transform = TrainTransform()
    first = transform(batch, torch.Generator().manual_seed(5))
    again = transform(batch, torch.Generator().manual_seed(5))
    other = transform(batch, torch.Generator().manual_seed(6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_subsequences_are_consecutive_and_within_the_clip():
    """Frames numbered by their brightness, no other change."""
    steps = torch.arange(29, dtype=torch.uint8)[:, None, None, None, None].expand(29, 200, 1, 80, 80)
    batch = Batch(steps, torch.full((200,), 29), torch.zeros(200), [], [])
    out = TrainTransform(brightness=0, rotation=0)(batch, torch.Generator().manual_seed(0))
    seen = ((out[:, :, 0, 20, 20] * STD + MEAN) * 255).round().int()  # (24, 200)
    assert torch.equal(seen, seen[:1] + torch.arange(24, dtype=torch.int32)[:, None])
    assert sorted(set(seen[0].tolist())) == list(range(6))


def test_short_clips_and_padding():
    batch = random_batch((29, 10, 24))
    out = TrainTransform()(batch, torch.Generator().manual_seed(0))
    assert out.shape[0] == 24
    assert not out[10:, 1].any()
    assert out[:10, 1].abs().amin((-3, -2, -1)).ne(0).any()
    assert out[:, 2].flatten(1).any(1).all()
    whole = TrainTransform(steps=None)(batch, torch.Generator().manual_seed(0))
    assert whole.shape[0] == 29
    assert not whole[24:, 2].any()


def test_brightness_stays_within_bounds():
    grey = torch.full((1, 400, 1, 80, 80), 100, dtype=torch.uint8)
    batch = Batch(grey, torch.ones(400, dtype=torch.int64), torch.zeros(400), [], [])
    out = TrainTransform(steps=None, brightness=0.1)(batch, torch.Generator().manual_seed(0))
    gain = (out[0, :, 0, 0, 0] * STD + MEAN) * 255 / 100
    assert 0.9 - 1e-4 <= gain.min() < 0.91
    assert 1.09 < gain.max() <= 1.1 + 1e-4


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_channels_are_treated_alike(channels):
    one = random_batch()
    many = Batch(one.frames.expand(-1, -1, channels, -1, -1), one.lengths, one.labels, one.texts, one.names)
    expected = TrainTransform()(one, torch.Generator().manual_seed(3))
    actual = TrainTransform()(many, torch.Generator().manual_seed(3))
    torch.testing.assert_close(actual, expected.expand(-1, -1, channels, -1, -1))


def test_six_crops():
    batch = random_batch()
    views = six_crops(batch.frames)
    assert [tuple(view.shape) for view in views] == [(29, 3, 1, 48, 48)] * 6
    torch.testing.assert_close(views[0], normalise(batch.frames[..., 16:64, 16:64]), atol=1e-3, rtol=0)
    for plain, mirrored in zip(views[::2], views[1::2], strict=True):
        assert torch.equal(mirrored, plain.flip(-1))
    torch.testing.assert_close(views[2], center_crop(batch.frames))
    assert not torch.equal(views[2], views[4])


def test_normalise():
    frames = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1, 1)
    torch.testing.assert_close(normalise(frames).flatten(), torch.tensor([-MEAN / STD, (1 - MEAN) / STD]))
    kept = torch.full((2, 1, 1, 1, 1), 7.0)
    normalise(kept)
    assert kept.flatten().tolist() == [7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": (64, 48)}, "crop: expected"),
        ({"size": 0}, "size: expected"),
        ({"steps": 0}, "steps: expected"),
        ({"flip": 2}, "flip: expected"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**arguments)


SENTENCE = Clip(
    torch.arange(40, dtype=torch.uint8)[:, None, None, None],
    -1,
    "bin blue at f",
    "s",
    (("bin", 2, 10), ("blue", 10, 20), ("at", 20, 22), ("f", 23, 38)),
)


def test_cut_words():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        cut = cut_words(SENTENCE, 12, generator)
        assert len(cut.frames) <= 12
        assert cut.text == " ".join(word for word, _, _ in cut.words)
        original = {word: (start, end) for word, start, end in SENTENCE.words}
        for word, start, end in cut.words:
            assert (cut.frames[start].item(), cut.frames[end - 1].item() + 1) == original[word]
        seen.add((cut.text, cut.frames[0].item(), cut.frames[-1].item() + 1))
    in_pauses = {("bin", begin, 10) for begin in (0, 1, 2)} | {("blue at", 10, 22), ("at", 20, 22), ("at", 20, 23)}
    assert seen == in_pauses, "as many words as fit, and pauses as far as there is room"


def test_cut_words_takes_all_or_the_shortest():
    generator = torch.Generator().manual_seed(0)
    assert "bin blue at f" in {cut_words(SENTENCE, 36, generator).text for _ in range(30)}
    assert {cut_words(SENTENCE, 1, generator).text for _ in range(9)} == {"at"}
    assert {len(cut_words(SENTENCE, 1, generator).frames) for _ in range(9)} == {2}, "nothing but the word"
    with pytest.raises(ValueError, match="word boundaries"):
        cut_words(Clip(SENTENCE.frames, -1, "bin", "s"), 8)
