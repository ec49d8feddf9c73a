"""Gesture and action data: readers with official splits, optical flow, boxes, uniform sampling, procedural sets."""

import cv2
import numpy as np
import pytest
import torch

from fused_convlstm.data import (
    FLOW_LEVELS,
    FLOW_ZERO,
    HMDB51,
    UCF101,
    Batch,
    ClipDataset,
    IsoGD,
    Item,
    Jester,
    Problem,
    TrainTransform,
    VideoError,
    WholeFrame,
    WordFolders,
    center_crop,
    collate,
    load_frames,
    optical_flow,
    prepare,
    six_crops,
    split_by_name,
    uniform_frames,
    write_video,
)
from fused_convlstm.data.procedural import ACTIONS, GESTURES, generate_actors, generate_gestures
from fused_convlstm.data.procedural.actors import _Clothes, _draw_figure, _Pose, action_poses, actor_frames
from fused_convlstm.data.procedural.gestures import gesture_frames, gesture_path
from fused_convlstm.data.transforms import FLOW_STD, MEAN, STD, crop_squares
from fused_convlstm.data.video import read_pictures


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def found(reader):
    return [(entry.name, entry.split, entry.label) for entry in reader if isinstance(entry, Item)]


def problems(reader):
    return {entry.name: entry.reason for entry in reader if isinstance(entry, Problem)}


# --- readers -------------------------------------------------------------------------------------------------------


def test_jester(tmp_path):
    root = tmp_path / "20bn-jester-v1"
    for identity in ("1", "2"):
        touch(root / identity / "00001.jpg")
    touch(tmp_path / "jester-v1-train.csv", "1;Swiping Left\n3;Swiping Right\n\n4\n")
    touch(tmp_path / "jester-v1-validation.csv", "2;Stop Sign\n")
    assert found(Jester(root)) == [("1", "train", "Swiping Left"), ("2", "val", "Stop Sign")]
    assert problems(Jester(root)) == {
        "3": "its folder of frames is missing",
        "*train*.csv, line 4": "expected 'ID;label', got '4'",
    }
    (tmp_path / "jester-v1-validation.csv").unlink()
    with pytest.raises(ValueError, match=r"expected \*validation\*.csv in"):
        list(Jester(root))


def test_isogd(tmp_path):
    for split, name in (("train", "train"), ("valid", "valid"), ("test", "test")):
        touch(tmp_path / f"{split}_list.txt", f"{name}/001/M_00001.avi {name}/001/K_00001.avi 7\n")
        touch(tmp_path / name / "001/M_00001.avi")
    touch(tmp_path / "train/001/K_00001.avi")
    touch(tmp_path / "test_list.txt", "test/001/M_00001.avi test/001/K_00001.avi\n")
    reader = IsoGD(tmp_path)
    assert found(reader) == [("train/001/M_00001", "train", "007"), ("valid/001/M_00001", "val", "007")]
    assert list(problems(reader)) == ["test_list.txt, line 1"]
    depth = IsoGD(tmp_path, "depth")
    assert found(depth) == [("train/001/M_00001", "train", "007")]
    assert next(iter(depth)).video.name == "K_00001.avi"
    assert problems(depth)["valid/001/M_00001"] == "K_00001.avi is missing"
    with pytest.raises(ValueError, match="modality: expected"):
        IsoGD(tmp_path, "flow")


def test_ucf101(tmp_path):
    root = tmp_path / "UCF-101"
    for group in ("01", "08", "24"):
        touch(root / f"Archery/v_Archery_g{group}_c01.avi")
    lists = tmp_path / "ucfTrainTestlist"
    touch(lists / "trainlist01.txt", "Archery/v_Archery_g08_c01.avi 3\nArchery/v_Archery_g24_c01.avi 3\n")
    touch(lists / "testlist01.txt", "Archery/v_Archery_g01_c01.avi\nArchery/v_Archery_g02_c01.avi\n")
    assert found(UCF101(root)) == [
        ("Archery/v_Archery_g08_c01", "train", "Archery"),
        ("Archery/v_Archery_g24_c01", "val", "Archery"),
        ("Archery/v_Archery_g01_c01", "test", "Archery"),
    ]
    assert problems(UCF101(root)) == {"Archery/v_Archery_g02_c01": "v_Archery_g02_c01.avi is missing"}
    with pytest.raises(ValueError, match=r"expected trainlist02\.txt in"):
        list(UCF101(root, fold=2))
    with pytest.raises(ValueError, match="fold: expected 1, 2 or 3, got 4"):
        UCF101(root, fold=4)


