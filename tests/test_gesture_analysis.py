"""Maps of recurrent layers, action tubes, pictures of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fused_convlstm import ConvALSTM2d
from fused_convlstm.analysis.localization import (
    attention_pictures,
    attention_tube,
    box_iou,
    peaks_inside,
    smooth_over_time,
)
from fused_convlstm.analysis.maps import (
    as_pictures,
    attention_maps,
    draw_boxes,
    fusion_maps,
    overlay,
    recording,
    resize_maps,
    save_grid,
    save_video,
)
from fused_convlstm.analysis.reader import TrainedReader
from fused_convlstm.analysis.visualize import record_clip
from fused_convlstm.data import Clip
from fused_convlstm.models import ResNetBiConvLSTM, create_model
from fused_convlstm.training.recipe import TransformRecipe
from fused_convlstm.training.tasks import WordTask


@pytest.mark.parametrize(
    ("name", "hidden", "attention"),
    [
        ("res3d_input_attention_mobilenet_small", {"lstm1", "lstm2"}, {"lstm1"}),
        ("res3d_output_gate_attention_mobilenet_small", {"lstm1", "lstm2"}, {"lstm1"}),
        ("video_motion_small", {"lstm", "lstm.prediction", "lstm.motion"}, {"lstm"}),
        ("video_alstm_small", set(), {"lstm"}),
        ("video_convlstm_small", {"lstm"}, set()),
    ],
)
def test_recording(name: str, hidden: set[str], attention: set[str]) -> None:
    model = create_model(name, num_classes=3).eval()
    clips = torch.randn(6, 2, 3, 24, 24)
    expected, _ = model(clips)
    with recording(model) as record:
        outputs, _ = model(clips)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert set(record.hidden) == hidden
    assert set(record.attention) == attention
    for maps in record.attention.values():
        assert maps.shape[1] == 2
        assert attention_maps(maps).dim() == 4
    torch.testing.assert_close(model(clips)[0], expected, rtol=0, atol=0)  # the hooks are gone
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_recording_of_a_stack() -> None:
    model = torch.nn.Sequential(ConvALSTM2d(2, 3, 3, num_layers=2, batch_first=True))
    with recording(model) as record:
        model(torch.randn(2, 5, 2, 6, 6))
    assert record.hidden["0"].shape == (5, 2, 3, 6, 6)
    assert record.attention["0"].shape == (5, 2, 1, 6, 6)


def test_maps_of_a_reversed_network_are_in_the_order_of_the_clip() -> None:
    options = {"num_classes": 3, "mid_channels": [4, 4], "out_channels": [4, 4], "blocks": [1, 1], "head_channels": 4}
    model = create_model("resnet_biconvlstm", recurrent=[True, True], **options).eval()
    assert isinstance(model, ResNetBiConvLSTM)
    model.reversed_network.load_state_dict(model.forward_network.state_dict())
    reader = TrainedReader(
        model,
        "resnet_biconvlstm",
        WordTask(["a", "b", "c"]),
        "last",
        None,
        TransformRecipe(validation_crop=24, size=24),
    )
    frames = torch.randint(0, 255, (7, 1, 24, 24), dtype=torch.uint8)
    there, _ = record_clip(reader, Clip(frames, 0, "a", "1"))
    back, _ = record_clip(reader, Clip(frames.flip(0), 0, "a", "1"))
    forward = [name for name in there.hidden if name.startswith("forward_network.")]
    assert forward
    for name in forward:
        other = name.replace("forward_network.", "reversed_network.")
        # Both networks are the same: one sees in a clip what the other sees in the clip played backwards.
        torch.testing.assert_close(there.hidden[other], back.hidden[name].flip(0))
        assert not torch.allclose(there.hidden[other], there.hidden[name])


def test_fusion_maps_take_the_strongest_channel() -> None:
    hidden = torch.rand(3, 2, 4, 5, 6)
    for t in range(3):
        for b in range(2):
            hidden[t, b, (t + b) % 4] += 1.0
    maps = fusion_maps(hidden)
    for t in range(3):
        for b in range(2):
            assert torch.equal(maps[t, b], hidden[t, b, (t + b) % 4])


def test_maps_for_every_frame() -> None:
    maps = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    assert resize_maps(maps, 6, (4, 4))[:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert resize_maps(maps, 5, (4, 4)).shape == (5, 4, 4)


def bumps(centres: np.ndarray, size: int = 14) -> torch.Tensor:
    """Attention maps with a bump of two cells' width around each centre (x, y) in 0 to 1."""
    grid = (torch.arange(size) + 0.5) / size
    x, y = torch.tensor(centres, dtype=torch.float32).T
    near = (grid[None, None] - x[:, None, None]) ** 2 + (grid[None, :, None] - y[:, None, None]) ** 2
    return torch.softmax((-near / 0.005).flatten(1), dim=1).view(len(centres), size, size)


