"""Converters: each layout against a twin of its library, both ways, and each refusal."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import convert_twins
import numpy as np
import pytest
import swap_twins
import torch
from torch import Tensor, nn

from fused_convlstm import ConvLSTM2d, PooledGateConvLSTM2d
from fused_convlstm.convert import (
    LAYOUTS,
    POOLED_LAYOUTS,
    REFUSED_LAYOUTS,
    from_keras,
    from_weights,
    same_padding_strided,
    to_keras,
    to_weights,
)
from fused_convlstm.convert.layouts import as_tensor

T, B, CIN, C, SIZE = 4, 2, 3, 5, (6, 7)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 0.5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- PyTorch libraries ------------------------------------------------------------------------------------------------

MODULES = {
    "ndrplz": (lambda: swap_twins.Ndrplz(CIN, [C, 4], (3, 5), 2), lambda m, x: m(x)[0][0].transpose(0, 1)),
    "torchgeo": (
        lambda: swap_twins.Torchgeo(CIN, [C, 4], (3, 1), 2, bias=False), lambda m, x: m(x)[0][0].transpose(0, 1),
    ),
    "snntorch": (
        lambda: swap_twins.Spiking(CIN, C, 3),
        lambda m, x: torch.stack([m(f)[2] for f in x]),
    ),
    "automan000": (
        lambda: swap_twins.Automan000(CIN, [C, 4], 3, T, range(T)),
        lambda m, x: torch.stack(m(x[0])[0]),
    ),
    "Hzzone": (lambda: swap_twins.Hzzone(CIN, C, (B, *SIZE), 3), lambda m, x: m(x, None, T)[0]),
    "SA-ConvLSTM": (
        lambda: swap_twins.SAConvLSTM(CIN, C, 3, SIZE), lambda m, x: m(x.permute(1, 2, 0, 3, 4)).permute(2, 0, 1, 3, 4),
    ),
    "OpenSTL": (lambda: swap_twins.OpenSTLModel(CIN, C, 2), None),
    "kamo-naoyuki": (lambda: swap_twins.Kamo(CIN, C, 3, 2, bidirectional=True), lambda m, x: m(x)[0]),
    "aserdega": (
        lambda: swap_twins.Aserdega(SIZE, CIN, [C, 4], (3, 3), peephole=True), lambda m, x: m(x, None)[0],
    ),
}  # fmt: skip
PREFIXES = {"SA-ConvLSTM": "ConvLSTMCell."}


def tensors_of(module: nn.Module, layout: str) -> dict[str, Tensor]:
    """The state dict, and Hzzone's peepholes, which are not in it."""
    extra = {name: value.detach() for name, value in vars(module).items() if isinstance(value, Tensor)}
    return {**module.state_dict(), **extra}


@pytest.mark.parametrize("layout", MODULES)
def test_modules(layout: str) -> None:
    make, call = MODULES[layout]
    module = make().double()
    for value in vars(module).values():
        if isinstance(value, Tensor):
            value.data = normal(*value.shape)
    x = normal(T, B, CIN, *SIZE)
    if layout == "automan000":
        x = x[:1].expand_as(x)
    # OpenSTL: the whole predictor, with the layer in the place of its cells
    expected = module(x.permute(1, 0, 3, 4, 2)) if call is None else call(module, x)
    arrays = tensors_of(module, layout)
    prefix = PREFIXES.get(layout, "")
    fused = from_weights(arrays, layout, prefix=prefix)
    output, _ = fused(x)
    if call is None:
        output = torch.stack([module.conv_last(h) for h in output]).permute(1, 0, 3, 4, 2)
    torch.testing.assert_close(output, expected)
    back = to_weights(fused, layout, prefix=prefix)
    assert set(back) <= set(arrays)
    for name, value in back.items():
        if layout == "kamo-naoyuki" and "bias" in name:
            first, second = name.replace("hh", "ih"), name.replace("ih", "hh")
            torch.testing.assert_close(back[first] + back[second], arrays[first] + arrays[second])
        else:
            assert torch.equal(value, arrays[name]), name


# --- other frameworks -------------------------------------------------------------------------------------------------