def test_hmdb51(tmp_path):
    root = tmp_path / "hmdb51"
    films = [f"film{number}" for number in range(30)]
    lines = []
    for number, film in enumerate(films):
        touch(root / f"wave/{film}_wave_f_cm_np1_ba_goo_0.avi")
        lines.append(f"{film}_wave_f_cm_np1_ba_goo_0.avi {number % 3}")
    touch(root / "testTrainMulti_7030_splits/wave_test_split1.txt", "\n".join(lines) + "\nodd.avi 5\n")
    splits = {name: split for name, split, _ in found(HMDB51(root))}
    assert len(splits) == 20
    for number, film in enumerate(films):
        name = f"wave/{film}_wave_f_cm_np1_ba_goo_0"
        if number % 3 == 0:
            assert name not in splits
        else:
            val = number % 3 == 1 and split_by_name(film) == "val"
            assert splits[name] == ("test" if number % 3 == 2 else "val" if val else "train")
    assert "val" in splits.values()
    assert list(problems(HMDB51(root))) == ["wave_test_split1.txt, line 31"]


# --- folders of pictures, flow, boxes ------------------------------------------------------------------------------


def test_pictures(tmp_path):
    picture = np.zeros((20, 30, 3), dtype=np.uint8)
    picture[..., 0] = 180  # blue for OpenCV
    for number in (2, 1, 3):
        cv2.imwrite(str(tmp_path / f"{number:05d}.png"), picture + number)
    frames = read_pictures(tmp_path, rgb=True)
    assert frames.shape == (3, 20, 30, 3)
    assert frames[:, 0, 0].tolist() == [[1, 1, 181], [2, 2, 182], [3, 3, 183]]
    assert read_pictures(tmp_path).shape == (3, 20, 30, 1)
    (tmp_path / "00004.jpg").write_text("no picture")
    with pytest.raises(VideoError, match=r"00004\.jpg cannot be decoded"):
        read_pictures(tmp_path)
    cv2.imwrite(str(tmp_path / "00004.jpg"), picture[:10])
    with pytest.raises(VideoError, match="frame size changes"):
        read_pictures(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="no pictures"):
        read_pictures(tmp_path / "empty")


def test_jester_is_prepared(tmp_path):
    root = tmp_path / "set"
    for identity in ("1", "2"):
        (root / identity).mkdir(parents=True)
        for number in range(1, 9):
            cv2.imwrite(str(root / identity / f"{number:05d}.jpg"), np.full((100, 140, 3), 20 * number, dtype=np.uint8))
    touch(root / "train.csv", "1;Stop\n")
    touch(root / "validation.csv", "2;Go\n")
    report = prepare(Jester(root), tmp_path / "cache", crop=WholeFrame(64, 80), rgb=True, workers=0, progress=False)
    assert (report.done, report.resampled) == (2, 0)
    clip = ClipDataset(tmp_path / "cache", "train")[0]
    assert clip.frames.shape == (8, 3, 64, 80)
    assert (clip.text, clip.label) == ("Stop", 1)


def shifting_pattern(count=6, step=(3, -2), size=96):
    rng = np.random.default_rng(0)
    texture = cv2.GaussianBlur(rng.integers(0, 255, (2 * size, 2 * size)).astype(np.uint8), (0, 0), 2)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    starts = [(40 - t * step[1], 40 - t * step[0]) for t in range(count)]
    return np.stack([texture[y : y + size, x : x + size] for y, x in starts])[..., None]


