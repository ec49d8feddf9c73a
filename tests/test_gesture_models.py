"""The networks of the gesture, action and lipreading tables: counts of the papers, and every one on tiny clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fused_convlstm.models import ClipModel, create_model, load_model, model_names, save_model
from fused_convlstm.models.clips import SameConv2d, SameConv3d, strided_steps
from fused_convlstm.models.gesture import COMPONENTS, pyramid_steps
from fused_convlstm.models.resnet50 import make_resnet50
from fused_convlstm.models.video_lstm import DESIGNS, make_small_backbone, make_vgg16

TINY_LIPS = {"in_channels": 1, "width": 0.1, "features": 12}
TINY_VGGM = {"in_channels": 1, "channels": [4, 6, 6, 6, 6], "fc_channels": 8, "frames": 6, "head_channels": 8}
TINY_GESTURE = {"width": 0.07}
TINY_VIDEO = {"hidden_channels": 6, "motion_channels": 5, "backbone_channels": [4, 4, 6, 6], "head_channels": 8}

# Every row of the papers' tables, in a size for tests: (name, options, frame size).
TINY: list[tuple[str, dict[str, Any], int]] = [
    ("vggm_multitower", TINY_VGGM, 48),
    ("vggm_lstm", TINY_VGGM, 48),
    ("resnet34_2d_conv", TINY_LIPS, 32),
    ("resnet34_3d_conv", TINY_LIPS, 32),
    ("resnet34_3d_bilstm", TINY_LIPS, 32),
    ("resnet18_3d_bilstm", TINY_LIPS, 32),
    *[(f"res3d_{component}_mobilenet", TINY_GESTURE, 24) for component in COMPONENTS],
    ("cnn3d_biconvlstm_cnn2d", {"width": 0.05}, 24),
    ("res3d", TINY_GESTURE, 24),
    ("c3d", {"width": 0.03}, 24),
    ("pyramidal_c3d", {"width": 0.03}, 24),
    ("resnet50", {"width": 0.05}, 40),
    *[(f"video_{design}", {**TINY_VIDEO, "backbone": "small"}, 32) for design in DESIGNS],
]
NAMES = [name for name, _, _ in TINY]


def make(name: str, **more: Any) -> tuple[Any, Tensor]:
    """A tiny model and clips (T, B, C, H, W) for it."""
    _, options, size = TINY[NAMES.index(name)]
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, **{**options, **more})
    channels = model.config.in_channels
    return model, torch.randn(6, 2, channels, size, size, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_counts_of_the_gesture_network() -> None:
    """Trainable parameters of the authors' code, with variant (a) twice."""
    jester = create_model("res3d_pooled_gate_mobilenet")
    assert count(jester.res3d) == 8_261_696
    assert count(jester.mobilenet) == 2_938_112
    assert count(jester) == 12_287_323
    assert count(jester) + (249 - 27) * 1025 == 12_514_873


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_are_exchangeable(component: str) -> None:
    """Nothing but the component differs, and the second layer is a ConvLSTM or variant (a)."""
    counts = {"convlstm": 4_719_616, "pooled_gate": 529_920, "input_attention": 668_160}
    first = counts.get(component, 602_368)
    second = 4_719_616 if component == "convlstm" else 529_920
    model = create_model(f"res3d_{component}_mobilenet")
    assert count(model.lstm1) == first
    assert count(model.lstm2) == second
    assert count(model) == 12_287_323 - 2 * 529_920 + first + second