def weights_for(layout: str, kernel: tuple[int, int]) -> dict:
    bias = normal(4 * C)
    wide = lambda inputs: normal(*kernel, inputs, 4 * C)  # noqa: E731
    tall = lambda inputs: normal(4 * C, inputs, *kernel)  # noqa: E731
    return {
        "Keras": lambda: {"kernel": wide(CIN), "recurrent_kernel": wide(C), "bias": bias},
        "TensorFlow": lambda: {"kernel": wide(CIN + C), "biases": bias},
        "Flax": lambda: {
            "ih": {"kernel": wide(CIN), "bias": bias}, "hh": {"kernel": wide(C), "bias": normal(4 * C)},
        },
        "Sonnet": lambda: {"input_to_hidden": {"w": wide(CIN)}, "hidden_to_hidden": {"w": wide(C)}, "b": bias},
        "MXNet": lambda: {
            "i2h_weight": tall(CIN), "h2h_weight": tall(C), "i2h_bias": bias, "h2h_bias": normal(4 * C),
        },
    }[layout]()  # fmt: skip


STEPS = {
    "Keras": convert_twins.keras_step,
    "TensorFlow": convert_twins.tensorflow_step,
    "Flax": convert_twins.flax_step,
    "Sonnet": convert_twins.sonnet_step,
    "MXNet": convert_twins.mxnet_step,
    "AttentionConvLSTM": convert_twins.attention_conv_lstm_step,
}