@pytest.mark.parametrize("method", ["dis", "farneback"])
def test_flow_measures_motion(method):
    stored = optical_flow(shifting_pattern(), method)
    assert stored.shape == (6, 96, 96, 2)
    assert stored.dtype == np.uint8
    assert (stored[0] == FLOW_ZERO).all()
    motion = (stored[1:, 16:-16, 16:-16].astype(float) - FLOW_ZERO) / FLOW_LEVELS
    np.testing.assert_allclose(np.median(motion, axis=(1, 2)), [[3, -2]] * 5, atol=0.25)


def test_flow_is_cached_and_chosen(tmp_path):
    write_video(_folder(tmp_path) / "a.mp4", pattern_rgb())
    reader, crop = WordFolders(tmp_path / "set"), WholeFrame(96, 96)
    prepare(reader, tmp_path / "cache", crop=crop, rgb=True, flow="dis", workers=0, progress=False)
    both = ClipDataset(tmp_path / "cache", "train")
    assert both.flow
    frames = both[0].frames
    assert frames.shape == (6, 5, 96, 96)
    motion = (frames[1:, 3:].float() - FLOW_ZERO) / FLOW_LEVELS
    torch.testing.assert_close(motion.flatten(2).median(2).values, torch.tensor([[3.0, -2.0]] * 5), atol=0.35, rtol=0)
    picture = ClipDataset(tmp_path / "cache", "train", content="picture")
    flow = ClipDataset(tmp_path / "cache", "train", content="flow")
    assert (picture.flow, flow.flow) == (False, True)
    assert torch.equal(picture[0].frames, frames[:, :3])
    assert torch.equal(flow[0].frames, frames[:, 3:])
    direct = load_frames(tmp_path / "set/yes/train/a.mp4", crop, rgb=True, flow="dis")
    assert np.array_equal(direct, frames.numpy())
    with pytest.raises(ValueError, match="flow was dis, now None"):
        prepare(reader, tmp_path / "cache", crop=crop, rgb=True, workers=0, progress=False)
    with pytest.raises(ValueError, match="flow: expected None or one of dis, farneback"):
        prepare(reader, tmp_path / "other", crop=crop, flow="tvl1", workers=0, progress=False)
    prepare(reader, tmp_path / "plain", crop=crop, workers=0, progress=False)
    with pytest.raises(ValueError, match="without optical flow"):
        ClipDataset(tmp_path / "plain", "train", content="flow")
    with pytest.raises(ValueError, match="content: expected"):
        ClipDataset(tmp_path / "plain", "train", content="depth")


def _folder(tmp_path):
    folder = tmp_path / "set/yes/train"
    folder.mkdir(parents=True)
    return folder


def pattern_rgb():
    return [np.repeat(frame, 3, axis=-1) for frame in shifting_pattern()]


def test_boxes_follow_the_picture(tmp_path):
    folder = _folder(tmp_path)
    write_video(folder / "a.mp4", pattern_rgb())
    (folder / "a.boxes").write_text("\n".join(f"{number} 10 20 40" for number in range(6)))
    write_video(folder / "b.mp4", pattern_rgb())
    write_video(folder / "c.mp4", pattern_rgb())
    (folder / "c.boxes").write_text("1 2 3 4\n")
    write_video(folder / "d.mp4", pattern_rgb())
    (folder / "d.boxes").write_text("1 2 3 x\n")
    reader = WordFolders(tmp_path / "set")
    report = prepare(reader, tmp_path / "cache", crop=WholeFrame(48, 192), workers=0, progress=False)
    assert {name[-1]: reason[:20] for name, reason in report.skipped} == {
        "c": "c.boxes: expected 4 ",
        "d": "d.boxes: expected li",
    }
    first, second = ClipDataset(tmp_path / "cache", "train")
    expected = [[2.0 * number, 5.0, 40.0, 20.0] for number in range(6)]
    torch.testing.assert_close(first.boxes, torch.tensor(expected))
    assert second.boxes is None


# --- transforms ----------------------------------------------------------------------------------------------------


