"""The layers with attention: against their references, numerically safe, with the habits of nn.LSTM, counted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kernel_checks import poisoned_memory
from tolerances import assert_within_error_bar
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.flop_counter import FlopCounterMode

from fused_convlstm import (
    ALSTM,
    ConvALSTM2d,
    ConvLSTM2d,
    InputAttentionConvLSTM2d,
    InputGateAttentionConvLSTM2d,
    MotionAttentionConvLSTM2d,
    OutputGateAttentionConvLSTM2d,
    PooledGateConvLSTM2d,
    explain,
    reference_attention,
    use_backend,
)
from fused_convlstm.backends.call import ConvLSTMOptions, same_padding
from fused_convlstm.reference import sequence
from fused_convlstm.reference_attention import SoftAttentionWeights, VariantWeights

STEPS, BATCH, IN_CHANNELS, CHANNELS, SIZE = 4, 2, 3, 5, (6, 7)


def variant(cell: Any) -> Any:
    """A reference cell called with a layer's weights one by one."""
    return lambda x, h, c, *weights: cell(x, h, c, VariantWeights.of(weights[:-1]), weights[-1])


def soft_attention(cell: Any) -> Any:
    return lambda x, h, c, *weights: cell(x, h, c, *weights[:3], SoftAttentionWeights(*weights[3:7]), weights[7])


# A layer and its reference cell.
LAYERS: dict[str, tuple[Any, Any]] = {
    "b": (InputAttentionConvLSTM2d, variant(reference_attention.input_attention_conv_lstm2d_cell)),
    "c": (InputGateAttentionConvLSTM2d, variant(reference_attention.input_gate_attention_conv_lstm2d_cell)),
    "d": (OutputGateAttentionConvLSTM2d, variant(reference_attention.output_gate_attention_conv_lstm2d_cell)),
    "conv_alstm": (ConvALSTM2d, soft_attention(reference_attention.conv_alstm2d_cell)),
}
BACKENDS = ["reference", "auto"]


def equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def same_options(kernel: tuple[int, int]) -> ConvLSTMOptions:
    return ConvLSTMOptions(padding=same_padding(kernel, (1, 1)))


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(STEPS, BATCH, IN_CHANNELS, *SIZE, generator=torch.Generator().manual_seed(1))


def randomized(layer: nn.Module, scale: float = 0.3) -> nn.Module:
    """Weights and biases that leave no term out by being zero."""
    generator = torch.Generator().manual_seed(2)
    for parameter in layer.parameters():
        parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return layer


def results_and_gradients(layer: nn.Module, run: Any, *inputs: Tensor) -> dict[str, Tensor]:
    """Every result of ``run(*inputs)`` and every gradient of their weighted sum."""
    layer.zero_grad()
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = run(*leaves)
    generator = torch.Generator().manual_seed(3)
    scales = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value) for value in outputs]
    total = sum((value * scale).sum() for value, scale in zip(outputs, scales, strict=True))
    total.backward()
    found = {f"result {k}": value.detach() for k, value in enumerate(outputs)}
    found |= {f"gradient of input {k}": leaf.grad for k, leaf in enumerate(leaves)}
    return found | {f"gradient of {name}": p.grad.clone() for name, p in layer.named_parameters()}


def flat(results: tuple[Any, ...]) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [value for part in results for value in flat(part)]


