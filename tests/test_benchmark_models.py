"""The networks that benchmarks compare compute the same."""

from __future__ import annotations

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