def numbered(lengths):
    """Clips whose frames tell their number by their brightness."""
    frames = torch.arange(max(lengths), dtype=torch.uint8)[:, None, None, None, None].repeat(1, len(lengths), 1, 72, 72)
    zeros = torch.zeros(len(lengths), dtype=torch.int64)
    return Batch(frames, torch.tensor(lengths), zeros, [""] * len(lengths), [""] * len(lengths))


def numbers(out):
    return ((out[:, :, 0, 20, 20] * STD + MEAN) * 255).round().int()


def test_uniform_sampling_with_jitter():
    batch = numbered([48] * 100)
    transform = TrainTransform(brightness=0, rotation=0, steps=16, uniform=True)
    seen = numbers(transform(batch, torch.Generator().manual_seed(0)))
    assert seen.shape == (16, 100)
    part = torch.arange(16)[:, None] * 3
    assert ((seen >= part) & (seen < part + 3)).all()
    assert all(set(row.tolist()) == {3 * k, 3 * k + 1, 3 * k + 2} for k, row in enumerate(seen))


def test_uniform_sampling_without_jitter():
    batch = uniform_frames(numbered([48, 8, 20]), 16)
    assert batch.lengths.tolist() == [16, 16, 16]
    shown = batch.frames[:, :, 0, 0, 0]
    assert shown[:, 0].tolist() == [3 * k + 1 for k in range(16)]
    assert shown[:, 1].tolist() == [k // 2 for k in range(16)]
    assert shown[:, 2].tolist() == [int((k + 0.5) * 20 / 16) for k in range(16)]
    with pytest.raises(ValueError, match="steps: expected"):
        uniform_frames(batch, 0)


def test_uniform_needs_steps():
    with pytest.raises(ValueError, match="with uniform=True"):
        TrainTransform(steps=None, uniform=True)


def flow_batch(vector):
    """A still grey picture and the same motion everywhere."""
    stored = torch.tensor([100.0, *(FLOW_ZERO + FLOW_LEVELS * v for v in vector)])
    frames = stored.to(torch.uint8)[None, None, :, None, None].repeat(3, 200, 1, 72, 72)
    return Batch(frames, torch.full((200,), 3), torch.zeros(200, dtype=torch.int64), [], [])


def test_flow_turns_with_the_picture():
    """A motion to the right by 2 pixels, turned counter-clockwise by 90 degrees and doubled in scale: up by 4."""
    batch = flow_batch((2.0, 0.0))
    ones = torch.ones(200)
    cut = crop_squares(batch.frames, 24 * ones, 48, degrees=90 * ones, flow=True)
    torch.testing.assert_close(cut[:, :, 0], torch.full((3, 200, 48, 48), 100.0))
    motion = (cut[0, 0, 1:, 24, 24] - FLOW_ZERO) / FLOW_LEVELS
    torch.testing.assert_close(motion, torch.tensor([0.0, -4.0]), atol=1e-3, rtol=0)
    mirrored = crop_squares(batch.frames, 48 * ones, 48, mirrored=ones.bool(), flow=True)
    motion = (mirrored[0, 0, 1:, 24, 24] - FLOW_ZERO) / FLOW_LEVELS
    torch.testing.assert_close(motion, torch.tensor([-2.0, 0.0]), atol=1e-3, rtol=0)


def test_flow_is_augmented_and_normalised():
    out = TrainTransform(steps=None, flow=True, crop=(48, 48))(flow_batch((4.0, 0.0)), torch.Generator().manual_seed(0))
    motion = out[0, :, 1:, 24, 24] * FLOW_STD / FLOW_LEVELS  # (200, 2), pixels
    torch.testing.assert_close(motion.norm(dim=1), torch.full((200,), 4.0), atol=1e-3, rtol=0)
    assert 50 < int((motion[:, 0] < 0).sum()) < 150
    assert motion[:, 1].abs().max() > 0.5
    brightness = out[0, :, 0, 24, 24]
    assert brightness.max() - brightness.min() > 0.1
    still = TrainTransform(steps=None, flow=True)(flow_batch((0.0, 0.0)), torch.Generator().manual_seed(0))
    assert still[:, :, 1:].abs().max() < 1e-5


def test_flow_in_test_crops():
    frames = flow_batch((4.0, 2.0)).frames
    view = center_crop(frames, 48, 48, flow=True)[0, 0, 1:, 0, 0]
    torch.testing.assert_close(view, torch.tensor([4.0, 2.0]) * FLOW_LEVELS / FLOW_STD)
    views = six_crops(frames, (48, 48), 48, flow=True)
    assert len(views) == 4
    torch.testing.assert_close(views[1][0, 0, 1:, 0, 0], torch.tensor([-4.0, 2.0]) * FLOW_LEVELS / FLOW_STD)
    assert torch.equal(views[1][:, :, 0], views[0][:, :, 0].flip(-1))


# --- procedural sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forward", "backward"), list(zip(list(GESTURES)[::2], list(GESTURES)[1::2], strict=True)))
def test_gestures_come_in_reversed_pairs(forward, backward):
    """The changed quantity goes one way in one class, the other way in the other, through the same range."""
    changed, amount = GESTURES[forward]
    assert GESTURES[backward] == (changed, -amount)
    ranges = []
    for label, sign in ((forward, np.sign(amount)), (backward, -np.sign(amount))):
        paths = [gesture_path(label, np.random.default_rng(seed))[changed] for seed in range(200)]
        assert all(sign * (path[-1] - path[0]) > 0 for path in paths)
        ranges.append(np.percentile(np.concatenate(paths), [5, 25, 75, 95]))
    spread = ranges[0][-1] - ranges[0][0]
    np.testing.assert_allclose(ranges[0], ranges[1], atol=0.1 * spread)


def test_gesture_is_seen_in_the_flow():
    frames = np.stack(list(gesture_frames("swipe_right", np.random.default_rng(0))))
    assert frames.shape == (32, 128, 128, 3)
    motion = optical_flow(frames).astype(float) - FLOW_ZERO
    moving = np.abs(motion).max(axis=-1) > 6
    assert motion[moving][:, 0].mean() > 4
    assert abs(motion[moving][:, 1].mean()) < abs(motion[moving][:, 0].mean()) / 2


@pytest.mark.parametrize(("forward", "backward"), list(zip(ACTIONS[::2], ACTIONS[1::2], strict=True)))
def test_actions_come_in_reversed_pairs(forward, backward):
    def summary(label):
        poses = [action_poses(label, np.random.default_rng(seed)) for seed in range(200)]
        values = np.array([[(pose.x, pose.bent, pose.raised, pose.lean) for pose in clip] for clip in poses])
        return np.quantile(values, [0.1, 0.5, 0.9], axis=(0, 1)), (values[:, -1] - values[:, 0])

    (shapes, change), (other_shapes, other_change) = summary(forward), summary(backward)
    np.testing.assert_allclose(shapes, other_shapes, atol=0.13)
    moved = np.abs(change).mean(axis=0).argmax()
    assert (np.sign(change[:, moved]) == np.sign(change[0, moved])).all()
    assert (np.sign(other_change[:, moved]) == -np.sign(change[0, moved])).all()


def test_box_is_that_of_the_drawn_figure():
    rng = np.random.default_rng(0)
    white = _Clothes([255.0] * 3, [255.0] * 3, [255.0] * 3)
    for _ in range(20):
        pose = _Pose(rng.uniform(0.3, 0.7), *rng.uniform(0, 1, 2), rng.uniform(-1, 1), rng.uniform(0, 6))
        canvas = np.zeros((384, 384, 3), dtype=np.uint8)
        corners = _draw_figure(canvas, pose, 1.0, 0.9, white, 64, 256)
        rows, columns = np.nonzero(canvas[..., 0] > 127)
        drawn = [[columns.min(), rows.min()], [columns.max() + 1, rows.max() + 1]]
        np.testing.assert_allclose(corners, drawn, atol=3)


@pytest.mark.parametrize("label", ACTIONS)
def test_action_is_seen_in_the_flow(label):
    """With the camera's motion taken out, what moves is the actor, and not who stands still."""
    frames, boxes = actor_frames(label, np.random.default_rng(1))
    stack = np.stack(frames)
    assert stack.shape == (30, 128, 128, 3)
    assert boxes.shape == (30, 4)
    assert (boxes[:, 2:] > 10).all()
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 128).all()
    motion = optical_flow(stack).astype(float) - FLOW_ZERO
    motion -= np.median(motion, axis=(1, 2), keepdims=True)
    energy = np.abs(motion).sum(axis=-1)[:, 16:-16, 16:-16]
    inside = np.zeros(stack.shape[:3], dtype=bool)
    for t, (x, y, width, height) in enumerate(boxes.round().astype(int)):
        inside[t, y : y + height, x : x + width] = True
    inside = inside[:, 16:-16, 16:-16]
    strong = energy > 8  # more than a pixel per frame
    assert strong[inside].mean() > 3 * strong[~inside].mean()