def run_reference(layer: Any, cell: Any, input: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
    weights = [getattr(layer, f"{name}_l0") for name in layer._shapes(1, 1)]
    arguments = (*weights, same_options(layer.convolution.kernel_size))
    output, h_n, c_n, attention = sequence(cell, input, h[0], c[0], None, False, arguments)
    return [output, h_n[None], c_n[None], attention]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [(3, 3), (2, 1)])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_reference(name: str, kernel: tuple[int, int], backend: str, clips: Tensor) -> None:
    kind, cell = LAYERS[name]
    layer = randomized(kind(IN_CHANNELS, CHANNELS, kernel, backend=backend))
    state = [torch.randn(1, BATCH, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(k)) for k in (4, 5)]

    def module(x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        return flat(layer(x, (h, c), return_attention=True))

    def reference(x: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        return run_reference(layer, cell, x, h, c)

    plain = results_and_gradients(layer, reference, clips, *state)
    with poisoned_memory():
        actual = results_and_gradients(layer, module, clips, *state)
    layer.double()
    exact = results_and_gradients(layer, reference, clips.double(), *(s.double() for s in state))
    assert_within_error_bar(actual, plain, exact, torch.float32)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_of_the_reference(name: str) -> None:
    kind, cell = LAYERS[name]
    layer = randomized(kind(2, 2, 3, dtype=torch.float64))
    names = [f"{name}_l0" for name in layer._shapes(1, 1)]
    weights = [getattr(layer, name).detach().requires_grad_() for name in names]
    x, h, c = (torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    options = same_options((3, 3))
    assert torch.autograd.gradcheck(lambda *args: cell(*args, options), (x, h, c, *weights), fast_mode=True)


def test_gradcheck_of_alstm() -> None:
    layer = randomized(ALSTM(2, 3, dtype=torch.float64))
    weights = [p.detach().requires_grad_() for p in layer.parameters()]
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    h, c = (torch.randn(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cell = soft_attention(reference_attention.alstm_cell)
    assert torch.autograd.gradcheck(lambda *args: cell(*args, "sigmoid"), (x, h, c, *weights), fast_mode=True)


def test_alstm_is_an_lstm_on_single_pixels() -> None:
    """Where there is one place to look at, attention changes nothing."""
    layer, lstm = randomized(ALSTM(3, 5)), nn.LSTM(3, 5)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(layer.weight_ih_l0)
        lstm.weight_hh_l0.copy_(layer.weight_hh_l0)
        lstm.bias_ih_l0.copy_(layer.bias_l0)
        lstm.bias_hh_l0.zero_()
    x = torch.randn(4, 2, 3, 1, 1)
    output, (h_n, c_n) = layer(x)
    expected, (h_expected, c_expected) = lstm(x.flatten(2))
    close(output, expected)
    close(h_n, h_expected)
    close(c_n, c_expected)


def test_alstm_looks_where_its_attention_is(clips: Tensor) -> None:
    layer = randomized(ALSTM(IN_CHANNELS, CHANNELS))
    _, _, (attention,) = layer(clips, return_attention=True)
    close(attention.sum(dim=(2, 3, 4)), torch.ones(STEPS, BATCH))
    changed = clips.clone()
    changed[0, :, :, 2, 3] += 1.0
    assert not torch.equal(layer(changed)[0][0], layer(clips)[0][0])


@pytest.mark.parametrize(("name", "plain"), [("b", PooledGateConvLSTM2d), ("conv_alstm", ConvLSTM2d)])
def test_even_attention_is_the_layer_without(name: str, plain: Any, clips: Tensor) -> None:
    """With a zero attention_weight the map is 1 / (H * W) everywhere."""
    layer = randomized(LAYERS[name][0](IN_CHANNELS, CHANNELS, 3))
    layer.attention_weight_l0.data.zero_()
    without = plain(IN_CHANNELS, CHANNELS, 3)
    own = dict(layer.named_parameters())
    without.load_state_dict({key: own[key] for key in without.state_dict()})
    close(layer(clips)[0], without(clips / (SIZE[0] * SIZE[1]))[0])


@pytest.mark.parametrize(("name", "open_gate", "order"), [("c", 0, (1, 2)), ("d", 2, (0, 1))])
def test_even_gate_is_an_open_gate(name: str, open_gate: int, order: tuple[int, int], clips: Tensor) -> None:
    """With a zero attention_pointwise the gate is 1 everywhere: variant (a) with that gate's bias at infinity."""
    layer = randomized(LAYERS[name][0](IN_CHANNELS, CHANNELS, 3))
    layer.attention_pointwise_l0.data.zero_()
    pooled = PooledGateConvLSTM2d(IN_CHANNELS, CHANNELS, 3)
    weights = {key: value.clone() for key, value in pooled.state_dict().items()}
    own = dict(layer.named_parameters())
    for key, value in weights.items():
        if not key.startswith("gate_"):
            value.copy_(own[key].data)
            continue
        gates = value.chunk(3)
        gates[open_gate].fill_(100.0 if key == "gate_bias_l0" else 0.0)
        for gate, block in zip(order, own[key].data.chunk(2), strict=True):
            gates[gate].copy_(block)
    pooled.load_state_dict(weights)
    close(layer(clips)[0], pooled(clips)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_motion_attention_is_its_reference(backend: str, clips: Tensor) -> None:
    """Two whole sequences through the operator are what the paper's step, run step by step, gives."""
    layer = randomized(
        MotionAttentionConvLSTM2d(IN_CHANNELS, 2, CHANNELS, 3, motion_hidden_channels=4, backend=backend)
    )
    generator = torch.Generator().manual_seed(4)
    motion = torch.randn(STEPS, BATCH, 2, *SIZE, generator=generator)
    states = [torch.randn(1, BATCH, channels, *SIZE, generator=generator) for channels in (5, 5, 4, 4)]
    options = [same_options((3, 3)), same_options((1, 1))]

    def module(x: Tensor, m: Tensor, *s: Tensor) -> list[Tensor]:
        return flat(layer(x, m, ((s[0], s[1]), (s[2], s[3])), return_attention=True))

    def reference(x: Tensor, m: Tensor, *s: Tensor) -> list[Tensor]:
        h, c, h_m, c_m = (value[0] for value in s)
        lstms = [(lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_l0) for lstm in (layer.prediction, layer.motion)]
        own = (layer.attention_weight_ih, layer.attention_weight_hh, layer.attention_bias, layer.attention_weight)
        outputs, maps = [], []
        for t in range(STEPS):
            h, c, h_m, c_m, attention = reference_attention.motion_attention_conv_lstm2d_cell(
                x[t], m[t], h, c, h_m, c_m, *lstms[0], *lstms[1], SoftAttentionWeights(*own), *options
            )
            outputs.append(h)
            maps.append(attention)
        return [torch.stack(outputs), h[None], c[None], h_m[None], c_m[None], torch.stack(maps)]

    plain = results_and_gradients(layer, reference, clips, motion, *states)
    actual = results_and_gradients(layer, module, clips, motion, *states)
    layer.double()
    exact = results_and_gradients(layer, reference, *(v.double() for v in (clips, motion, *states)))
    assert_within_error_bar(actual, plain, exact, torch.float32)
    text = str(explain(layer, clips.double(), motion.double()))
    assert "call 1: conv_lstm2d" in text
    assert "the attention map in plain PyTorch" in text


# --- numerical safety ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1.0, 1e2, 1e4])
def test_softmax_and_max_gates_are_safe(dtype: torch.dtype, magnitude: float) -> None:
    z = (magnitude * torch.randn(2, 3, 5, 7, dtype=torch.float64)).to(dtype).requires_grad_()
    attention, gate = reference_attention.spatial_softmax(z), reference_attention.max_gate(z)
    (attention.sum() + gate.sum()).backward()
    torch.testing.assert_close(attention.double().sum(dim=(2, 3)), torch.ones(2, 3).double(), atol=2e-2, rtol=0)
    equal(gate.amax(dim=(2, 3)), torch.ones(2, 3, dtype=dtype))
    assert gate.min() >= 0
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("magnitude", [1e4, 1e15])
def test_huge_inputs_give_no_nan(name: str, magnitude: float, clips: Tensor) -> None:
    layer = randomized(LAYERS[name][0](IN_CHANNELS, CHANNELS, 3), scale=100.0)
    x = (magnitude * clips).requires_grad_()
    output, (h_n, c_n), (attention,) = layer(x, return_attention=True)
    (output.sum() + c_n.sum()).backward()
    for value in (output, h_n, c_n, attention, *(p.grad for p in layer.parameters())):
        assert not value.isnan().any()
    assert attention.min() >= 0
    assert attention.max() <= 1


# --- the habits of nn.LSTM -----------------------------------------------------------------------------------------


def make(name: str, **options: Any) -> Any:
    if name == "alstm":
        return ALSTM(IN_CHANNELS, CHANNELS, **options)
    return LAYERS[name][0](IN_CHANNELS, CHANNELS, 3, **options)


EVERY = [*LAYERS, "alstm"]


@pytest.mark.parametrize("name", EVERY)
def test_chunks_equal_the_whole(name: str, clips: Tensor) -> None:
    layer = make(name)
    expected, state_expected, (attention_expected,) = layer(clips, return_attention=True)
    state, outputs, maps = None, [], []
    for chunk in clips.split([1, 3]):
        output, state, (attention,) = layer(chunk, state, return_attention=True)
        outputs.append(output)
        maps.append(attention)
    equal(torch.cat(outputs), expected)
    equal(torch.cat(maps), attention_expected)
    for actual, wanted in zip(state, state_expected, strict=True):
        equal(actual, wanted)


@pytest.mark.parametrize("name", EVERY)
def test_batch_first_unbatched_lengths_reset(name: str, clips: Tensor) -> None:
    layer = make(name, bidirectional=True)
    lengths, reset = (
        torch.tensor([STEPS, 2]),
        torch.rand(STEPS, BATCH, generator=torch.Generator().manual_seed(6)) < 0.4,
    )
    poisoned = clips.clone()
    poisoned[2:, 1] = torch.nan  # past the end: must not be seen
    poisoned.requires_grad_()
    output, (h_n, c_n), maps = layer(poisoned, lengths=lengths, reset=reset, return_attention=True)
    output.sum().backward()
    assert poisoned.grad[2:, 1].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert output[2:, 1].abs().max() == 0
    assert all(attention[2:, 1].abs().max() == 0 for attention in maps)

    single, (h_single, c_single), single_maps = layer(clips[:2, 1], reset=reset[:2, 1], return_attention=True)
    close(output[:2, 1], single)
    close(h_n[:, 1], h_single)
    close(c_n[:, 1], c_single)
    for attention, expected in zip(maps, single_maps, strict=True):
        close(attention[:2, 1], expected)

    packed_output, (h_packed, _) = layer(pack_padded_sequence(clips, lengths), reset=reset)
    close(pad_packed_sequence(packed_output)[0], output)
    close(h_packed, h_n)

    layer.batch_first = True
    first, _, first_maps = layer(clips.transpose(0, 1), lengths=lengths, reset=reset.T, return_attention=True)
    close(first.transpose(0, 1), output)
    close(first_maps[0].transpose(0, 1), maps[0])


def test_motion_attention_lengths_reset_chunks(clips: Tensor) -> None:
    layer = MotionAttentionConvLSTM2d(IN_CHANNELS, 2, CHANNELS, 3, batch_first=True)
    clips = clips.transpose(0, 1)
    motion = torch.randn(BATCH, STEPS, 2, *SIZE, generator=torch.Generator().manual_seed(7))
    whole, state_whole, attention_whole = layer(clips, motion, return_attention=True)
    first, state = layer(clips[:, :1], motion[:, :1])
    rest, state, attention = layer(clips[:, 1:], motion[:, 1:], state, return_attention=True)
    equal(torch.cat((first, rest), dim=1), whole)
    equal(attention, attention_whole[:, 1:])
    for actual, wanted in zip(flat(state), flat(state_whole), strict=True):
        equal(actual, wanted)

    reset = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    reset[:, 2] = True
    cut, _, attention_cut = layer(clips, motion, reset=reset, return_attention=True)
    close(cut[:, 2:], layer(clips[:, 2:], motion[:, 2:])[0])
    assert not torch.equal(attention_cut[:, 2], attention_whole[:, 2])

    poisoned = clips.clone()
    poisoned[1, 2:] = torch.nan
    output, _, attention = layer(poisoned, motion, lengths=[STEPS, 2], return_attention=True)
    output.sum().backward()
    assert attention[1, 2:].abs().max() == 0
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    close(output[1, :2], whole[1, :2])


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_copies_and_half_precision(name: str, clips: Tensor) -> None:
    layer = randomized(make(name))
    other = make(name)
    other.load_state_dict(layer.state_dict())
    expected = layer(clips)[0]
    equal(other(clips)[0], expected)
    equal(copy.deepcopy(layer)(clips)[0], expected)
    with torch.autocast("cpu", torch.bfloat16):
        output, (h_n, c_n) = layer(clips)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(output.float(), expected, atol=0.1, rtol=0)


def test_layers_stack(clips: Tensor) -> None:
    layer = InputAttentionConvLSTM2d(IN_CHANNELS, [5, 4], 3, num_layers=2, dropout=0.1)
    output, (h_n, _), maps = layer(clips, return_attention=True)
    assert output.shape == (STEPS, BATCH, 4, *SIZE)
    assert [tuple(h.shape) for h in h_n] == [(BATCH, 5, *SIZE), (BATCH, 4, *SIZE)]
    assert len(maps) == 2


def test_explain_tells_what_is_plain(clips: Tensor) -> None:
    with use_backend("reference"):
        assert "calls 0 to 3: pooled_gate_conv_lstm2d" in str(explain(make("b"), clips))
    assert str(explain(make("c"), clips)) == "InputGateAttentionConvLSTM2d: the whole cell in plain PyTorch"
    assert str(explain(make("alstm"), clips)) == "ALSTM: the whole cell in plain PyTorch"


def test_errors(clips: Tensor) -> None:
    with pytest.raises(ValueError, match="input: expected 3 channels"):
        make("b")(clips[:, :, :2])
    with pytest.raises(ValueError, match=r"h_0: expected shape \(2, 5, 6, 7\), got \(2, 5, 6, 6\)"):
        make("c")(clips, (torch.zeros(1, 2, 5, 6, 6), torch.zeros(1, 2, 5, 6, 7)))
    with pytest.raises(ValueError, match=r"gate_weight_ih_l0: expected torch.float64 .* got torch.float32"):
        make("d")(clips.double())
    with pytest.raises(ValueError, match="attention_kernel_size: expected an int or two ints"):
        ConvALSTM2d(3, 5, 3, attention_kernel_size=0)
    with pytest.raises(ValueError, match="motion: expected the shape of input"):
        MotionAttentionConvLSTM2d(3, 2, 5, 3)(clips, clips[:2, :, :2])


# --- the paper's counts --------------------------------------------------------------------------------------------


TABLE_1 = {  # Zhang et al., table 1, 256 channels: parameters with biases, the paper's mult-adds for a 28x28 step
    ConvLSTM2d: (4_719_616, 3700e6),
    PooledGateConvLSTM2d: (529_920, 415e6),
    InputAttentionConvLSTM2d: (668_160, 522e6),
    InputGateAttentionConvLSTM2d: (602_368, 472e6),
    OutputGateAttentionConvLSTM2d: (602_368, 472e6),
}


@pytest.mark.parametrize("kind", TABLE_1)
def test_parameter_counts_of_the_paper(kind: Any) -> None:
    assert sum(p.numel() for p in kind(256, 256, 3).parameters()) == TABLE_1[kind][0]


@pytest.mark.parametrize("kind", TABLE_1)
def test_mult_adds_beside_the_paper(kind: Any) -> None:
    """The paper counts every parameter once a pixel, gates too; pooled gates really cost one pixel's worth."""
    layer, frame = kind(256, 256, 3, backend="reference"), torch.zeros(1, 1, 256, 28, 28)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(frame)
    mult_adds = counter.get_total_flops() / 2
    pooled = sum(p.numel() for name, p in layer.named_parameters() if name.startswith("gate_weight"))
    as_the_paper = mult_adds + pooled * (28 * 28 - 1)
    assert as_the_paper == pytest.approx(TABLE_1[kind][1], rel=0.01)
