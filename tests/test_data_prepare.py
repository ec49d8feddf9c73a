"""Preparing a cache: whole, in parts, from damaged files, after a kill, on a full disk."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fused_convlstm.data import (
    GRID,
    LRS,
    LRW,
    BoxCrop,
    ClipDataset,
    LRWCrops,
    MouthCrop,
    PrepareError,
    WholeFrame,
    WordFolders,
    load_frames,
    optical_flow,
    prepare,
    procedural,
    read_video,
    write_video,
)
from fused_convlstm.data.files import complete_file, locked


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Two words of six clips each, of two speakers."""
    return procedural.generate(
        tmp_path_factory.mktemp("spoken") / "set", ["DEPOT", "OMIT"], 6, 2, workers=0, progress=False
    )


@pytest.fixture(scope="module")
def cache(spoken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "words"
    report = prepare(LRW(spoken), folder, workers=0, progress=False)
    assert (report.done, report.skipped, report.resampled) == (12, [], 0)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def grey_video(path, count=10, fps=25, size=(48, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, [np.full(size, 20 + 5 * number, dtype=np.uint8) for number in range(count)], fps)
    return path


def test_dataset(cache):
    train = ClipDataset(cache, "train")
    assert train.classes == ["DEPOT", "OMIT"]
    assert [len(ClipDataset(cache, split)) for split in ("train", "val", "test")] == [8, 2, 2]
    assert train.labels == [0] * 4 + [1] * 4
    assert train.lengths == [29] * 8
    clip = train[5]
    assert clip.frames.shape == (29, 1, 80, 80)
    assert clip.frames.dtype == torch.uint8
    assert (clip.label, clip.text, clip.name) == (1, "OMIT", "OMIT/OMIT_00002")
    ((word, start, end),) = clip.words
    assert word == "OMIT"
    assert start + end == pytest.approx(29, abs=1)


def test_dataset_is_used_by_workers(cache):
    loader = torch.utils.data.DataLoader(ClipDataset(cache, "train"), batch_size=None, num_workers=1)
    assert [clip.text for clip in loader] == ["DEPOT"] * 4 + ["OMIT"] * 4


def test_dataset_classes(cache):
    train = ClipDataset(cache, "train", classes=["OMIT"])
    assert train.classes == ["OMIT"]
    assert [clip.label for clip in train] == [0] * 4
    assert ClipDataset(cache, "train", classes=["OMIT", "DEPOT"]).labels == [1] * 4 + [0] * 4
    with pytest.raises(ValueError, match=r"classes: .* has the words \['DEPOT', 'OMIT'\], not \['SOUP'\]"):
        ClipDataset(cache, "train", classes=["SOUP"])
    with pytest.raises(ValueError, match="each word once"):
        ClipDataset(cache, "train", classes=["OMIT", "OMIT"])
    with pytest.raises(ValueError, match="split: expected one of"):
        ClipDataset(cache, "trian")


def test_no_cache(tmp_path):
    with pytest.raises(ValueError, match="cache_dir: expected a folder made by prepare"):
        ClipDataset(tmp_path, "train")


def test_load_frames_equals_the_cache(spoken, cache):
    frames = load_frames(spoken / "OMIT/train/OMIT_00002.mp4")
    assert np.array_equal(frames, ClipDataset(cache, "train")[5].frames.numpy())


def test_again_changes_nothing(spoken, cache):
    before = contents(cache)
    assert prepare(LRW(spoken), cache, workers=0, progress=False).done == 12
    assert contents(cache) == before


def test_other_parameters_are_refused(spoken, cache):
    before = contents(cache)
    with pytest.raises(ValueError, match=r"prepared with other parameters: crop was .*'size': 80.* now .*'size': 96"):
        prepare(LRW(spoken), cache, crop=MouthCrop(size=96), workers=0, progress=False)
    with pytest.raises(ValueError, match="reader was"):
        prepare(WordFolders(spoken), cache, workers=0, progress=False)
    assert contents(cache) == before


def test_foreign_folder_is_refused(spoken, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected a cache or an empty folder"):
        prepare(LRW(spoken), tmp_path, workers=0, progress=False)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_processes_give_the_same_cache(spoken, cache, tmp_path):
    prepare(LRW(spoken), tmp_path, workers=2, progress=False)
    assert contents(tmp_path) == contents(cache)


def test_kill_and_resume(spoken, cache, tmp_path):
    """SIGKILL in the middle: workers end too, no clip is half written, and going on gives the unbroken cache."""
    script = textwrap.dedent(f"""
        from fused_convlstm.data import LRW, prepare
        if __name__ == "__main__":
            prepare(LRW({str(spoken)!r}), {str(tmp_path)!r}, workers=2, progress=False)
    """)
    (tmp_path.parent / "run.py").write_text(script)
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(root)])}
    with subprocess.Popen([sys.executable, str(tmp_path.parent / "run.py")], env=environment) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("clips/**/*.npz")):
            assert process.poll() is None, "ended before it wrote a clip"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert children
    while any(is_running(child) for child in children):
        assert time.monotonic() < deadline, "a worker lives on after its parent was killed"
        time.sleep(0.05)
    written = {name: data for name, data in contents(tmp_path).items() if name.endswith(".npz")}
    assert 0 < len(written) < 12
    assert all(contents(cache)[name] == data for name, data in written.items())
    with pytest.raises(ValueError, match="was not finished"):
        ClipDataset(tmp_path, "train")
    (tmp_path / "clips/train/DEPOT/DEPOT_00001.npz.77.unfinished").write_bytes(b"half")
    assert prepare(LRW(spoken), tmp_path, workers=0, progress=False).done == 12
    assert contents(tmp_path) == contents(cache)