def test_a_tube_follows_the_attention() -> None:
    path = np.stack((np.linspace(0.2, 0.8, 10), np.linspace(0.7, 0.3, 10)), axis=1)
    boxes = attention_tube(bumps(path), 20, (56, 56), sigma=0.0)
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    np.testing.assert_allclose(centres[::2], 56 * path, atol=2.0)
    assert (boxes[:, 2:] > 4).all()
    assert (boxes[:, 2:] < 20).all()


def test_smoothing_takes_out_a_jump() -> None:
    path = np.full((11, 2), 0.3)
    path[5] = 0.8
    rough = attention_tube(bumps(path), 11, (56, 56), sigma=0.0)
    smooth = attention_tube(bumps(path), 11, (56, 56), sigma=2.0)
    assert rough[5, 0] > 35
    assert smooth[:, 0].max() < 20
    maps = torch.rand(7, 3, 4)
    torch.testing.assert_close(smooth_over_time(maps.mean(0).expand(7, 3, 4), 1.5), maps.mean(0).expand(7, 3, 4))
    assert smooth_over_time(maps, 0.0) is maps


def test_the_strongest_piece_is_taken() -> None:
    maps = torch.zeros(1, 20, 20)
    maps[0, 2:4, 2:4] = 1.0
    maps[0, 10:16, 8:18] = 0.8
    box = attention_tube(maps, 1, (20, 20), sigma=0.0)[0]
    assert box_iou(box[None], np.array([[8.0, 10.0, 10.0, 6.0]]))[0] > 0.7


def test_spread_and_peaks() -> None:
    path = np.stack((np.linspace(0.3, 0.7, 6), np.linspace(0.4, 0.6, 6)), axis=1)
    tight = attention_tube(bumps(path), 6, (56, 56), sigma=0.0)
    wide = attention_tube(bumps(path), 6, (56, 56), sigma=0.0, spread=0.1)
    assert (wide[:, 2:] > tight[:, 2:] + 3).all()
    np.testing.assert_allclose(wide[:, :2] + wide[:, 2:] / 2, 56 * path, atol=2.5)
    pictures = attention_pictures(bumps(path), 6, (56, 56), sigma=0.0, spread=0.1)
    assert pictures.shape == (6, 56, 56)
    assert peaks_inside(pictures, wide).all()
    moved = wide.copy()
    moved[2:, 0] += moved[2:, 2]
    assert peaks_inside(pictures, moved).tolist() == [True, True, False, False, False, False]
    with pytest.raises(ValueError, match="spread: expected at least 0"):
        attention_tube(bumps(path), 6, (56, 56), spread=-1.0)


def test_power_evens_attention_out() -> None:
    maps = torch.full((1, 20, 20), 0.001)
    maps[0, 4:16, 6:14] = 0.1
    maps[0, 5:7, 8:12] = 1.0
    whole = np.array([[6.0, 4.0, 8.0, 12.0]])
    assert box_iou(attention_tube(maps, 1, (20, 20), sigma=0.0), whole)[0] < 0.2
    assert box_iou(attention_tube(maps, 1, (20, 20), sigma=0.0, power=0.25), whole)[0] == 1.0
    with pytest.raises(ValueError, match="power: expected more than 0"):
        attention_tube(maps, 1, (20, 20), power=0.0)


def test_box_iou() -> None:
    first = np.array([[0.0, 0, 4, 4], [0, 0, 2, 2], [1, 1, 0, 0], [0, 0, 4, 2]])
    second = np.array([[2.0, 0, 4, 4], [5, 5, 2, 2], [1, 1, 0, 0], [0, 0, 4, 2]])
    np.testing.assert_allclose(box_iou(first, second), [8 / 24, 0, 0, 1])
    with pytest.raises(ValueError, match="threshold: expected from 0"):
        attention_tube(torch.rand(1, 4, 4), 1, (4, 4), threshold=1.0)


def test_pictures(tmp_path: Path) -> None:
    frames = torch.randint(0, 255, (6, 5, 20, 24), dtype=torch.uint8)
    pictures = as_pictures(frames)
    assert np.array_equal(pictures, frames[:, :3].permute(0, 2, 3, 1).numpy())
    assert as_pictures(frames[:, :1]).shape == (6, 20, 24, 3)
    maps = torch.zeros(3, 5, 6)
    maps[:, 1, 1] = 1.0
    shown = overlay(np.zeros_like(pictures), maps)
    assert shown[0, 5, 6, 0] > shown[0, 5, 6, 2], "the largest value is red"
    assert shown[0, -1, -1, 2] > shown[0, -1, -1, 0], "the least is blue"
    boxed = draw_boxes(pictures, np.tile([2.0, 3.0, 5.0, 6.0], (6, 1)), (0, 255, 0))
    assert boxed[0, 3, 2].tolist() == [0, 255, 0]
    rows = [("clip", pictures), ("attention", shown)]
    save_grid(tmp_path / "grid.png", rows, columns=3)
    save_video(tmp_path / "maps.mp4", rows)
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert b"ftyp" in (tmp_path / "maps.mp4").read_bytes()[:16]