def test_shapes_of_the_gesture_network() -> None:
    """112x112 gives 28x28 to the ConvLSTM and half the frames, then 4x4."""
    model = create_model("res3d_pooled_gate_mobilenet_small", num_classes=5)
    shapes = {}
    for name in ("lstm1", "mobilenet"):
        getattr(model, name).register_forward_hook(
            lambda _, inputs, output, name=name: shapes.update({name: (inputs[0].shape, output)})
        )
    outputs, state = model(torch.randn(4, 1, 3, 112, 112))
    assert shapes["lstm1"][0] == (2, 1, 32, 28, 28)
    assert shapes["mobilenet"][1].shape == (2, 128, 4, 4)
    assert outputs.shape == (4, 1, 5)
    assert state == {}


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (7, 3, 2), (9, 7, 2), (6, 3, 1), (5, 1, 2)])
def test_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    """ceil(size / stride) outputs, the odd one of the padding at the end."""
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    nn.init.ones_(convolution.weight)
    output = convolution(torch.ones(1, 1, size, size))
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    line = torch.cat((torch.zeros(total // 2), torch.ones(size), torch.zeros(total - total // 2)))
    expected = line.unfold(0, kernel, stride).sum(dim=1)
    torch.testing.assert_close(output[0, 0], expected[:, None] * expected[None])
    volume = SameConv3d(1, 1, kernel, stride)(torch.ones(1, 1, size, size, size))
    assert volume.shape[2:] == (-(-size // stride),) * 3


def test_resnet50_has_torchvisions_layout() -> None:
    backbone = make_resnet50(3, 1.0)
    assert sum(p.numel() for p in backbone.parameters()) == 25_557_032 - 2048 * 1000 - 1000
    names = set(backbone.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.downsample.1.weight", "layer4.2.conv3.weight"} <= names
    assert {name.split(".")[0] for name in names} == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def test_pyramid_of_a_clip() -> None:
    """The whole, its halves, its quarters: as many steps each."""
    whole, *rest = pyramid_steps(torch.tensor([8]), 3)[0][..., 0].tolist()
    assert whole == [0, 4]
    assert rest == [[0, 2], [4, 6], [0, 1], [2, 3], [4, 5], [6, 7]]
    index, valid = pyramid_steps(torch.tensor([5, 3]), 2)
    assert index[..., 0].tolist() == [[0, 2, 4], [0, 1, 2], [3, 4, 4]]
    assert valid[..., 0].all()
    assert index[:, :2, 1].tolist() == [[0, 2], [0, 1], [2, 2]], "a shorter clip's own halves"
    assert valid[..., 1].tolist() == [[True, True, False]] * 3


def test_vgg16_has_torchvisions_layout() -> None:
    weights = {name: tuple(p.shape) for name, p in make_vgg16(3).named_parameters()}
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    assert list(weights) == [f"{k}.{part}" for k in convolutions for part in ("weight", "bias")]
    assert weights["0.weight"] == (64, 3, 3, 3)
    assert weights["28.weight"] == (512, 512, 3, 3)
    assert sum(p.numel() for p in make_vgg16(3).parameters()) == 14_714_688


def test_cells_of_the_small_backbone_see_seven_pixels() -> None:
    backbone = make_small_backbone(2, (8, 8, 8, 8)).eval()
    image = torch.randn(1, 2, 32, 32, requires_grad=True)
    maps = backbone(image)
    assert maps.shape == (1, 8, 8, 8)
    maps[0, :, 4, 3].sum().backward()
    assert image.grad is not None
    rows, columns = image.grad[0].abs().sum(0).nonzero(as_tuple=True)
    assert (rows.min(), rows.max()) == (13, 19)
    assert (columns.min(), columns.max()) == (9, 15)


def test_every_new_model_is_tested() -> None:
    others = ("vggm_convlstm", "resnet_", "reduced_resnet_")
    assert sorted(NAMES) == [n for n in model_names() if not n.endswith("_small") and not n.startswith(others)]


@pytest.mark.parametrize("name", NAMES)
def test_forward_backward_save_load(name: str, tmp_path: Path) -> None:
    model, clips = make(name)
    outputs, _ = model(clips)
    assert outputs.shape == (6, 2, 4)
    outputs.square().sum().backward()
    missing = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    assert all(p.grad.abs().max() > 0 for key, p in model.named_parameters() if key.startswith(("head", "lstm")))
    if isinstance(model, ClipModel):
        assert torch.equal(outputs[0], outputs[-1])
    model.eval()
    with torch.no_grad():
        expected, _ = model(clips)
        save_model(tmp_path / "model.safetensors", name, model)
        loaded, loaded_name, _ = load_model(tmp_path / "model.safetensors")
        assert loaded_name == name
        torch.testing.assert_close(loaded(clips)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_seen(name: str) -> None:
    model, clips = make(name)
    model.eval()
    lengths = torch.tensor([6, 4])
    with torch.no_grad():
        zeros, _ = model(
            clips.masked_fill((torch.arange(6)[:, None] >= lengths)[:, :, None, None, None], 0), lengths=lengths
        )
        poisoned = clips.clone()
        poisoned[4:, 1] = torch.nan
        outputs, _ = model(poisoned, lengths=lengths)
    torch.testing.assert_close(outputs[:4], zeros[:4], rtol=0, atol=0)
    torch.testing.assert_close(outputs[:, 0], zeros[:, 0], rtol=0, atol=0)
    model.train()
    model.zero_grad()
    model(poisoned, lengths=lengths)[0][:4].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_an_evaluation_does_not_depend_on_the_batch(name: str) -> None:
    model, clips = make(name)
    model(clips)  # running statistics other than those at the start
    model.eval()
    lengths = torch.tensor([4, 6, 3, 4])
    batch = torch.cat((clips, clips.flip(0)), dim=1)
    resets = {scale: torch.arange(6)[:, None].expand(6, 4) % 4 == 2 for scale in model.scales}
    with torch.no_grad():
        outputs, _ = model(batch, lengths=lengths, resets=resets)
        for k, length in enumerate(lengths.tolist()):
            cut = {scale: schedule[:length, k : k + 1] for scale, schedule in resets.items()}
            alone, _ = model(batch[:length, k : k + 1], resets=cut)
            torch.testing.assert_close(outputs[:length, k : k + 1], alone, rtol=1e-5, atol=1e-6)
        empty, _ = model(batch[:, :2], lengths=torch.tensor([6, 0]))
        torch.testing.assert_close(empty[:, :1], model(batch[:, :1])[0], rtol=1e-5, atol=1e-6)


def test_convolutions_over_time_are_averaged_over_the_clip() -> None:
    """In training too: two clips of which one is padded to eight times its length."""
    model, clips = make("resnet34_2d_conv")
    seen = {}
    model.temporal.register_forward_hook(lambda _, inputs, output: seen.update(temporal=output))
    model.head.register_forward_hook(lambda _, inputs, output: seen.update(head=inputs[0]))
    model.train()(clips.repeat(4, 1, 1, 1, 1), lengths=torch.tensor([24, 3]))
    assert seen["temporal"].shape[2] == 3
    torch.testing.assert_close(seen["head"][1], seen["temporal"][1, :, 0])
    torch.testing.assert_close(seen["head"][0], seen["temporal"][0].mean(1))


@pytest.mark.parametrize("design", DESIGNS)
def test_a_reset_resets_what_a_scale_names(design: str) -> None:
    """Reset at every step the outputs have no memory; designs without a convolutional state have no scale."""
    model, clips = make(f"video_{design}", initial_state=False, motion="same")
    model.eval()
    if design in ("frames", "lstm"):
        assert model.scales == ()
        return
    with torch.no_grad():
        outputs, _ = model(clips, resets={"lstm": torch.ones(6, 2, dtype=torch.bool)})
        single = torch.cat([model(frame[None])[0] for frame in clips])
    torch.testing.assert_close(outputs, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("design", DESIGNS)
def test_video_lstm_streams_without_an_initial_state(design: str) -> None:
    for motion in ("flow", "difference", "same") if design == "motion" else ("flow",):
        model, clips = make(f"video_{design}", initial_state=False, motion=motion)
        model.eval()
        with torch.no_grad():
            expected, _ = model(clips)
            first, state = model(clips[:2])
            second, _ = model(clips[2:], state)
        torch.testing.assert_close(torch.cat((first, second)), expected, rtol=1e-5, atol=1e-6)


def test_whole_clips_only() -> None:
    for name in ("res3d_pooled_gate_mobilenet", "video_convalstm"):
        model, clips = make(name)
        for state in ({"lstm.lstm.h": torch.zeros(1)}, {}):  # {}: what a model with one output a clip returns
            with pytest.raises(ValueError, match="state: expected None"):
                model(clips, state)


def test_resets_of_the_component() -> None:
    """Reset at every step, the component has no memory: the order of its steps does not matter to the mean."""
    model, clips = make("res3d_pooled_gate_mobilenet")
    model.eval()
    seen = {}
    model.lstm1.register_forward_hook(lambda _, inputs, output: seen.update(reset=output[0]))
    always = torch.ones(6, 2, dtype=torch.bool)
    model(clips, resets={"s4": always})
    x = seen["reset"]
    assert strided_steps(always, 2).shape == (3, 2)
    model(clips, resets={"s4": torch.tensor([[True, True]] + [[False, False]] * 5)})
    torch.testing.assert_close(seen["reset"][0], x[0])
    assert not torch.allclose(seen["reset"][2], x[2])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("res3d_pooled_gate_mobilenet", {"component": "lstm"}, "component: expected one of 'convlstm'"),
        ("video_motion", {"backbone": "features"}, "backbone: expected 'vgg16' or 'small'"),
        ("video_motion", {"in_channels": 2}, "in_channels: expected those of the image and 2 of the flow"),
        ("resnet18_3d_bilstm", {"depth": 50}, "depth: expected one of 18, 34"),
        ("c3d", {"width": 0.0}, "width: expected more than 0"),
        ("vggm_lstm", {"channels": [1, 2]}, "channels: expected 5 values"),
        ("vggm_multitower", {"dropout": 1.0}, "dropout: expected a probability"),
        ("vggm_multitower", {"frames": 0}, r"frames: expected numbers of at least 1, got \[0\]"),
        ("resnet18_3d_bilstm", {"features": 0}, "^features: expected numbers of at least 1"),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_multitower_takes_so_many_frames() -> None:
    """In training no more, in evaluation the middle of each clip."""
    model, clips = make("vggm_multitower")
    longer = torch.cat((clips, clips.flip(0)))
    with pytest.raises(ValueError, match="frames: expected at most 6 in training"):
        model(longer)
    model.eval()
    with torch.no_grad():
        outputs, _ = model(longer, lengths=torch.tensor([12, 9]))
        torch.testing.assert_close(outputs[:6, :1], model(longer[3:9, :1])[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(outputs[:6, 1:], model(longer[1:7, 1:])[0], rtol=1e-5, atol=1e-6)