def children_of(pid):
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    ).stdout
    return [int(child) for child in listing.split()]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_dead_worker(spoken, tmp_path):
    with pytest.raises(PrepareError, match=r"a worker process died.*the same call continues"):
        prepare(LRW(spoken), tmp_path, crop=DeadlyCrop(), workers=1, progress=False)


class DeadlyCrop(MouthCrop):
    """A crop that a process does not survive."""

    def __call__(self, frames):
        os._exit(9)


def test_problems_are_listed_and_skipped(spoken, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(spoken, root)
    folder = root / "DEPOT/train"
    (folder / "DEPOT_00001.txt").unlink()
    (folder / "DEPOT_00002.mp4").write_text("no video")
    whole = (folder / "DEPOT_00003.mp4").read_bytes()
    (folder / "DEPOT_00003.mp4").write_bytes(whole[: len(whole) // 2])
    grey_video(folder / "DEPOT_00004.mp4", count=29, size=(256, 256))
    grey_video(root / "DEPOT/val/DEPOT_00005.mp4", count=1, size=(256, 256))
    (root / "DEPOT/test/DEPOT_00006.mp4").write_bytes(b"")
    (root / "OMIT/train/notes.pdf").write_bytes(b"")
    report = prepare(LRW(root), tmp_path / "cache", workers=0, progress=False)
    reasons = dict(report.skipped)
    assert report.done == 6
    assert reasons["DEPOT/DEPOT_00001"] == "DEPOT_00001.txt is missing"
    assert reasons["DEPOT/DEPOT_00002"].startswith("cannot be decoded at its start")
    assert reasons["DEPOT/DEPOT_00003"].startswith(("cannot be decoded", "damaged"))
    assert reasons["DEPOT/DEPOT_00004"] == "a face in 0 of 7 frames looked at"
    assert reasons["DEPOT/DEPOT_00005"] == "too short: 1 frame, at least 5 are wanted"
    assert reasons["DEPOT/DEPOT_00006"].startswith("cannot be decoded at its start")
    assert len(reasons) == 6
    assert len(ClipDataset(tmp_path / "cache", "train")) == 4
    # a file put right is taken in by the next run
    shutil.copy(spoken / "DEPOT/train/DEPOT_00002.mp4", folder)
    assert prepare(LRW(root), tmp_path / "cache", workers=0, progress=False).done == 7


def test_damaged_clip_in_the_cache(spoken, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    victim = tmp_path / "cache/clips/train/DEPOT/DEPOT_00001.npz"
    victim.write_bytes(victim.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"DEPOT_00001.npz' cannot be read .* prepare again"):
        ClipDataset(tmp_path / "cache", "train")[0]
    prepare(LRW(spoken), tmp_path / "cache", workers=0, progress=False)
    assert contents(tmp_path / "cache") == contents(cache)


def test_nothing_found(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=r"no clips in .* with the layout of LRW"):
        prepare(LRW(tmp_path / "set"), tmp_path / "cache", workers=0, progress=False)
    assert not (tmp_path / "cache").exists()


def test_two_clips_of_one_name(tmp_path):
    grey_video(tmp_path / "set/yes/a.mp4")
    grey_video(tmp_path / "set/yes/a.avi")
    with pytest.raises(ValueError, match="two clips are named 'yes/a'"):
        prepare(WordFolders(tmp_path / "set"), tmp_path / "cache", workers=0, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": -1}, "workers: expected"),
        ({"fps": 0}, "fps: expected"),
        ({"min_frames": 0}, "min_frames: expected"),
    ],
)
def test_bad_arguments(spoken, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(LRW(spoken), tmp_path, **{"workers": 0, **arguments})


def test_no_space_left(spoken, cache, tmp_path, monkeypatch):
    """The third clip does not fit: an error that says so, no partial file, and the rest follows when there is space."""
    real = np.savez_compressed
    calls = []

    def savez(file, **arrays):
        calls.append(1)
        if len(calls) == 3:
            file.write(b"half a clip")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file, **arrays)

    monkeypatch.setattr(np, "savez_compressed", savez)
    with pytest.raises(
        PrepareError, match=r"No space left on device; 2 of 12 clips are prepared, the same call continues"
    ):
        prepare(LRW(spoken), tmp_path, workers=0, progress=False)
    assert sorted(Path(name).suffix for name in contents(tmp_path)) == [".json", ".npz", ".npz"]
    assert prepare(LRW(spoken), tmp_path, workers=0, progress=False).done == 12
    assert contents(tmp_path) == contents(cache)


def test_write_limit_in_a_worker(spoken, tmp_path):
    """A real failure in the middle of a file, in another process: files may not grow beyond 20 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with pytest.raises(PrepareError, match="File too large; 0 of 12 clips are prepared"):
            prepare(LRW(spoken), tmp_path, workers=1, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(contents(tmp_path)) == ["cache.json"]


def test_cache_folder_cannot_be_made(spoken, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PrepareError, match="cannot write in"):
        prepare(LRW(spoken), tmp_path / "file/cache", workers=0, progress=False)


def test_windows_and_word_times(tmp_path):
    """GRID words are cut in windows that stay within the video; the words' frames are those of the alignment."""
    for folder in ("video/s1", "align/s1"):
        (tmp_path / "grid" / folder).mkdir(parents=True)
    pictures = [np.full((48, 64), 20 + 3 * number, dtype=np.uint8) for number in range(75)]
    write_video(tmp_path / "grid/video/s1/bbaf2n.mp4", pictures)
    lines = ["0 2000 sil", "2000 8000 bin", "41000 47250 two", "70000 75000 now"]
    (tmp_path / "grid/align/s1/bbaf2n.align").write_text("\n".join(lines))
    reader = GRID(tmp_path / "grid")
    assert prepare(reader, tmp_path / "words", crop=BoxCrop(8, 0, 48, 48), workers=0, progress=False).done == 3
    first, middle, last = ClipDataset(tmp_path / "words", "train")
    starts = [round((float(clip.frames[0].float().mean()) - 20) / 3) for clip in (first, middle, last)]
    assert starts == [0, 30, 46]
    assert [len(clip.frames) for clip in (first, middle, last)] == [29, 29, 29]
    assert (first.words, middle.words, last.words) == ((("bin", 2, 8),), (("two", 11, 17),), (("now", 24, 29),))

    alone = GRID(tmp_path / "grid", num_frames=None)
    crop = BoxCrop(8, 0, 48, 48)
    assert prepare(alone, tmp_path / "alone", crop=crop, workers=0, progress=False).done == 3
    assert [len(clip.frames) for clip in ClipDataset(tmp_path / "alone", "train")] == [6, 6, 5]

    sentences = GRID(tmp_path / "grid", unit="sentence")
    prepare(sentences, tmp_path / "sentences", crop=crop, workers=0, progress=False)
    dataset = ClipDataset(tmp_path / "sentences", "train")
    assert dataset.classes == []
    assert (dataset[0].label, dataset[0].text, len(dataset[0].frames)) == (-1, "bin two now", 75)
    assert dataset[0].words[1] == ("two", 41, 47)


def test_alignment_beyond_the_video(tmp_path):
    grey_video(tmp_path / "grid/s1/bbaf2n.mp4", count=40)
    (tmp_path / "grid/s1/bbaf2n.align").write_text("2000 8000 bin\n41000 47000 two\n36000 44000 one")
    report = prepare(GRID(tmp_path / "grid"), tmp_path / "cache", crop=WholeFrame(), workers=0, progress=False)
    assert report.done == 1
    assert dict(report.skipped) == {
        "s1/bbaf2n-1-two": "frames 41 to 47 are wanted, the video has 40",
        "s1/bbaf2n-2-one": "frames 36 to 44 are wanted, the video has 40",
    }


def test_other_frame_rate_is_resampled_and_counted(tmp_path):
    grey_video(tmp_path / "set/yes/a.mp4", count=20, fps=50)
    grey_video(tmp_path / "set/yes/b.mp4", count=20, fps=25)
    reader = WordFolders(tmp_path / "set")
    report = prepare(reader, tmp_path / "cache", crop=WholeFrame(48, 64), workers=0, progress=False)
    assert (report.done, report.resampled) == (2, 1)
    assert sorted(
        length
        for split in ("train", "val", "test")
        if list((tmp_path / "cache/clips").glob(split))
        for length in ClipDataset(tmp_path / "cache", split).lengths
    ) == [10, 20]


def test_preprocessed_crops(tmp_path):
    folder = tmp_path / "set/ABOUT/train"
    folder.mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (29, 96, 96), dtype=np.uint8)
    np.savez(folder / "ABOUT_00001.npz", data=frames)
    np.savez(folder / "ABOUT_00002.npz", other=frames)
    np.savez(folder / "ABOUT_00003.npz", data=frames.astype(np.float32))
    (folder / "ABOUT_00004.npz").write_bytes(b"PK no archive")
    np.savez(folder / "ABOUT_00005.npz", data=np.array([{}], dtype=object))
    np.savez(folder / "ABOUT_00006.npz", data=frames[:, ::2, ::2])
    report = prepare(LRWCrops(tmp_path / "set"), tmp_path / "cache", workers=0, progress=False)
    assert report.done == 2
    assert [name[-1] for name, _ in report.skipped] == ["2", "3", "4", "5"]
    train = ClipDataset(tmp_path / "cache", "train")
    assert np.array_equal(train[0].frames[:, 0].numpy(), frames[:, 8:88, 8:88])
    assert train[1].frames.shape == (29, 1, 80, 80)


def test_boxes_and_whole_frames(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 256, 2, dtype=np.uint8), (96, 128))
    write_video(tmp_path / "a.mp4", [ramp] * 3, crf=0)
    frames, _ = read_video(tmp_path / "a.mp4")
    box = BoxCrop(32, 16, 40, 40, size=40)(frames)
    assert np.array_equal(box, frames[:, 16:56, 32:72])
    outside = BoxCrop(-10, -10, 20, 20, size=20)(frames)
    assert np.array_equal(outside[:, 10:, 10:], frames[:, :10, :10])
    assert (outside[:, :, :10] == frames[0, 0, 0]).all()
    half = WholeFrame(48, 64)(frames)
    expected = frames.reshape(3, 48, 2, 64, 2).mean((2, 4))
    assert np.abs(half[..., 0] - expected).max() <= 1
    for crop, arguments in (
        (BoxCrop, (0, 0, 0, 10)),
        (BoxCrop, (0, 0, 9, 9, 0)),
        (WholeFrame, (0, 9)),
        (MouthCrop, (0,)),
    ):
        with pytest.raises(ValueError, match=r"expected (positive pixels|more than 0), got"):
            crop(*arguments)


def test_colour_cache(spoken, tmp_path):
    prepare(LRW(spoken), tmp_path, crop=WholeFrame(64, 64), rgb=True, workers=0, progress=False)
    frames = ClipDataset(tmp_path, "val")[0].frames
    assert frames.shape == (29, 3, 64, 64)
    assert not torch.equal(frames[:, 0], frames[:, 2])


def quick(reader, cache, **options):
    """The whole pictures, in this process."""
    return prepare(reader, cache, crop=WholeFrame(48, 64), workers=0, progress=False, **options)


def write_sentence(path, *words):
    path.write_text("Text: SOME WORDS\nWORD START END SCORE\n" + "".join(f"{word}\n" for word in words))


def test_a_corrected_text_makes_its_clips_again(tmp_path):
    """Times, words and part of a clip, of the recording that was corrected and of no other."""
    for name in ("00001", "00002"):
        grey_video(tmp_path / f"lrs/pretrain/p/{name}.mp4", count=40)
        write_sentence(tmp_path / f"lrs/pretrain/p/{name}.txt", "HELLO 0.2 0.5 8", "WORLD 0.5 0.9 9")
    assert quick(LRS(tmp_path / "lrs"), tmp_path / "cache").done == 2
    before = contents(tmp_path / "cache")
    write_sentence(tmp_path / "lrs/pretrain/p/00001.txt", "HELLO 0.4 0.6 8", "THERE 0.6 1.2 9")
    assert quick(LRS(tmp_path / "lrs"), tmp_path / "cache").done == 2
    changed, other = ClipDataset(tmp_path / "cache", "pretrain")
    assert (changed.text, changed.words) == ("HELLO THERE", (("HELLO", 0, 5), ("THERE", 5, 20)))
    assert len(changed.frames) == 20
    assert [len(clip.frames) for clip in (changed, other)] == ClipDataset(tmp_path / "cache", "pretrain").lengths
    after = contents(tmp_path / "cache")
    (same,) = (name for name in after if after[name] == before[name] and name.endswith(".npz"))
    assert "00002" in same


def test_a_replaced_video_or_box_makes_its_clip_again(tmp_path):
    video = tmp_path / "set/yes/train/a.mp4"
    video.parent.mkdir(parents=True)
    for steps, first_box in ((10, 3), (12, 3), (12, 5)):
        grey_video(video, count=steps)
        video.with_suffix(".boxes").write_text(f"{first_box} 0 20 20\n" * steps)
        quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
        (clip,) = ClipDataset(tmp_path / "cache", "train")
        assert len(clip.frames) == steps
        assert clip.boxes[0].tolist() == [first_box, 0, 20, 20]


def test_a_cache_that_does_not_know_its_sources(tmp_path):
    """As earlier versions wrote it: it is read, and made anew by prepare."""
    grey_video(tmp_path / "set/yes/train/a.mp4")
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    new = contents(tmp_path / "cache")
    path = tmp_path / "cache/clips/train/yes/train/a.npz"
    with np.load(path) as stored:
        np.savez_compressed(path, **{name: stored[name] for name in stored.files if name != "source"})
    assert len(ClipDataset(tmp_path / "cache", "train")[0].frames) == 10
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    assert contents(tmp_path / "cache") == new


def test_a_cache_is_unfinished_while_clips_are_made_again(tmp_path, monkeypatch):
    for name in "ab":
        grey_video(tmp_path / f"set/yes/train/{name}.mp4")
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    grey_video(tmp_path / "set/yes/train/b.mp4", count=12)

    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez_compressed", no_space)
        with pytest.raises(PrepareError, match="1 of 2 clips are prepared"):
            quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    with pytest.raises(ValueError, match="was not finished; run the same prepare again"):
        ClipDataset(tmp_path / "cache", "train")
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    assert ClipDataset(tmp_path / "cache", "train").lengths == [10, 12]


def refuse(monkeypatch, *names):
    """Files of these names can be listed but not read, which permissions do not do to root."""
    real = Path.read_text, np.loadtxt, Path.iterdir

    def check(path):
        if Path(path).name in names:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    def replacement(function):
        def checked(path, *arguments, **options):
            check(path)
            return function(path, *arguments, **options)

        return checked

    monkeypatch.setattr(Path, "read_text", replacement(real[0]))
    monkeypatch.setattr(np, "loadtxt", replacement(real[1]))
    monkeypatch.setattr(Path, "iterdir", replacement(real[2]))


def test_texts_that_cannot_be_read_are_problems(tmp_path, monkeypatch):
    for layout, ending, text in (
        ("lrw/yes/train", ".txt", "Duration: 0.2 seconds"),
        ("lrs/test/p", ".txt", "Text: YES"),
        ("grid/s1", ".align", "0 10000 bin"),
    ):
        for name in ("good", "bad"):
            grey_video(tmp_path / layout / f"{name}.mp4", count=30)
            (tmp_path / layout / f"{name}{ending}").write_text(text)
    refuse(monkeypatch, "bad.txt", "bad.align")
    for reader, name, file in (
        (LRW(tmp_path / "lrw"), "yes/bad", "bad.txt"),
        (LRS(tmp_path / "lrs"), "test/p/bad", "bad.txt"),
        (GRID(tmp_path / "grid"), "s1/bad", "bad.align"),
    ):
        report = quick(reader, tmp_path / type(reader).__name__)
        assert (report.done, report.skipped) == (1, [(name, f"{file} cannot be read: Permission denied")])


def test_clips_that_cannot_be_read_are_problems(tmp_path, monkeypatch):
    for name in "abc":
        grey_video(tmp_path / f"set/yes/train/{name}.mp4")
    (tmp_path / "set/yes/train/a.boxes").write_text("0 0 9 9\n" * 10)
    (tmp_path / "set/yes/train/b.mp4").unlink()
    (tmp_path / "set/yes/train/b.mp4").mkdir()  # a folder of pictures
    (tmp_path / "set/yes/train/d.mp4").symlink_to(tmp_path / "nowhere")
    refuse(monkeypatch, "a.boxes", "b.mp4")
    report = quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    assert report.done == 1
    assert dict(report.skipped) == {
        "yes/train/a": "a.boxes cannot be read: Permission denied",
        "yes/train/b": "b.mp4 cannot be read: Permission denied",
        "yes/train/d": "d.mp4 cannot be read: No such file or directory",
    }


def test_names_that_are_no_text_are_problems(tmp_path):
    grey_video(tmp_path / "set/yes/train/a.mp4")
    folder = os.fsencode(tmp_path / "set/yes")
    try:
        for name in (b"caf\xe9.mp4", b"train/caf\xe9.mp4"):
            shutil.copy(tmp_path / "set/yes/train/a.mp4", os.path.join(folder, name))
    except OSError:
        pytest.skip("this file system takes text only")
    report = quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    assert report.done == 1
    names = [os.fsdecode(name) for name in (b"yes/caf\xe9", b"yes/train/caf\xe9")]
    assert report.skipped == [(name, "its name is not UTF-8") for name in names]
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "fused_convlstm", "prepare", "folders", "set", "cache", "--whole", "48", "64"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [*command, "--workers", "0"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "skipped yes/caf\\udce9: its name is not UTF-8" in done.stdout


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", '[{"split": "train"}]', "nothing"])
def test_a_damaged_index(tmp_path, content):
    grey_video(tmp_path / "set/yes/train/a.mp4")
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    (tmp_path / "cache/index.json").write_text(content)
    with pytest.raises(ValueError, match=r"cache_dir: '.*index.json' is damaged .* run the same prepare again"):
        ClipDataset(tmp_path / "cache", "train")
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    assert len(ClipDataset(tmp_path / "cache", "train")) == 1


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_description(tmp_path, content):
    grey_video(tmp_path / "set/yes/train/a.mp4")
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    (tmp_path / "cache/cache.json").write_text(content)
    message = r"cache_dir: '.*cache.json' is not a cache description .* remove the folder and prepare anew"
    with pytest.raises(ValueError, match=message):
        ClipDataset(tmp_path / "cache", "train")
    with pytest.raises(ValueError, match=message):
        quick(WordFolders(tmp_path / "set"), tmp_path / "cache")


def test_too_small_for_optical_flow(tmp_path):
    """OpenCV's search crashes on such pictures."""
    grey_video(tmp_path / "set/yes/train/a.mp4")
    with pytest.raises(ValueError, match=r"flow: expected frames of at least 16 x 16 for 'dis', got 48 x 15"):
        prepare(WordFolders(tmp_path / "set"), tmp_path / "cache", crop=WholeFrame(48, 15), flow="dis", workers=0)
    frames = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 1), dtype=np.uint8)
    assert optical_flow(frames).shape == (3, 16, 16, 2)


