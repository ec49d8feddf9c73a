"""Bad input: a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_convlstm import ConvLSTM2d, ConvLSTM2dCell, PooledGateConvLSTM2d, PooledGateConvLSTM2dCell
from fused_convlstm import functional as FC

x = torch.zeros(4, 2, 3, 8, 7)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 5, 3), {}, "in_channels: expected an int of at least 1, got 0"),
        ((3, (5, 6), 3), {}, r"hidden_channels: .* one for each of 1 layers, got \(5, 6\)"),
        ((True, 5, 3), {}, "in_channels: .* got True"),
        ((3, 5.0, 3), {}, "hidden_channels: .* got 5.0"),
        ((3, 5, 0), {}, "kernel_size: .* got 0"),
        ((3, 5, 3.0), {}, "kernel_size: expected an int or two ints, at least 1, got 3.0"),
        ((3, 5, (3, 3, 3)), {}, r"kernel_size: .* got \(3, 3, 3\)"),
        ((3, 5, 3, 0), {}, "num_layers: .* got 0"),
        ((3, 5, 3), {"stride": 0}, "stride: .* got 0"),
        ((3, 5, 3), {"padding": "full"}, "padding: expected 'same', 'valid' or numbers, got 'full'"),
        ((3, 5, 3), {"padding": -1}, "padding: .* got -1"),
        ((3, 5, 3), {"padding": 1.0}, "padding: .* got 1.0"),
        ((3, 5, 3), {"groups": 1.0}, "groups: expected an int of at least 1, got 1.0"),
        ((3, 5, 3), {"groups": 2}, r"groups: expected a divisor of the input channels \(3\)"),
        ((3, 5, 3), {"padding_mode": "mirror"}, "padding_mode: expected one of 'zeros'.* got 'mirror'"),
        ((3, 5, 3), {"gate_activation": "relu"}, "gate_activation: expected one of .* got 'relu'"),
        ((3, 5, 3), {"dropout": 1.5}, "dropout: .* got 1.5"),
        ((3, 5, 3), {"merge_mode": "max"}, "merge_mode: .* got 'max'"),
        ((3, 5, 3), {"peephole": "full"}, "peephole: .* got 'full'"),
        ((3, 5, 3), {"peephole": "pixel"}, "image_size: .* got None with peephole='pixel'"),
        ((3, 5, 3), {"image_size": 8}, "image_size: .* got 8 with peephole='none'"),
        (
            (3, 5, 5, 2),
            {"padding": "valid", "peephole": "pixel", "image_size": 8},
            r"image_size: .* kernel \(5, 5\) in every layer, got frames of \(4, 4\)",
        ),
    ],
)
def test_constructor(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvLSTM2d(*arguments, **options)


@pytest.mark.parametrize(
    ("input", "options", "message"),
    [
        (x[0, 0], {}, r"input: expected 5 dimensions, or 4 without a batch, got shape \(3, 8, 7\)"),
        (x[:, :, :2], {}, r"input: expected 3 channels, got shape \(4, 2, 2, 8, 7\)"),
        (x[:0], {}, "input: expected at least one step"),
        (x.long(), {}, "input: expected a floating-point type, got torch.int64"),
        (x.double(), {}, "weight_ih: expected torch.float64 on cpu like input, got torch.float32"),
        (x.to("meta"), {}, "weight_ih: expected torch.float32 on meta like input, got torch.float32 on cpu"),
        (x, {"hx": x}, r"hx: expected a pair \(h_0, c_0\), got Tensor"),
        (x[:, 0], {"hx": x}, r"hx: expected a pair \(h_0, c_0\), got Tensor"),
        (x, {"hx": (None, None)}, "h_0: expected a tensor or a tuple of tensors, got None"),
        (x, {"hx": ((None,), (None,))}, "h_0: expected a tensor, got NoneType"),
        (x, {"reset": [True] * 4}, "reset: expected a boolean tensor with 2 dimensions, got list"),
        (x, {"reset": torch.zeros(4).bool()}, r"reset: .* 2 dimensions, got shape \(4,\)"),
        (x[:, :, :, :0], {}, r"input: expected frames with channels and pixels, got shape \(4, 2, 3, 0, 7\)"),
        (x, {"hx": (torch.zeros(2, 2, 5, 8, 7),) * 2}, r"h_0: expected 1 states .* got 2"),
        (x, {"hx": (torch.zeros(1, 2, 5, 8, 6),) * 2}, r"h_0: expected shape \(2, 5, 8, 7\), got \(2, 5, 8, 6\)"),
        (
            x,
            {"hx": (torch.zeros(1, 2, 5, 8, 7), torch.zeros(1, 2, 5, 8, 7).half())},
            "c_0: expected torch.float32 on cpu, got torch.float16",
        ),
        (x, {"lengths": [4, 5]}, "lengths: expected values from 0 to T = 4, got 4 to 5"),
        (x, {"lengths": [-1, 4]}, "lengths: expected values from 0 to T = 4, got -1 to 4"),
        (x, {"lengths": [4]}, r"lengths: expected 2 integers, one a sample, got torch.int64 of shape \(1,\)"),
        (x, {"lengths": [0.5, 1.0]}, "lengths: expected 2 integers"),
        (x, {"reset": torch.zeros(4, 2)}, "reset: expected a boolean tensor of shape .* got torch.float32"),
        (x, {"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"reset: .* \(4, 2\), got torch.bool of shape \(2, 4\)"),
    ],
)
@pytest.mark.parametrize("layer", [ConvLSTM2d, PooledGateConvLSTM2d])
def test_forward(layer: Any, input: torch.Tensor, options: dict[str, Any], message: str) -> None:
    if layer is PooledGateConvLSTM2d:
        message = message.replace("weight_ih", "gate_weight_ih")
    with pytest.raises(ValueError, match=message):
        layer(3, 5, 3)(input, **options)


def test_image_smaller_than_the_kernel() -> None:
    with pytest.raises(ValueError, match=r"input: expected frames no smaller than the kernel \(9, 9\)"):
        ConvLSTM2d(3, 5, 9, padding="valid")(x)


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_padding_wider_than_the_image(mode: str) -> None:
    with pytest.raises(ValueError, match=f"padding_mode: '{mode}' padding .* too large for input frames of"):
        ConvLSTM2d(3, 5, 17, padding_mode=mode)(x)
    with pytest.raises(ValueError, match=f"padding_mode: '{mode}' padding .* too large for state frames of"):
        ConvLSTM2d(3, 5, 3, recurrent_kernel_size=17, padding_mode=mode)(x)


def test_functional_shapes() -> None:
    weight_ih, weight_hh = torch.zeros(20, 3, 3, 3), torch.zeros(20, 5, 3, 3)
    with pytest.raises(ValueError, match="input: expected 5 dimensions"):
        FC.conv_lstm2d(x[0], weight_ih, weight_hh)
    with pytest.raises(ValueError, match=r"weight_ih: expected shape \(4 \* C, 3, kh, kw\) .* got \(21, 3, 3, 3\)"):
        FC.conv_lstm2d(x, torch.zeros(21, 3, 3, 3), weight_hh)
    with pytest.raises(ValueError, match=r"weight_hh: expected shape \(20, 5, rh, rw\), got \(20, 4, 3, 3\)"):
        FC.conv_lstm2d(x, weight_ih, weight_hh[:, :4])
    with pytest.raises(ValueError, match=r"bias: expected shape \(20,\), got \(5,\)"):
        FC.conv_lstm2d(x, weight_ih, weight_hh, torch.zeros(5))
    with pytest.raises(ValueError, match=r"peephole: expected shape \(3, 5, 8, 7\), got \(3, 5, 8, 8\)"):
        FC.conv_lstm2d(x, weight_ih, weight_hh, peephole=torch.zeros(3, 5, 8, 8))
    with pytest.raises(ValueError, match="groups: expected a divisor"):
        FC.conv_lstm2d(x, weight_ih, weight_hh, groups=2)
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        FC.conv_lstm2d(x, weight_ih, weight_hh, backend="gpu")


def test_packed_sequence_has_its_own_lengths() -> None:
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [4, 3])
    with pytest.raises(ValueError, match="lengths: expected None with a PackedSequence"):
        ConvLSTM2d(3, 5, 3)(packed, lengths=[4, 3])


@pytest.mark.parametrize("cell", [ConvLSTM2dCell, PooledGateConvLSTM2dCell])
def test_cell_arguments(cell: Any) -> None:
    with pytest.raises(ValueError, match="hidden_channels: expected an int of at least 1, got 0"):
        cell(3, 0, 3)
    with pytest.raises(ValueError, match="in_channels: expected an int of at least 1, got -3"):
        cell(-3, 4, 3)
    with pytest.raises(ValueError, match="hx: expected a pair"):
        cell(3, 4, 3)(x[0, 0], x[0, 0])


def test_numbers_of_numpy() -> None:
    three, four = np.int64(3), np.int64(4)
    assert ConvLSTM2d(three, four, three, padding=three)(x)[0].shape == (4, 2, 4, 12, 11)
    assert ConvLSTM2dCell(three, four, three)(x[0])[0].shape == (2, 4, 8, 7)


def test_empty_batch_with_lengths() -> None:
    assert ConvLSTM2d(3, 4, 3)(x[:, :0], lengths=[])[0].shape == (4, 0, 4, 8, 7)


def test_lengths_without_values() -> None:
    with torch.device("meta"):
        assert ConvLSTM2d(3, 4, 3)(x.to("meta"), lengths=[4, 3])[0].device.type == "meta"
    with FakeTensorMode():
        assert ConvLSTM2d(3, 4, 3)(torch.zeros(4, 2, 3, 8, 7), lengths=torch.tensor([4, 3]))[0].shape[0] == 4


def test_cell_rank() -> None:
    with pytest.raises(ValueError, match="input: expected 4 dimensions, or 3 without a batch"):
        ConvLSTM2dCell(3, 5, 3)(x)