@pytest.mark.parametrize("label", ACTIONS)
def test_who_acts_moves_from_head_to_foot(label):
    """In every action both halves of the actor's box move, and nothing does outside of it."""
    frames, boxes = actor_frames(label, np.random.default_rng(2), camera=0.0)
    motion = np.abs(optical_flow(np.stack(frames)).astype(float) - FLOW_ZERO).sum(axis=-1)
    energy = np.zeros(3)  # mean motion per pixel of the upper half, the lower half, elsewhere
    for moved, (x, y, width, height) in zip(motion[1:], boxes[1:].round().astype(int), strict=True):
        middle = y + height // 2
        outside = np.ones_like(moved, dtype=bool)
        outside[max(y - 8, 0) : y + height + 8, max(x - 8, 0) : x + width + 8] = False
        upper, lower = moved[y:middle, x : x + width], moved[middle : y + height, x : x + width]
        energy += [upper.mean(), lower.mean(), moved[outside].mean()]
    assert (energy[:2] > 10 * energy[2]).all()


def test_the_camera_can_stand_still():
    """Who sits down stays where the feet are; only the camera moves them in the picture."""
    for camera, moved in ((0.0, False), (1.0, True)):
        _, boxes = actor_frames("sit_down", np.random.default_rng(0), camera)
        feet = boxes[:, 1] + boxes[:, 3]
        assert (np.ptp(feet) > 1) == moved


