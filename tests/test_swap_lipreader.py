"""The lipreader example, tiny: what goes in leaves the network as it was, and all three are trained."""

import importlib.util
from pathlib import Path

import pytest
import torch
from synthetic_clips import make_word_cache

from fused_convlstm import ConvLSTM2d, PooledGateConvLSTM2d

_path = Path(__file__).parents[1] / "examples" / "swap_lipreader.py"
_spec = importlib.util.spec_from_file_location("swap_lipreader_example", _path)
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


def test_usual_lipreader() -> None:
    """512 channels before the average, 11.2 million parameters below the LSTM."""
    model = example.Lipreader(classes=5)
    assert model.lstm.input_size == 512
    assert 11.1e6 < sum(p.numel() for part in (model.frontend, model.trunk) for p in part.parameters()) < 11.3e6


@pytest.mark.parametrize("kind", [ConvLSTM2d, PooledGateConvLSTM2d])
def test_layer_changes_nothing_at_first_and_sees_the_lengths(kind: type) -> None:
    torch.manual_seed(0)
    model = example.Lipreader(classes=5, width=2, hidden=4).eval()
    clips, lengths = torch.randn(2, 1, 6, 88, 88), torch.tensor([6, 4])
    expected = model(clips, lengths)
    extended = example.with_layer(model, kind)
    assert model.recurrence is None
    torch.testing.assert_close(extended(clips, lengths), expected)
    torch.nn.init.constant_(extended.recurrence.weight, 0.5)
    maps = torch.randn(6, 2, 16, 3, 3)
    changed = maps.clone()
    changed[4:, 1] = 7.0  # behind the end of the second clip
    ours, theirs = (extended.recurrence(x, lengths) for x in (maps, changed))
    assert not torch.equal(ours, maps)
    assert torch.equal(ours[:, 0], theirs[:, 0])
    assert torch.equal(ours[:4, 1], theirs[:4, 1])


def test_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make_word_cache(tmp_path, per_word=(2, 1, 2), steps=(4, 6))
    options = ["--words", "left", "up", "--width", "2", "--epochs", "1", "--tuning-epochs", "1", "--rounds", "1"]
    rows = example.main([str(cache), *options])
    assert [row.name for row in rows] == ["as it was", "with ConvLSTM2d", "with PooledGateConvLSTM2d"]
    assert rows[0].parameters < rows[2].parameters < rows[1].parameters
    assert all(0 <= row.accuracy <= 1 for row in rows)
    assert all(0 < seconds < float("inf") for row in rows for seconds in (row.forward_seconds, row.training_seconds))
    assert "with PooledGateConvLSTM2d" in capsys.readouterr().out
