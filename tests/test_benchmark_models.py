"""The networks that benchmarks compare compute the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import gpu
import models
import pytest
import torch
from models import with_loops

from fused_convlstm.models import create_model


@pytest.mark.parametrize(
    "name", ["resnet_convlstm_small", "res3d_convlstm_mobilenet_small", "res3d_pooled_gate_mobilenet_small"]
)
def test_loops_in_place_of_fused_layers(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(name).eval()
    frames = torch.randn(8, 1, model.config.in_channels, 48, 48)
    with torch.no_grad():
        expected, _ = model(frames)
        outputs, _ = with_loops(model, "eager")(frames)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_the_table_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = models.Network("resnet_convlstm_small", 1, 2, 32)
    monkeypatch.setattr(models, "NETWORKS", {"cpu": (network,)})
    monkeypatch.setattr(models, "IMPLEMENTATIONS", ("fused", "eager", "no such loop|"))
    monkeypatch.setattr(sys, "argv", ["models.py", "--device", "cpu", "--results", str(tmp_path)])
    asked = []

    def call(child: object, seconds: float, function: Callable[..., object], *arguments: object) -> object:
        asked.append(arguments[1])
        try:
            return function(*arguments)
        except Exception as error:
            raise gpu.ChildError("one|two\nthree") from error

    monkeypatch.setattr(gpu.Child, "call", call)
    monkeypatch.setattr(models, "milliseconds", lambda *_: 2.0)
    monkeypatch.setattr(models, "with_loops", lambda model, name: with_loops(model, {"eager": name}[name]))
    assert models.main() == 1
    assert asked == ["fused", "eager", "no such loop|"]
    rows = (tmp_path / "models-cpu.md").read_text().splitlines()[-3:]
    assert rows[0].startswith("| resnet_convlstm_small | 1 x 2 x 32x32 | fused | 2 | 500 | ")
    assert rows[1].startswith("| resnet_convlstm_small | 1 x 2 x 32x32 | eager | 2 | 500 | ")
    assert rows[2].endswith(r"| 'one/two\nthree' | | | |")
    assert models.main() == 1
    assert len(asked) == 3
