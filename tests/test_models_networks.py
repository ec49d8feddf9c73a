"""The networks: counts of the paper, state in and out, lengths, resets, files."""

import pickle

import pytest
import torch
from torch import nn

from fused_convlstm import ConvLSTM2d
from fused_convlstm.models import (
    ResNetBiConvLSTM,
    create_model,
    detach_state,
    every,
    load_model,
    reverse_frames,
    save_model,
)

TINY = {"num_classes": 5, "blocks": (1, 2), "mid_channels": (4, 6), "out_channels": (8, 12), "head_channels": 10}
TINY_MODELS = {
    "resnet": ("resnet_convlstm", {**TINY, "recurrent": (True, True)}),
    "resnet-groupnorm": ("resnet_convlstm", {**TINY, "recurrent": (True, True), "norm": "group"}),
    "resnet-attention": ("resnet_convlstm", {**TINY, "recurrent": (True, True), "head": "attention"}),
    "reduced": ("reduced_resnet_convlstm", {**TINY, "recurrent": (True, False)}),
    "frames": ("resnet_frames_small", {**TINY, "recurrent": (False, False)}),
    "vgg": ("vggm_convlstm", {"num_classes": 5, "channels": (4, 4, 6, 6, 6), "fc_channels": 8, "head_channels": 10}),
}


def tiny(name):
    torch.manual_seed(0)
    model, options = TINY_MODELS[name]
    return create_model(model, **options)


def count_only(name):
    """The model without memory for its weights: enough to be counted."""
    with torch.device("meta"):
        return create_model(name)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def conv_lstms(model, size):
    return [m for m in model.modules() if isinstance(m, ConvLSTM2d) and m.convolution.kernel_size == (size, size)]


def test_resnet_convlstm_has_the_layers_and_parameters_of_the_paper():
    model = count_only("resnet_convlstm")
    pointwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    counts = {
        "3x3 ConvLSTM": len(conv_lstms(model, 3)),
        "1x1 ConvLSTM": len(conv_lstms(model, 1)),
        "1x1 convolution": len(pointwise),
        "LSTM": sum(isinstance(m, nn.LSTM) for m in model.modules()),
        "output": sum(isinstance(m, nn.Linear) for m in model.modules()),
    }
    assert counts == {"3x3 ConvLSTM": 14, "1x1 ConvLSTM": 4, "1x1 convolution": 28, "LSTM": 1, "output": 1}
    assert sum(counts.values()) == 48
    assert not [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    assert parameters(model) == pytest.approx(14.5e6, rel=0.01)


def test_resnet_convlstm_halves_the_frame_at_each_scale():
    model = create_model("resnet_convlstm_small").eval()
    with torch.no_grad():
        _, state = model(torch.rand(1, 1, 1, 48, 48))
    sizes = [tuple(state[f"{scale}.0.main.h"].shape[-2:]) for scale in model.scales]
    assert model.scales == ("s2", "s4", "s8", "s16")
    assert sizes == [(24, 24), (12, 12), (6, 6), (3, 3)]


def test_biconvlstm_is_twice_the_network():
    assert parameters(count_only("resnet_biconvlstm")) == pytest.approx(29e6, rel=0.01)


def test_reduced_resnet_has_about_half_the_parameters_and_one_recurrent_scale():
    model = count_only("reduced_resnet_convlstm")
    assert 0.4 < parameters(model) / parameters(count_only("resnet_convlstm")) < 0.6
    assert model.scales == ("s2",)
    assert list(model.modules_by_scale) == ["s2", "s4", "s8"]
    assert len(conv_lstms(model, 3)) == model.config.blocks[0]


def test_vggm_has_one_2d_convolution_and_then_convlstms():
    model = create_model("vggm_convlstm")
    assert [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)] == [(7, 7), (3, 3)]  # conv1 and the FC
    assert len(conv_lstms(model, 5)) == 1
    assert len(conv_lstms(model, 3)) == 3
    with torch.no_grad():
        output, state = model.eval()(torch.rand(1, 1, 1, 48, 48))
    assert output.shape == (1, 1, 500)
    assert state["s4.conv2.h"].shape[-2:] == (12, 12)
    assert state["s8.conv5.h"].shape[-2:] == (6, 6)


def test_frame_baseline_is_as_large_as_the_small_resnet():
    ratio = parameters(count_only("resnet_frames_small")) / parameters(count_only("resnet_convlstm_small"))
    assert 0.95 < ratio < 1.05


@pytest.mark.parametrize(
    "name",
    [
        "vggm_convlstm_small", "resnet_convlstm_small", "resnet_biconvlstm_small", "reduced_resnet_convlstm_small",
        "resnet_frames_small",
    ],
)  # fmt: skip
def test_presets_run(name):
    model = create_model(name).eval()
    with torch.no_grad():
        output, _ = model(torch.rand(2, 1, 1, 48, 48))
    assert output.shape == (2, 1, 10)
    assert torch.isfinite(output).all()