def test_generated_sets_are_read_and_prepared(tmp_path):
    for make, count, name in ((generate_gestures, 10, "gestures"), (generate_actors, 8, "actors")):
        folder = make(tmp_path / name, 6, workers=0, progress=False)
        before = {path: path.read_bytes() for path in folder.rglob("*.mp4")}
        assert len(before) == 6 * count
        victim = sorted(before)[7]
        victim.unlink()
        make(folder, 6, workers=0, progress=False)
        assert victim.read_bytes() == before[victim]
        with pytest.raises(ValueError, match="has a set made with"):
            make(folder, 6, seed=1, workers=0, progress=False)
        with pytest.raises(ValueError, match="clips_per_class: expected 6 or more"):
            make(folder, 5, workers=0)
    with pytest.raises(ValueError, match="camera: expected a factor of at least 0"):
        generate_actors(tmp_path / "other", 6, camera=-1.0)
    crop = WholeFrame(72, 72)
    reader = WordFolders(tmp_path / "actors")
    report = prepare(reader, tmp_path / "cache", crop=crop, rgb=True, flow="dis", workers=0, progress=False)
    assert (report.done, report.skipped) == (48, [])
    dataset = ClipDataset(tmp_path / "cache", "test")
    assert dataset.classes == sorted(ACTIONS)
    assert len(dataset) == 8
    assert dataset[0].boxes.shape == (30, 4)
    batch = collate([dataset[k] for k in range(3)])
    out = TrainTransform(crop=(64, 72), size=64, steps=16, uniform=True, flow=dataset.flow)(batch)
    assert out.shape == (16, 3, 5, 64, 64)