def test_no_frames_around_a_word(tmp_path):
    with pytest.raises(ValueError, match="num_frames: expected 1 or more, got 0"):
        GRID(tmp_path, num_frames=0)


HOLD = """
import sys, time
from pathlib import Path
from fused_convlstm.data.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_one_process_at_a_time(tmp_path):
    """Another process keeps prepare out of its folder for as long as it lives; killed, it leaves no lock behind."""
    grey_video(tmp_path / "set/yes/train/a.mp4")
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", HOLD, str(tmp_path / "cache")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=r"cache: another process is writing to this folder"):
            quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
        assert not (tmp_path / "cache/cache.json").exists()
        process.kill()
        process.wait()
    quick(WordFolders(tmp_path / "set"), tmp_path / "cache")
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["cache.json", "clips", "index.json"]


def test_a_lock_leaves_nothing(tmp_path):
    with locked(tmp_path / "new"):
        assert (tmp_path / "new").is_dir()
    assert not (tmp_path / "new").exists()
    with locked(tmp_path / "new"):
        (tmp_path / "new/file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_complete_files_are_on_the_disk(tmp_path, monkeypatch):
    """Content before name before the end of the block."""
    calls = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: (calls.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), rename(*paths)))
    with complete_file(tmp_path / "file") as unfinished:
        unfinished.write_text("content")
    assert calls == [str(unfinished), "rename", str(tmp_path)]