@pytest.mark.parametrize("name", TINY_MODELS)
def test_frame_by_frame_equals_the_whole_clip(name):
    model = tiny(name)
    model.train()(torch.rand(3, 2, 1, 48, 48))  # running statistics other than those at the start
    model.eval()
    frames = torch.rand(6, 2, 1, 48, 48)
    with torch.no_grad():
        whole, final = model(frames)
        state, pieces = None, []
        for frame in frames:
            output, state = model(frame[None], state)
            state = pickle.loads(pickle.dumps(state))
            pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-5)
    assert state.keys() == final.keys()
    for key, tensor in final.items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_chunks_in_training_carry_one_dropout_mask(name):
    model = tiny(name).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its statistics are those of a chunk
    frames = torch.rand(6, 2, 1, 48, 48)
    torch.manual_seed(1)
    whole, _ = model(frames)
    torch.manual_seed(1)
    first, state = model(frames[:4])
    second, _ = model(frames[4:], detach_state(state))
    torch.testing.assert_close(torch.cat((first, second)), whole, rtol=1e-5, atol=1e-5)
    assert not any(t.requires_grad for t in detach_state(state).values())


@pytest.mark.parametrize("name", TINY_MODELS)
def test_padding_does_not_reach_outputs_states_or_gradients(name):
    model = tiny(name).train()
    model.head.dropout = 0.0
    lengths = torch.tensor([5, 3, 1])
    frames = torch.rand(5, 3, 1, 48, 48)
    results = []
    for filling in (0.0, 100.0):
        padded = frames.clone()
        for b, length in enumerate(lengths.tolist()):
            padded[length:, b] = filling
        model.zero_grad()
        output, state = model(padded, lengths=lengths)
        valid = torch.arange(5)[:, None] < lengths
        output[valid].square().sum().backward()
        results.append([output[valid], *state.values(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_value_a_channel_is_normalised_by_running_statistics():
    """The last chunk of a clip may be one frame of one clip, whose maps may have one pixel."""
    model = tiny("vgg").train()
    _, state = model(torch.rand(4, 3, 1, 48, 48))
    before = {key: tensor.clone() for key, tensor in model.fc_norm.state_dict().items()}
    output, _ = model(torch.rand(1, 3, 1, 48, 48), detach_state(state), lengths=torch.tensor([1, 0, 0]))
    output[0, 0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for key, tensor in model.fc_norm.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    x = torch.rand(1, 1, 8, 1, 1)
    torch.testing.assert_close(model.fc_norm(x, None), model.fc_norm.eval()(x, None))


def test_a_sample_that_is_over_keeps_its_state():
    model = tiny("resnet-attention").eval()
    frames = torch.rand(4, 2, 1, 48, 48)
    with torch.no_grad():
        _, alone = model(frames[:2, 1:])
        _, state = model(frames[:3], lengths=torch.tensor([3, 2]))
        _, state = model(frames[3:], state, lengths=torch.tensor([1, 0]))
    for key, tensor in alone.items():
        torch.testing.assert_close(state[key][1:], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_lstm_head_of_a_sample_that_is_over():
    model = tiny("resnet").eval()
    frames = torch.rand(4, 2, 1, 48, 48)
    with torch.no_grad():
        alone, _ = model(frames[:, :1])
        _, state = model(frames[:2], lengths=torch.tensor([2, 1]))
        output, after = model(frames[2:], state, lengths=torch.tensor([2, 0]))
    torch.testing.assert_close(output[:, :1], alone[2:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after["head.lstm.c"][1], state["head.lstm.c"][1])


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_resets_of_a_scale(name):
    model = tiny(name).eval()
    frames = torch.rand(4, 2, 1, 48, 48)
    scale = model.scales[0]
    with torch.no_grad():
        normal, _ = model(frames)
        untouched, _ = model(frames, resets={scale: torch.zeros(4, 2, dtype=torch.bool)})
        only_start, _ = model(frames, resets={scale: every(4, 4, 2)})
        reset, after = model(frames, resets={scale: every(2, 4, 2)})
        _, last_two = model(frames[2:])
    torch.testing.assert_close(untouched, normal, rtol=0, atol=0)
    torch.testing.assert_close(only_start, normal, rtol=0, atol=0)
    torch.testing.assert_close(reset[:2], normal[:2], rtol=0, atol=0)
    assert (reset[2:] - normal[2:]).abs().max() > 1e-6
    for key, tensor in last_two.items():
        if key.startswith((f"{scale}.0.", f"{scale}.conv2")):
            torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_reset_schedule():
    assert every(3, 7, 2)[:, 1].tolist() == [True, False, False, True, False, False, True]
    with pytest.raises(ValueError, match="period"):
        every(0, 4, 1)


def test_biconvlstm_averages_the_two_directions():
    forward = tiny("resnet")
    model = ResNetBiConvLSTM.from_forward(forward).eval()
    forward.eval()
    with torch.no_grad():
        for parameter in model.reversed_network.parameters():
            parameter.mul_(1.1)
        frames = torch.rand(4, 2, 1, 48, 48)
        lengths = torch.tensor([4, 2])
        output, state = model(frames, lengths=lengths)
        reversed_clip = frames.clone()
        reversed_clip[:, 0] = frames[:, 0].flip(0)
        reversed_clip[:2, 1] = frames[:2, 1].flip(0)
        expected = (forward(frames, lengths=lengths)[0] + model.reversed_network(reversed_clip, lengths=lengths)[0]) / 2
    torch.testing.assert_close(output, expected)
    with pytest.raises(ValueError, match="whole clip"):
        model(frames, state)


def test_reverse_frames():
    frames = torch.arange(4.0)[:, None].expand(4, 3)
    reversed_ = reverse_frames(frames, torch.tensor([4, 2, 1]))
    assert reversed_.T.tolist() == [[3, 2, 1, 0], [1, 0, 2, 3], [0, 1, 2, 3]]
    assert reverse_frames(frames, None)[:, 0].tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize("name", ["resnet_convlstm_small", "vggm_convlstm_small"])
def test_forget_gates_start_at_the_bias_of_the_options(name):
    for bias in (-1.0, 2.0):
        model = create_model(name, forget_bias=bias)
        for layer in conv_lstms(model, 3):
            gates = layer.bias_l0.unflatten(0, (4, -1))
            assert (gates[1] == bias).all()
            assert (gates[[0, 2, 3]] == 0).all()


def test_dropout_has_one_mask_for_all_steps():
    model = tiny("resnet").train()
    _, state = model(torch.rand(3, 4, 1, 48, 48))
    assert state["head.mask"].shape == (4, 12)
    assert set(state["head.mask"].unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("name", ["resnet", "resnet-groupnorm", "vgg"])
def test_save_and_load(name, tmp_path):
    registered, _ = TINY_MODELS[name]
    model = tiny(name).eval()
    save_model(tmp_path / "model.safetensors", registered, model, classes=["a", "b"])
    loaded, loaded_name, extra = load_model(tmp_path / "model.safetensors")
    assert (loaded_name, extra, loaded.config) == (registered, {"classes": ["a", "b"]}, model.config)
    frames = torch.rand(2, 1, 1, 48, 48)
    assert torch.equal(loaded(frames)[0], model(frames)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_loading_bad_files(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no model file"):
        load_model(path)
    save_model(path, "resnet_convlstm", tiny("resnet"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_model(path)
    path.write_bytes(pickle.dumps({"model": 1}))
    with pytest.raises(ValueError, match="damaged"):
        load_model(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, "resnet_convlstm", tiny("resnet"))
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_model(path, "resnet_convlstm", tiny("resnet"), classes=object())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mid_chanels": (1,)}, "did you mean 'mid_channels'"),
        ({"mid_channels": (4, 4)}, "mid_channels: expected 4 values"),
        ({"mid_channels": 4}, "mid_channels: expected a list"),
        ({"num_classes": 1}, "num_classes: expected at least 2"),
        ({"num_classes": "ten"}, "num_classes: expected int"),
        ({"head": "gru"}, "head: expected one of"),
        ({"norm": "layer"}, "norm: expected one of"),
        ({"dropout": 1.0}, "dropout"),
        ({"blocks": (3, 0, 4, 3)}, "blocks: expected numbers of at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("resnet_convlstm", **options)


def test_unknown_model():
    with pytest.raises(ValueError, match="did you mean 'resnet_convlstm'"):
        create_model("resnet_convlsm")


@pytest.mark.parametrize(
    ("frames", "arguments", "message"),
    [
        (torch.rand(2, 1, 3, 48, 48), {}, "frames: expected floating-point"),
        (torch.rand(2, 1, 48, 48), {}, "frames: expected floating-point"),
        (torch.zeros(2, 1, 1, 48, 48, dtype=torch.uint8), {}, "frames: expected floating-point"),
        (torch.rand(0, 1, 1, 48, 48), {}, "at least one frame"),
        (torch.rand(2, 1, 1, 48, 48), {"lengths": torch.tensor([3])}, "lengths: expected values from 0 to T = 2"),
        (torch.rand(2, 1, 1, 48, 48), {"lengths": torch.tensor([0])}, "at least one sample"),
        (torch.rand(2, 1, 1, 48, 48), {"lengths": torch.tensor([1, 1])}, "lengths: expected 1 integers"),
        (torch.rand(2, 1, 1, 48, 48), {"resets": {"s3": torch.ones(2, 1, dtype=torch.bool)}}, "unknown scale 's3'"),
        (torch.rand(2, 1, 1, 48, 48), {"resets": {"s2": torch.ones(2, 2, dtype=torch.bool)}}, "resets: expected"),
        (torch.rand(2, 1, 1, 48, 48), {"state": {"s2.0.main.h": torch.zeros(1)}}, "state: expected a tensor"),
    ],
)
def test_bad_calls(frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny("resnet").eval()(frames, **arguments)


def test_a_state_of_another_model_is_refused():
    frames = torch.rand(1, 1, 1, 48, 48)
    _, state = tiny("resnet").eval()(frames)
    with pytest.raises(ValueError, match="state: unknown tensors other"):
        tiny("resnet").eval()(frames, {**state, "other": torch.zeros(1)})
