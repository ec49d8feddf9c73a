"""What the readers find in the folder layouts of the datasets. No video is decoded here."""

from collections import Counter

import pytest

from fused_convlstm.data import GRID, GRID_WORDS, LRS, LRW, Item, LRWCrops, Problem, WordFolders, split_by_name


def touch(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def items(reader):
    return [entry for entry in reader if isinstance(entry, Item)]


def problems(reader):
    return {entry.name: entry.reason for entry in reader if isinstance(entry, Problem)}


def test_split_rule_is_fixed():
    """The rule is documented; published numbers depend on it."""
    expected = {"bbaf2n": "train", "lbax4n": "train", "bras9a": "val", "sbwo3s": "test"}
    assert {name: split_by_name(name) for name in expected} == expected
    counts = Counter(split_by_name(f"clip{number}") for number in range(2000))
    assert 0.77 < counts["train"] / 2000 < 0.83
    assert 0.08 < counts["val"] / 2000 < 0.12
    assert 0.08 < counts["test"] / 2000 < 0.12


def test_lrw(tmp_path):
    touch(tmp_path / "ABOUT/train/ABOUT_00001.mp4")
    touch(tmp_path / "ABOUT/train/ABOUT_00001.txt", "Channel: 1\nDuration: 0.40 seconds\n")
    touch(tmp_path / "ABOUT/val/ABOUT_00001.mp4")
    touch(tmp_path / "ABOUT/val/ABOUT_00002.mp4")
    touch(tmp_path / "ABOUT/val/ABOUT_00002.txt", "Duration: long\n")
    touch(tmp_path / "WORLD/test/WORLD_00001.mp4")
    touch(tmp_path / "WORLD/test/WORLD_00001.txt", "Duration: 0.2 seconds\n")
    reader = LRW(tmp_path)
    assert [(item.split, item.name, item.label) for item in items(reader)] == [
        ("train", "ABOUT/ABOUT_00001", "ABOUT"),
        ("test", "WORLD/WORLD_00001", "WORLD"),
    ]
    (word,) = items(reader)[0].words
    assert (word.text, word.start, word.end) == ("ABOUT", pytest.approx(0.38), pytest.approx(0.78))
    assert problems(reader) == {
        "ABOUT/ABOUT_00001": "ABOUT_00001.txt is missing",
        "ABOUT/ABOUT_00002": "ABOUT_00002.txt has no line 'Duration: SECONDS'",
    }


def test_lrw_crops(tmp_path):
    touch(tmp_path / "ABOUT/train/ABOUT_00001.npz")
    touch(tmp_path / "ABOUT/test/ABOUT_00002.npz")
    assert [(item.split, item.label, item.cropped) for item in items(LRWCrops(tmp_path))] == [
        ("train", "ABOUT", True),
        ("test", "ABOUT", True),
    ]


def test_word_folders(tmp_path):
    touch(tmp_path / "yes/one.mp4")
    touch(tmp_path / "yes/notes.txt")
    touch(tmp_path / "no/test/two.AVI")
    found = items(WordFolders(tmp_path))
    assert [(item.name, item.split, item.label) for item in found] == [
        ("no/test/two", "test", "no"),
        ("yes/one", split_by_name("yes/one"), "yes"),
    ]


ALIGNMENT = """\
0 23750 sil
23750 29500 bin
29500 34000 blue
34000 35500 at
35500 41000 f
41000 47250 two
47250 53000 now
53000 74500 sil
"""


@pytest.fixture
def grid(tmp_path):
    touch(tmp_path / "video/s1/bbaf2n.mp4")
    touch(tmp_path / "align/s1/bbaf2n.align", ALIGNMENT)
    touch(tmp_path / "video/s2/bbaf2n.mpg")
    touch(tmp_path / "align/s2/bbaf2n.align", ALIGNMENT.replace("two", "six"))
    return tmp_path


def test_grid_words(grid):
    found = items(GRID(grid))
    assert len(found) == 12
    assert [item.label for item in found[:6]] == ["bin", "blue", "at", "f", "two", "now"]
    assert found[4].name == "s1/bbaf2n-4-two"
    assert found[4].span == (1.64, 1.89)  # frames 41 to 47.25
    assert found[4].num_frames == 29
    assert {item.split for item in found} == {split_by_name("bbaf2n")}
    assert len({item.name for item in found}) == 12


def test_grid_digits(grid):
    assert [item.label for item in items(GRID(grid, words=("digit",)))] == ["two", "six"]
    assert [item.label for item in items(GRID(grid, words=("two", "colour")))] == ["blue", "two", "blue"]
    assert sum(len(words) for words in GRID_WORDS.values()) == 51


def test_grid_sentences(grid):
    first = items(GRID(grid, unit="sentence"))[0]
    assert first.text == "bin blue at f two now"
    assert first.label is None
    assert first.span is None
    assert [word.text for word in first.words] == first.text.split()


def test_grid_problems(grid):
    touch(grid / "video/s1/bbaf3s.mp4")
    for name, text in {
        "lbax4n": "0 1000 hello\n",
        "lbax5n": "0 1000\n",
        "lbax6n": "0 1000 sil\n",
        "lbax7n": "zero one two\n",
    }.items():
        touch(grid / f"video/s1/{name}.mp4")
        touch(grid / f"align/s1/{name}.align", text)
    assert problems(GRID(grid)) == {
        "s1/bbaf3s": "bbaf3s.align is missing",
        "s1/lbax4n": "lbax4n.align: unknown word 'hello'",
        "s1/lbax5n": "lbax5n.align: expected lines 'START END WORD', got '0 1000'",
        "s1/lbax6n": "lbax6n.align: no words",
        "s1/lbax7n": "lbax7n.align: expected lines 'START END WORD', got 'zero one two'",
    }


def test_grid_arguments(grid):
    with pytest.raises(ValueError, match=r"words: expected GRID's words .* got 'eleven'"):
        GRID(grid, words=("eleven",))
    with pytest.raises(ValueError, match="unit: expected"):
        GRID(grid, unit="phrase")
    with pytest.raises(ValueError, match="words: only for unit='word'"):
        GRID(grid, unit="sentence", words=("digit",))


def test_lrs2_follows_its_lists(tmp_path):
    root = tmp_path / "mvlrs_v1"
    for name in ("1/00001", "1/00002", "2/00001", "2/00002"):
        touch(root / f"main/{name}.mp4")
        touch(root / f"main/{name}.txt", "Text:  HELLO WORLD\nConf:  4\n")
    touch(tmp_path / "train.txt", "1/00001\n")
    touch(tmp_path / "val.txt", "1/00002\n")
    touch(tmp_path / "test.txt", "2/00001 MV\n")
    assert [(item.name, item.split, item.text) for item in items(LRS(root))] == [
        ("main/1/00001", "train", "HELLO WORLD"),
        ("main/1/00002", "val", "HELLO WORLD"),
        ("main/2/00001", "test", "HELLO WORLD"),
    ]
    assert problems(LRS(root)) == {"main/2/00002": "in none of train.txt, val.txt, test.txt"}


def test_lrs3_splits_by_speaker(tmp_path):
    for number in range(60):
        for clip in ("00001", "00002"):
            touch(tmp_path / f"trainval/id{number}/{clip}.mp4")
            touch(tmp_path / f"trainval/id{number}/{clip}.txt", "Text:  YES\n")
    touch(tmp_path / "test/id99/00001.mp4")
    touch(tmp_path / "test/id99/00001.txt", "Text:  NO\n")
    found = items(LRS(tmp_path))
    splits = {}
    for item in found:
        splits.setdefault(item.name.split("/")[1], set()).add(item.split)
    assert all(len(parts) == 1 for parts in splits.values())
    assert splits["id99"] == {"test"}
    assert Counter(item.split for item in found)["test"] == 1
    assert {item.split for item in found} == {"train", "val", "test"}


PRETRAIN = """\
Text:  A LONG TALK
Conf:  5

WORD START END ASDSCORE
A 0.10 0.50 3.2
LONG 0.50 1.90 7
TALK 2.00 2.60 8.1
"""


def test_lrs_pretrain_is_cut_between_words(tmp_path):
    touch(tmp_path / "pretrain/x/00001.mp4")
    touch(tmp_path / "pretrain/x/00001.txt", PRETRAIN)
    whole = items(LRS(tmp_path))
    assert [(item.text, item.span, item.split) for item in whole] == [("A LONG TALK", (0.1, 2.6), "pretrain")]
    assert [(item.text, item.span) for item in items(LRS(tmp_path, max_seconds=2.0))] == [
        ("A LONG", (0.1, 1.9)),
        ("TALK", (2.0, 2.6)),
    ]
    # a word longer than the limit stands alone
    assert [item.text for item in items(LRS(tmp_path, max_seconds=1.0))] == ["A", "LONG", "TALK"]


def test_lrs_problems(tmp_path):
    touch(tmp_path / "pretrain/x/00001.mp4")
    touch(tmp_path / "pretrain/x/00002.mp4")
    touch(tmp_path / "pretrain/x/00002.txt", "Text:  A\nWORD START END ASDSCORE\nA 0.1 late\n")
    touch(tmp_path / "pretrain/x/00003.mp4")
    touch(tmp_path / "pretrain/x/00003.txt", "Text:  A\n")
    touch(tmp_path / "pretrain/x/00004.mp4")
    touch(tmp_path / "pretrain/x/00004.txt", "nothing")
    assert problems(LRS(tmp_path)) == {
        "pretrain/x/00001": "00001.txt is missing",
        "pretrain/x/00002": "00002.txt: expected lines 'WORD START END SCORE', got 'A 0.1 late'",
        "pretrain/x/00003": "00003.txt: no line 'WORD START END ...'",
        "pretrain/x/00004": "00004.txt has no line 'Text: ...'",
    }


@pytest.mark.parametrize("reader", [LRW, LRWCrops, WordFolders, GRID, LRS])
def test_root_must_be_a_folder(reader, tmp_path):
    with pytest.raises(ValueError, match="root: expected the folder of"):
        list(reader(tmp_path / "nowhere"))


def test_lrs_layout(tmp_path):
    with pytest.raises(ValueError, match="main, trainval, pretrain or test"):
        list(LRS(tmp_path))