def run_twin(layout: str, weights: dict, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Over (T, B, C, H, W), whatever the twin's own order of axes."""
    last = layout != "MXNet"
    x, h, c = (v.movedim(-3, -1) for v in (x, h, c)) if last else (x, h, c)
    outputs = []
    for frame in x:
        h, c = STEPS[layout](weights, frame, h, c)
        outputs.append(h)
    results = (torch.stack(outputs), h, c)
    return tuple(v.movedim(-1, -3) for v in results) if last else results


def flat(arrays: dict, prefix: str = "") -> dict[str, Tensor]:
    return {
        key: value
        for name, item in arrays.items()
        for key, value in (flat(item, f"{name}.") if isinstance(item, dict) else {name: item}).items()
        for key, value in [(prefix + key, value)]
    }


def as_numpy(arrays: dict) -> dict:
    return {name: as_numpy(v) if isinstance(v, dict) else v.numpy() for name, v in arrays.items()}


@pytest.mark.parametrize("layout", ["Keras", "TensorFlow", "Flax", "Sonnet", "MXNet"])
@pytest.mark.parametrize("kernel", [(3, 3), (3, 5), (2, 4)])
def test_frameworks(layout: str, kernel: tuple[int, int]) -> None:
    if layout == "MXNet" and kernel[0] % 2 == 0:
        pytest.skip("MXNet takes odd recurrent kernels only")
    weights = weights_for(layout, kernel)
    x, h, c = normal(T, B, CIN, *SIZE), normal(B, C, *SIZE), normal(B, C, *SIZE)
    fused = from_weights(as_numpy(weights), layout)
    output, (h_n, c_n) = fused(x, (h[None], c[None]))
    for actual, expected in zip((output, h_n[0], c_n[0]), run_twin(layout, weights, x, h, c), strict=True):
        torch.testing.assert_close(actual, expected)
    # Back: the arrays of a layer in the other library compute the same; where the bias is one array, they are equal.
    back, before = to_weights(fused, layout), flat(weights)
    assert back.keys() == before.keys()
    for name, value in back.items():
        if "bias" not in name or layout in ("Keras", "Sonnet"):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    biases = [name for name in back if "bias" in name or name == "b"]
    torch.testing.assert_close(sum(back[name] for name in biases), sum(before[name] for name in biases))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_conv_lstm(bias: bool) -> None:
    weights = {
        "gate_kernel": normal(1, 1, CIN, 3 * C),
        "recurrent_gate_kernel": normal(1, 1, C, 3 * C),
        "gate_bias": normal(3 * C),
        "depthwise_kernel": normal(3, 3, CIN, 1),
        "pointwise_kernel": normal(1, 1, CIN, C),
        "recurrent_depthwise_kernel": normal(3, 3, C, 1),
        "recurrent_pointwise_kernel": normal(1, 1, C, C),
        "bias": normal(C),
    }
    if not bias:
        del weights["bias"], weights["gate_bias"]
    x, h, c = normal(T, B, CIN, *SIZE), normal(B, C, *SIZE), normal(B, C, *SIZE)
    fused = from_weights(weights, "AttentionConvLSTM")
    assert isinstance(fused, PooledGateConvLSTM2d)
    output, (h_n, c_n) = fused(x, (h[None], c[None]))
    expected = run_twin("AttentionConvLSTM", weights, x, h, c)
    for a, e in zip((output, h_n[0], c_n[0]), expected, strict=True):
        torch.testing.assert_close(a, e)
    back = to_weights(fused, "AttentionConvLSTM")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("layout", [*LAYOUTS, *POOLED_LAYOUTS])
def test_round_trip_of_a_fused_layer(layout: str) -> None:
    """ConvLSTM2d -> the library -> ConvLSTM2d gives the same parameters, bit by bit, and shares no memory."""
    if layout in POOLED_LAYOUTS:
        module = PooledGateConvLSTM2d(CIN, C, 3)
    else:
        module = ConvLSTM2d(CIN, C, 3, bias=layout != "OpenSTL")
    arrays = to_weights(module, layout, prefix="net.")
    again = from_weights(arrays, layout, prefix="net.")
    for (name, a), (_, b) in zip(module.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for array in arrays.values():
        array.zero_()
    for a, b in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dilation_is_that_of_the_library() -> None:
    """kamo-naoyuki's holds for both convolutions, Keras' for that of the input."""
    kamo = swap_twins.Kamo(CIN, C, 3, dilation=2).double()
    x = normal(T, B, CIN, *SIZE)
    fused = from_weights(kamo.state_dict(), "kamo-naoyuki", dilation=2)
    torch.testing.assert_close(fused(x)[0], kamo(x)[0])
    assert to_weights(fused, "kamo-naoyuki").keys() == kamo.state_dict().keys()
    assert from_weights(weights_for("Keras", (3, 3)), "Keras", dilation=2).convolution.recurrent_dilation == (1, 1)


def test_bfloat16_arrays_are_read() -> None:
    """NumPy has no such type: JAX and TensorFlow bring it along."""

    class Bfloat16(np.ndarray):
        @property
        def dtype(self) -> object:
            return type("dtype", (), {"name": "bfloat16"})

    class Array:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            return np.arange(3, dtype=np.float32).view(Bfloat16)

    assert torch.equal(as_tensor(Array()), torch.arange(3).bfloat16())


def test_every_array_library_is_read() -> None:
    """Anything that NumPy understands, and MXNet's own asnumpy."""

    class MXArray:
        def __init__(self, value: Tensor) -> None:
            self.value = value

        def asnumpy(self) -> np.ndarray:
            return self.value.numpy()

    weights = weights_for("MXNet", (3, 3))
    a = from_weights(weights, "MXNet")
    b = from_weights({name: MXArray(value) for name, value in weights.items()}, "MXNet")
    c = from_weights({name: value.numpy().tolist() for name, value in weights.items()}, "MXNet")
    for first, second, third in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first.double(), third.double())


def test_documented_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python of docs/swap.md, beside the files and objects that it speaks of."""
    monkeypatch.chdir(tmp_path)
    keras_layer = convert_twins.ConvLSTM2D(keras_weights(), padding="same", return_sequences=True)
    keras_layer.set_weights = lambda arrays: setattr(keras_layer, "given", arrays)
    model = nn.ModuleDict({"encoder": swap_twins.Ndrplz(CIN, [C, C], (3, 3), 2)})
    torch.save(model.state_dict(), "ndrplz.pt")
    Files(tmp_path).keras("3.5.0").rename("model.keras")
    names = {
        "variables": {"params": {"cell": as_numpy(weights_for("Flax", (3, 3)))}},
        "frames": normal(B, T, *SIZE, CIN),
        "keras_layer": keras_layer,
    }
    text = (Path(__file__).parents[1] / "docs" / "swap.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) == 2
    for code in snippets:
        exec(compile(code.replace('"conv_lstm2d"', '"first"'), "swap.md", "exec"), names)
    assert names["outputs"].shape == (B, T, *SIZE, C)
    assert set(names["arrays"]) == {"ih.kernel", "ih.bias", "hh.kernel", "hh.bias"}
    assert len(keras_layer.given) == 3


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", REFUSED_LAYOUTS)
def test_refused_layouts(layout: str) -> None:
    with pytest.raises(ValueError, match="do not convert"):
        from_weights({}, layout)
    with pytest.raises(ValueError, match="do not convert"):
        to_weights(ConvLSTM2d(CIN, C, 3), layout)


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match=r"layout: expected one of 'ndrplz'.*got 'tinygrad'"):
        from_weights({}, "tinygrad")


def test_refused_weights() -> None:
    openstl = swap_twins.OpenSTLModel(2, 4, 1, layer_norm=True).state_dict()
    with pytest.raises(ValueError, match=r"conv_x\.1\.weight.*LayerNorm"):
        from_weights(openstl, "OpenSTL")
    kamo = swap_twins.Kamo(CIN, C, 3, peephole=True).state_dict()
    with pytest.raises(ValueError, match=r"weight_pi_l0.*peepholes are convolutions"):
        from_weights(kamo, "kamo-naoyuki")
    kamo = swap_twins.Kamo(4, 4, 3, groups=2).state_dict()
    with pytest.raises(ValueError, match="weight_hh_l0: expected 4 input channels"):
        from_weights(kamo, "kamo-naoyuki")
    ndrplz = swap_twins.Ndrplz(CIN, [C, C], [(3, 3), (5, 5)], 2).state_dict()
    with pytest.raises(ValueError, match="kernel_size: expected the same for all layers"):
        from_weights(ndrplz, "ndrplz")


def test_missing_and_misshapen_weights() -> None:
    with pytest.raises(ValueError, match="expected one named 'recurrent_kernel', got 'kernel'"):
        from_weights({"kernel": normal(3, 3, CIN, 4 * C)}, "Keras")
    with pytest.raises(ValueError, match="kernel: expected four gates, got 7"):
        from_weights({"kernel": normal(3, 3, CIN, 7), "recurrent_kernel": normal(3, 3, C, 20)}, "Keras")
    with pytest.raises(ValueError, match="recurrent_kernel: expected 5 input channels"):
        from_weights({"kernel": normal(3, 3, CIN, 20), "recurrent_kernel": normal(3, 3, 4, 20)}, "Keras")
    with pytest.raises(ValueError, match="more than 5 input channels for 5 hidden"):
        from_weights({"conv.weight": normal(20, 5, 3, 3)}, "snntorch")
    with pytest.raises(ValueError, match="'Wcf' beside the other peepholes"):
        from_weights({"_conv.weight": normal(20, 8, 3, 3), "Wci": normal(1, 5, 2, 2)}, "Hzzone")
    with pytest.raises(ValueError, match=r"'cell_list\.0\.conv\.weight', got none with this prefix"):
        from_weights({"encoder.cell_list.0.conv.weight": normal(20, 8, 3, 3)}, "ndrplz", prefix="decoder.")
    many = {f"layer{k}": normal(1) for k in range(20)}
    with pytest.raises(ValueError, match=r"got 'layer0', .*'layer7' and 12 more$"):
        from_weights(many, "ndrplz")
    with pytest.raises(ValueError, match="kernel_size"):
        from_weights({"conv.weight": normal(20, 8, 3)}, "snntorch")
    with pytest.raises(ValueError, match="expected one named 'pointwise_kernel'"):
        from_weights(
            {
                "gate_kernel": normal(1, 1, 2, 3),
                "recurrent_gate_kernel": normal(1, 1, 1, 3),
                "depthwise_kernel": normal(3, 3, 2, 1),
                "recurrent_depthwise_kernel": normal(3, 3, 1, 1),
            },
            "AttentionConvLSTM",
        )


@pytest.mark.parametrize(
    ("options", "layout", "message"),
    [
        ({"num_layers": 2}, "Keras", "num_layers: layout 'Keras' has one"),
        ({"bidirectional": True}, "ndrplz", "bidirectional: layout 'ndrplz'"),
        ({"groups": 1, "peephole": "channel"}, "Flax", "peephole: expected none"),
        ({"recurrent_kernel_size": 5}, "ndrplz", "recurrent_kernel_size: expected the size of the input kernel"),
        ({}, "OpenSTL", "bias: expected none"),
        ({}, "AttentionConvLSTM", "module: expected a PooledGateConvLSTM2d"),
        ({"gate_activation": "hard_sigmoid"}, "Flax", "gate_activation: layout 'Flax' has 'sigmoid', got 'hard_sig"),
        ({"dilation": 2}, "ndrplz", r"recurrent_dilation: layout 'ndrplz' has \(1, 1\), got \(2, 2\)"),
        ({"dilation": 2, "recurrent_dilation": 1}, "kamo-naoyuki", r"recurrent_dilation: .* has \(2, 2\)"),
        (
            {"bidirectional": True, "merge_mode": "sum"},
            "kamo-naoyuki",
            "merge_mode: layout 'kamo-naoyuki' has 'concat'",
        ),
    ],
)
def test_layers_that_a_library_cannot_have(options: dict, layout: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_weights(ConvLSTM2d(CIN, C, 3, **options), layout)


def test_groups_and_pooled_gates_have_no_place_elsewhere() -> None:
    with pytest.raises(ValueError, match="groups"):
        to_weights(ConvLSTM2d(4, 4, 3, groups=2), "kamo-naoyuki")
    with pytest.raises(ValueError, match="module: expected a ConvLSTM2d"):
        to_weights(PooledGateConvLSTM2d(4, 4, 3), "Keras")


# --- Keras ------------------------------------------------------------------------------------------------------------


def keras_weights(kernel: tuple[int, int] = (3, 3), directions: int = 1, bias: bool = True) -> list[dict[str, Tensor]]:
    names = ("kernel", "recurrent_kernel", "bias")[: 3 if bias else 2]
    shapes = {"kernel": (*kernel, CIN, 4 * C), "recurrent_kernel": (*kernel, C, 4 * C), "bias": (4 * C,)}
    return [{name: normal(*shapes[name]) for name in names} for _ in range(directions)]


OPTIONS = {
    "defaults": {},
    "same": {"padding": "same", "return_sequences": True},
    "even kernel, same": {"padding": "same", "return_sequences": True, "kernel": (2, 4)},
    "even kernel, valid": {"kernel": (4, 2)},
    "strides, valid": {"strides": (2, 1)},
    "strides, same": {"padding": "same", "strides": (2, 2)},
    "strides, same, even kernel": {"padding": "same", "strides": (2, 3), "kernel": (4, 2)},
    "strides larger than the kernel": {"padding": "same", "strides": (3, 3), "kernel": (1, 2)},
    "dilation": {"padding": "same", "dilation_rate": (2, 1)},
    "dilation, valid": {"dilation_rate": (1, 2)},
    "backwards": {"go_backwards": True, "return_sequences": True},
    "backwards, last output": {"go_backwards": True, "padding": "same"},
    "state": {"return_state": True, "padding": "same"},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("size", [(6, 7), (7, 8)])
def test_keras_options(name: str, size: tuple[int, int]) -> None:
    config = dict(OPTIONS[name])
    weights = keras_weights(config.pop("kernel", (3, 3)), bias=config.pop("bias", True))
    layer = convert_twins.ConvLSTM2D(weights, (None, None, *size, CIN), **config)
    fused = from_keras(layer)
    x = normal(B, T, *size, CIN)
    expected, *states = layer(x)
    actual = fused(x)
    if config.get("return_state"):
        for a, e in zip(actual, (expected, *states), strict=True):
            torch.testing.assert_close(a, e)
    else:
        torch.testing.assert_close(actual, expected)
    for a, e in zip(to_keras(fused), layer.get_weights(), strict=True):
        assert np.array_equal(a, e)


@pytest.mark.parametrize("size", [(5, 5), (6, 6), (7, 9), (8, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("kernel", [(1, 2), (3, 4), (5, 5)])
def test_same_padding_depends_on_the_size(size: tuple, stride: tuple, kernel: tuple) -> None:
    (top, bottom), (left, right) = same_padding_strided(size, kernel, stride)
    x = normal(1, 2, *size)
    expected = convert_twins.same_pad(x, kernel, stride, (1, 1))
    assert torch.equal(torch.nn.functional.pad(x, (left, right, top, bottom)), expected)


def test_keras_size_is_checked_where_the_padding_depends_on_it() -> None:
    weights = list(keras_weights()[0].values())
    with pytest.raises(ValueError, match="input_size: expected the height and width"):
        from_keras(weights, padding="same", strides=2)
    fused = from_keras(weights, padding="same", strides=2, input_size=(6, 6))
    with pytest.raises(ValueError, match=r"inputs: expected frames of \(6, 6\)"):
        fused(normal(B, T, 7, 6, CIN))


def test_keras_state_and_channels_first() -> None:
    weights = keras_weights()
    layer = convert_twins.ConvLSTM2D(weights, padding="same", return_sequences=True)
    fused = from_keras(layer, data_format="channels_first", return_state=True)
    x, h, c = normal(B, T, *SIZE, CIN), normal(B, *SIZE, C), normal(B, *SIZE, C)
    actual = fused(x.movedim(-1, 2), [h.movedim(-1, 1), c.movedim(-1, 1)])
    for a, e in zip(actual, layer(x, (h, c)), strict=True):
        torch.testing.assert_close(a.movedim(-3, -1), e)
    with pytest.raises(ValueError, match="initial_state: expected 2 tensors, h and c of each layer, got 1"):
        fused(x.movedim(-1, 2), [h.movedim(-1, 1)])


def test_keras_stateful() -> None:
    layer = convert_twins.ConvLSTM2D(keras_weights(), padding="same", return_sequences=True)
    fused = from_keras(layer, stateful=True)
    x = normal(B, 2 * T, *SIZE, CIN)
    expected, *_ = layer(x)
    chunks = torch.cat([fused(x[:, :T]), fused(x[:, T:])], dim=1)
    torch.testing.assert_close(chunks, expected)
    fused.reset_states()
    torch.testing.assert_close(fused(x[:, :T]), expected[:, :T])


@pytest.mark.parametrize("mode", ["concat", "sum", "ave", "mul"])
@pytest.mark.parametrize("sequences", [True, False])
def test_keras_bidirectional(mode: str, sequences: bool) -> None:
    layer = convert_twins.Bidirectional(
        keras_weights(directions=2), padding="same", return_sequences=sequences, return_state=True, merge_mode=mode
    )
    fused = from_keras(layer)
    x = normal(B, T, *SIZE, CIN)
    for a, e in zip(fused(x), layer(x), strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(to_keras(fused), layer.get_weights(), strict=True):
        assert np.array_equal(a, e)


@pytest.mark.parametrize(
    ("version", "activation", "gate"),
    [
        (None, None, "sigmoid"),
        ("3.0.0", None, "sigmoid"),
        ("2.15.0", None, "hard_sigmoid of Keras 2"),
        ("2", None, "hard_sigmoid of Keras 2"),
        ("10.1", "hard_sigmoid", "hard_sigmoid of Keras 3"),
        ("2.4.3", "sigmoid", "sigmoid"),
        ("2.15.0", "hard_sigmoid", "hard_sigmoid of Keras 2"),
        ("3.5.0", "hard_sigmoid", "hard_sigmoid of Keras 3"),
        ("3.5.0", {"class_name": "function", "config": "hard_sigmoid"}, "hard_sigmoid of Keras 3"),
        ("3.5.0", torch.sigmoid, "sigmoid"),
    ],
)
def test_keras_versions_and_gates(version: str | None, activation: object, gate: str) -> None:
    weights = keras_weights()
    layer = convert_twins.ConvLSTM2D(weights, gate=gate)
    chosen = {} if activation is None else {"recurrent_activation": activation}
    fused = from_keras(list(weights[0].values()), keras_version=version, **chosen)
    x = 3 * normal(B, T, *SIZE, CIN)
    torch.testing.assert_close(fused(x), layer(x)[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "relu"}, "activation: expected 'tanh', got 'relu'"),
        ({"recurrent_activation": "tanh"}, "recurrent_activation: expected 'sigmoid'"),
        ({"dropout": 0.2}, "dropout: expected 0"),
        ({"recurrent_dropout": 0.2}, "recurrent_dropout: expected 0"),
        ({"padding": "causal"}, "padding: expected one of"),
        ({"data_format": "nchw"}, "data_format: expected one of"),
        ({"strides": (1, 2, 3)}, "strides: expected a number or two"),
        ({"filters": 3}, "filters: no option"),
        ({"merge_mode": "sum"}, "merge_mode: expected none"),
        ({"keras_version": "newest"}, "keras_version: expected one such as"),
        ({"name": "lstm"}, "name: expected None where source is no file"),
    ],
)
def test_keras_refusals(config: dict, message: str) -> None:
    weights = list(keras_weights()[0].values())
    with pytest.raises(ValueError, match=message):
        from_keras(weights, **config)


def test_keras_dropout_can_be_left_out() -> None:
    layer = convert_twins.ConvLSTM2D(keras_weights(), dropout=0.3, recurrent_dropout=0.2)
    with pytest.raises(ValueError, match="one mask a gate"):
        from_keras(layer)
    x = normal(B, T, *SIZE, CIN)
    torch.testing.assert_close(from_keras(layer, dropout=0.0, recurrent_dropout=0.0)(x), layer(x)[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"merge_mode": None}, "merge_mode: expected one of"),
        ({"merge_mode": "sum", "stateful": True}, "stateful: expected False"),
        ({"merge_mode": "sum", "go_backwards": True}, "go_backwards: expected False"),
        ({"merge_mode": "concat", "data_format": "channels_first"}, "data_format: expected 'channels_last'"),
    ],
)
def test_keras_bidirectional_refusals(config: dict, message: str) -> None:
    weights = [array for one in keras_weights(directions=2) for array in one.values()]
    with pytest.raises(ValueError, match=message):
        from_keras(weights, **config)
    assert from_keras(weights).lstm.merge_mode == "concat"  # Keras' default


def test_keras_backward_layer_with_options_of_its_own() -> None:
    """Keras 3 writes the options of both layers; they may differ."""
    layer = convert_twins.Bidirectional(keras_weights(directions=2), merge_mode="sum", return_sequences=True)
    config = layer.get_config()
    backward = config["layer"] | {"config": config["layer"]["config"] | {"go_backwards": True}}
    layer.get_config = lambda: config | {"backward_layer": backward}
    x = normal(B, T, *SIZE, CIN)
    torch.testing.assert_close(from_keras(layer)(x), layer(x)[0])
    backward["config"]["recurrent_activation"] = "hard_sigmoid"
    with pytest.raises(ValueError, match="backward_layer: expected the options of the forward layer, recurrent_activ"):
        from_keras(layer)


def test_keras_sources_that_are_none() -> None:
    class Dense(convert_twins.KerasLayer):
        pass

    with pytest.raises(ValueError, match="expected a ConvLSTM2D, or Bidirectional around one, got Dense"):
        from_keras(Dense(keras_weights()))
    with pytest.raises(ValueError, match="build it first"):
        from_keras(convert_twins.ConvLSTM2D([]))
    with pytest.raises(ValueError, match="kernel, recurrent_kernel and bias for each direction, got 1"):
        from_keras([normal(3, 3, 3, 20)])
    with pytest.raises(ValueError, match="source: expected a Keras layer"):
        from_keras(3)
    with pytest.raises(ValueError, match="num_layers"):
        to_keras(ConvLSTM2d(CIN, C, 3, 2))
    with pytest.raises(ValueError, match="groups"):
        to_keras(ConvLSTM2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="module: expected a KerasConvLSTM2D or a ConvLSTM2d, got Linear"):
        to_keras(nn.Linear(3, 4))


class Files:
    """Files of one model with two layers, "first" and, bidirectional, "second", in each of Keras' formats."""

    def __init__(self, folder: Path) -> None:
        self.h5py = pytest.importorskip("h5py")
        self.folder = folder
        self.first = convert_twins.ConvLSTM2D(keras_weights(), padding="same", return_sequences=True)
        self.second = convert_twins.Bidirectional(
            keras_weights(directions=2), padding="same", strides=(2, 2), return_sequences=False, merge_mode="ave",
            return_state=False,
        )  # fmt: skip
        shape = [None, T, *SIZE, CIN]
        layers = [
            {"class_name": "InputLayer", "config": {"name": "input"}},
            {"class_name": "ConvLSTM2D", "config": self.first.config | {"name": "first"}},
            {
                "class_name": "Sequential",
                "config": {
                    "layers": [
                        {
                            "class_name": "Bidirectional", "config": self.second.get_config() | {"name": "second"},
                            "build_config": {"input_shape": shape},
                        }
                    ]
                },
            },
        ]  # fmt: skip
        self.config = json.dumps({"class_name": "Functional", "config": {"name": "net", "layers": layers}})

    def weights(self, path: Path, named: bool = True) -> Path:
        self.named = named
        with self.h5py.File(path, "w") as file:
            self.put(file, "layers/conv_lstm2d", "first", self.first.weights[0])
            second = "layers/sequential/layers/bidirectional"
            if named:
                file.create_group(f"{second}/vars").attrs["name"] = "second"
            for side, weights in zip(("forward", "backward"), self.second.weights, strict=True):
                self.put(file, f"{second}/{side}_layer", f"{side}_conv_lstm2d", weights)
            dense = file.create_group("layers/dense/vars")
            dense.attrs["name"] = "dense"
            dense["0"] = np.zeros((3, 4))
        return path

    def put(self, file, group: str, name: str, weights: dict[str, Tensor]) -> None:
        if self.named:
            file.create_group(f"{group}/vars").attrs["name"] = name
        for k, array in enumerate(weights.values()):
            file[f"{group}/cell/vars/{k}"] = array.numpy()

    def keras(self, version: str) -> Path:
        weights = self.weights(self.folder / "inner.weights.h5", named=version > "3")
        with zipfile.ZipFile(self.folder / "net.keras", "w") as archive:
            archive.writestr("config.json", self.config)
            archive.writestr("metadata.json", json.dumps({"keras_version": version}))
            archive.write(weights, "model.weights.h5")
        return self.folder / "net.keras"

    def h5(self, version: str, cell: str, ending: str) -> Path:
        with self.h5py.File(self.folder / "net.h5", "w") as file:
            file.attrs["keras_version"] = version
            file.attrs["model_config"] = self.config
            for name, array in self.first.weights[0].items():
                file[f"model_weights/first/first/{cell}{name}{ending}"] = array.numpy()
            for side, weights in zip(("forward", "backward"), self.second.weights, strict=True):
                for name, array in weights.items():
                    file[f"model_weights/second/second/{side}_conv_lstm2d/{cell}{name}{ending}"] = array.numpy()
        return self.folder / "net.h5"


@pytest.mark.parametrize("kind", ["keras", "keras of Keras 2", "h5 of Keras 3", "h5 of Keras 2", "older h5"])
def test_keras_model_files(kind: str, tmp_path: Path) -> None:
    files = Files(tmp_path)
    path = {
        "keras": lambda: files.keras("3.5.0"),
        "keras of Keras 2": lambda: files.keras("2.15.0"),
        "h5 of Keras 3": lambda: files.h5("3.15.1", "conv_lstm_cell/", ""),
        "h5 of Keras 2": lambda: files.h5("2.15.0", "conv_lstm_cell/", ":0"),
        "older h5": lambda: files.h5("2.4.0", "", ":0"),
    }[kind]()
    if "2" in kind.split()[-1] or kind == "older h5":
        files.first.gate = files.second.gate = "hard_sigmoid of Keras 2"
    x = normal(B, T, *SIZE, CIN)
    torch.testing.assert_close(from_keras(path, "first")(x), files.first(x)[0])
    size = {} if kind != "older h5" else {"input_size": SIZE}  # what stands in the file, or what the user says
    torch.testing.assert_close(from_keras(str(path), "second", **size)(x), files.second(x)[0])
    with pytest.raises(ValueError, match=r"name: expected one of 'first', 'second' in net.*got None"):
        from_keras(path)
    with pytest.raises(ValueError, match="got 'third'"):
        from_keras(path, "third")


def test_keras_weight_files(tmp_path: Path) -> None:
    files = Files(tmp_path)
    path = files.weights(tmp_path / "net.weights.h5")
    x = normal(B, T, *SIZE, CIN)
    fused = from_keras(path, "first", padding="same", return_sequences=True)
    torch.testing.assert_close(fused(x), files.first(x)[0])
    fused = from_keras(path, "second", padding="same", strides=2, merge_mode="ave", input_size=SIZE)
    torch.testing.assert_close(fused(x), files.second(x)[0])
