"""Which tile a call of the Triton backend gets; nothing is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fused_convlstm.backends.triton import autotune, measured, tuning
from fused_convlstm.backends.triton.tile import Tile

DEVICE = torch.device("cuda")
TILES = tuning.tiles(tuning.FORWARD, 90, "bf16")


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device of 132 multiprocessors on which the third tile is the fastest and the first does not fit."""
    times = {tile: 1.0 + k for k, tile in enumerate(TILES)} | {TILES[0]: float("inf"), TILES[2]: 0.5}
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(tuning, "_time", lambda launch: times[launch()])
    monkeypatch.setattr(tuning, "_timings", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield
    autotune(None)


def choose(rows: int = 576 * 32, run: Callable[[Tile], Any] | None = lambda tile: lambda: tile) -> Tile:
    return tuning.choose(tuning.FORWARD, DEVICE, torch.bfloat16, "ieee", 1, rows, 64, 1, (64, 3, 3), run)


def test_without_autotuning_nothing_is_launched() -> None:
    autotune(False)
    assert choose(run=lambda tile: pytest.fail("launched")) in TILES
    assert measured() == {}


def test_autotuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    autotune(True)
    assert choose() == TILES[2]
    assert list(measured().values()) == [TILES[2]]
    (times,) = tuning.timings().values()
    assert set(times) == set(TILES)
    assert times[TILES[2]] == 0.5
    monkeypatch.setattr(tuning, "_time", lambda launch: pytest.fail("measured a second time"))
    assert choose() == TILES[2]


def test_a_capture_is_not_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    autotune(False)
    expected = choose()
    autotune(True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "_time", lambda launch: pytest.fail("measured within a capture"))
    assert choose() == expected
    assert measured() == {}


@pytest.mark.parametrize("rows", [9, 576, 576 * 32, 10**6])
def test_the_default_fills_the_device(rows: int) -> None:
    """More pixels never get a smaller tile."""
    autotune(False)
    tile, larger = choose(rows), choose(4 * rows)
    assert larger.bm * larger.bn >= tile.bm * tile.bn


def test_rows_of_the_tuning_report(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu
    import gpu_tune

    monkeypatch.setattr(gpu, "prepare", lambda problem, name: choose)
    problem = gpu.plan()[0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (row,), wrong = gpu_tune.triton_rows(problem, gpu_tune.triton_names(problem))
    assert wrong == ""
    assert row["problem"] == str(problem)
    assert row["kernel"] == tuning.FORWARD
    assert row["rows"] == 576 * 32
    assert row["chosen"] in row["times"]
    assert min(row["times"], key=lambda name: row["times"][name]) == gpu_tune.tile_name(TILES[2])
    assert gpu_tune.triton_rows(problem, gpu_tune.triton_names(problem)) == ([], "")  # known already
    assert not tuning.enabled()


def test_a_tile_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is out of the question, the others are measured; one that leaves CUDA unusable ends it, and is known."""
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    monkeypatch.setattr(tuning, "_timings", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def do_bench(launch: Callable[[], Tile], **_: object) -> float:
        tile = launch()
        if tile == TILES[1]:
            raise ValueError("ptxas fatal")
        return float(tile.bm)

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    autotune(True)
    with pytest.warns(UserWarning, match="a tile fails: ptxas fatal"):
        assert choose() == min(TILES, key=lambda tile: tile.bm)
    (times,) = tuning.timings().values()
    assert times == {tile: float("inf") if tile == TILES[1] else tile.bm for tile in TILES}

    def unusable() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", unusable)
    tuning._timings.clear()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        choose()
    (times,) = tuning.timings().values()
    assert times == {TILES[0]: TILES[0].bm, TILES[1]: float("inf")}
