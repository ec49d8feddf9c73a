"""The modules: the habits of nn.LSTM, on the reference and on the CPU kernels."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fused_convlstm import (
    BackendError,
    ConvLSTM2d,
    ConvLSTM2dCell,
    PooledGateConvLSTM2d,
    PooledGateConvLSTM2dCell,
    explain,
    use_backend,
)
from fused_convlstm.backends.registry import requested_backend
from fused_convlstm.backends.settings import Settings

LAYERS = [ConvLSTM2d, PooledGateConvLSTM2d]
CELLS = [(ConvLSTM2d, ConvLSTM2dCell), (PooledGateConvLSTM2d, PooledGateConvLSTM2dCell)]


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    with use_backend(request.param):
        yield request.param


def equal(actual: Tensor, expected: Tensor) -> None:
    """To the last bit on the kernels; PyTorch's own convolutions promise that to nobody."""
    if requested_backend(None) == "reference":
        torch.testing.assert_close(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.fixture
def clips() -> Tensor:
    return torch.randn(6, 2, 3, 8, 7, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", LAYERS)
def test_shapes_and_names(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, 5, 3, num_layers=2, bidirectional=True)
    output, (h_n, c_n) = lstm(clips)
    assert output.shape == (6, 2, 10, 8, 7)
    assert h_n.shape == c_n.shape == (4, 2, 5, 8, 7)
    suffixes = {name.partition("_l")[2] for name, _ in lstm.named_parameters()}
    assert suffixes == {"0", "0_reverse", "1", "1_reverse"}


def test_parameter_names_of_conv_lstm2d() -> None:
    names = {name: tuple(p.shape) for name, p in ConvLSTM2d(3, 5, (3, 1), recurrent_kernel_size=5).named_parameters()}
    assert names == {"weight_ih_l0": (20, 3, 3, 1), "weight_hh_l0": (20, 5, 5, 5), "bias_l0": (20,)}


def test_parameter_counts_of_the_paper() -> None:
    """Zhang et al., table 1, with the biases of their code: 256 channels, 3x3."""
    assert sum(p.numel() for p in ConvLSTM2d(256, 256, 3).parameters()) == 4_719_616
    assert sum(p.numel() for p in PooledGateConvLSTM2d(256, 256, 3).parameters()) == 529_920


def test_initialization() -> None:
    lstm = ConvLSTM2d(3, 8, 3)
    assert lstm.bias_l0.tolist() == [0.0] * 8 + [1.0] * 8 + [0.0] * 16
    for gate in lstm.weight_hh_l0.chunk(4):
        rows = gate.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_argument(layer: Any, clips: Tensor, dtype: torch.dtype) -> None:
    output, (_, c_n) = layer(3, 5, 3, dtype=dtype)(clips.to(dtype))
    assert output.dtype == dtype
    assert c_n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layer", LAYERS)
def test_last_output_is_h_n(layer: Any, clips: Tensor) -> None:
    output, (h_n, _) = layer(3, 5, 3)(clips)
    equal(output[-1], h_n[0])


@pytest.mark.parametrize("layer", LAYERS)
def test_chunks_equal_the_whole(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, 5, 3, num_layers=2)
    expected, state_expected = lstm(clips)
    state, outputs = None, []
    for chunk in clips.split([1, 3, 2]):
        output, state = lstm(chunk, state)
        outputs.append(output)
    equal(torch.cat(outputs), expected)
    for actual, wanted in zip(state, state_expected, strict=True):
        equal(actual, wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_chunks_equal_the_whole_in_bfloat16(layer: Any, clips: Tensor) -> None:
    """The cell state comes back in float32, so nothing is lost between calls."""
    lstm = layer(3, 5, 3).bfloat16()
    expected, (_, c_expected) = lstm(clips.bfloat16())
    first, state = lstm(clips[:2].bfloat16())
    second, (_, c_n) = lstm(clips[2:].bfloat16(), state)
    assert c_n.dtype == torch.float32
    equal(torch.cat((first, second)), expected)
    equal(c_n, c_expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_batch_first_and_unbatched(layer: Any, clips: Tensor, backend: str) -> None:
    lstm = layer(3, 5, 3)
    expected, (h_n, _) = lstm(clips)
    lstm.batch_first = True
    output, (h_batch_first, _) = lstm(clips.transpose(0, 1).contiguous())
    if backend != "reference":
        assert output.is_contiguous(), "batch-first in, batch-first out: no transposed view"
    equal(output.transpose(0, 1), expected)
    equal(h_batch_first, h_n)
    single, (h_single, _) = lstm(clips[:, 1])
    equal(single, expected[:, 1])
    equal(h_single, h_n[:, 1])
    lengths = torch.tensor([2, 6])
    resets = torch.rand(2, 6) < 0.3
    first, _ = lstm(clips.transpose(0, 1), lengths=lengths, reset=resets)
    lstm.batch_first = False
    time_major, _ = lstm(clips, lengths=lengths, reset=resets.T)
    equal(first.transpose(0, 1), time_major)


@pytest.mark.parametrize("layer", LAYERS)
def test_unbatched_with_state_and_reset(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, 5, 3)
    reset = torch.tensor([False, False, True, False, False, False])
    expected, state = lstm(clips[:, :1], reset=reset[:, None])
    output, unbatched = lstm(clips[:, 0], reset=reset)
    equal(output, expected[:, 0])
    again, _ = lstm(clips[:, 0], unbatched)
    expected_again, _ = lstm(clips[:, :1], state)
    equal(again, expected_again[:, 0])


@pytest.mark.parametrize("layer", LAYERS)
def test_channels_last_in_channels_last_out(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, 5, 3)
    frames = clips.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    output, _ = lstm(frames)
    torch.testing.assert_close(output, lstm(clips)[0])
    lstm.to(memory_format=torch.channels_last)
    output_2, _ = lstm(frames)
    torch.testing.assert_close(output_2, output)


@pytest.mark.parametrize("layer", LAYERS)
def test_lengths(layer: Any, clips: Tensor) -> None:
    """Each sample gives what it gives alone, cut to its length; zeros behind."""
    lstm = layer(3, 5, 3, num_layers=2, bidirectional=True)
    lengths = [4, 6]
    output, (h_n, c_n) = lstm(clips, lengths=lengths)
    for k, length in enumerate(lengths):
        alone, (h_alone, c_alone) = lstm(clips[:length, k : k + 1])
        torch.testing.assert_close(output[:length, k : k + 1], alone)
        assert not output[length:, k].any()
        torch.testing.assert_close(h_n[:, k : k + 1], h_alone)
        torch.testing.assert_close(c_n[:, k : k + 1], c_alone)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("lengths", [[6, 4], [3, 6]])
def test_packed_sequence(layer: Any, clips: Tensor, lengths: list[int]) -> None:
    lstm = layer(3, 5, 3, bidirectional=True)
    packed = pack_padded_sequence(clips, lengths, enforce_sorted=False)
    output, state = lstm(packed)
    unpacked, unpacked_lengths = pad_packed_sequence(output)
    expected, state_expected = lstm(clips, lengths=lengths)
    assert unpacked_lengths.tolist() == lengths
    equal(unpacked, expected[: max(lengths)])
    for actual, wanted in zip(state, state_expected, strict=True):
        equal(actual, wanted)


@pytest.mark.parametrize("layer", LAYERS)
def test_packed_sequence_keeps_its_order_among_equal_lengths(layer: Any) -> None:
    lstm = layer(3, 5, 3)
    frames = torch.randn(3, 2, 3, 6, 5)
    order = torch.tensor([1, 0])
    packed = PackedSequence(frames[:, order].flatten(0, 1), torch.tensor([2, 2, 2]), order, order)
    output = lstm(packed)[0]
    assert torch.equal(output.sorted_indices, order)
    equal(output.data, lstm(frames)[0][:, order].flatten(0, 1))


@pytest.mark.parametrize("layer", LAYERS)
def test_reset_equals_a_new_start(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, 5, 3)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[4, 1] = True
    output, _ = lstm(clips, reset=reset)
    whole, _ = lstm(clips)
    fresh, _ = lstm(clips[4:])
    equal(output[:, 0], whole[:, 0])
    equal(output[:4, 1], whole[:4, 1])
    equal(output[4:, 1], fresh[:, 1])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("mode", ["concat", "sum", "mean", "product"])
def test_merge_modes(layer: Any, clips: Tensor, mode: str) -> None:
    lstm = layer(3, 5, 3, bidirectional=True, merge_mode=mode)
    there_and_back = layer(3, 5, 3, bidirectional=True)
    there_and_back.load_state_dict(lstm.state_dict())
    there, back = there_and_back(clips)[0].chunk(2, dim=2)
    expected = {
        "concat": torch.cat((there, back), 2),
        "sum": there + back,
        "mean": (there + back) / 2,
        "product": there * back,
    }[mode]
    torch.testing.assert_close(lstm(clips)[0], expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_states_of_different_shapes(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, (4, 6), 3, num_layers=2, stride=2)
    output, (h_n, c_n) = lstm(clips)
    assert [tuple(h.shape) for h in h_n] == [(2, 4, 4, 4), (2, 6, 2, 2)]
    assert output.shape == (6, 2, 6, 2, 2)
    lstm(clips, (h_n, c_n))
    _, (h_single, c_single) = lstm(clips[:, 0])
    assert [tuple(h.shape) for h in h_single] == [(4, 4, 4), (6, 2, 2)]
    lstm(clips[:, 0], (h_single, c_single))


@pytest.mark.parametrize("layer", LAYERS)
def test_dropout_has_one_mask_for_the_sequence(layer: Any) -> None:
    lstm = layer(3, 5, 1, num_layers=2, dropout=0.5)
    seen: list[Tensor] = []
    original = lstm._run_layer

    def spy(suffix: str, input: Tensor, *rest: Any) -> Any:
        seen.append(input)
        return original(suffix, input, *rest)

    lstm._run_layer = spy
    lstm(torch.ones(4, 2, 3, 3, 3))
    dropped = seen[1] == 0
    assert dropped.any()
    assert not dropped.all()
    assert (dropped == dropped[0]).all(), "the mask changes over time"
    lstm.eval()
    seen.clear()
    lstm(torch.ones(4, 2, 3, 3, 3))
    assert not (seen[1] == 0).any()


@pytest.mark.parametrize(("layer", "cell"), CELLS)
def test_cell_equals_layer(layer: Any, cell: Any, clips: Tensor) -> None:
    lstm, single = layer(3, 5, 3, stride=2), cell(3, 5, 3, stride=2)
    single.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    expected, _ = lstm(clips)
    hx = None
    for t in range(6):
        hx = single(clips[t], hx)
        equal(hx[0], expected[t])
    unbatched = single(clips[0, 0])
    torch.testing.assert_close(unbatched[0], expected[0, 0])
    single(clips[1, 0], unbatched)


@pytest.mark.parametrize("layer", LAYERS)
def test_copies(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, 5, 3, num_layers=2, bidirectional=True)
    expected, _ = lstm(clips)
    equal(copy.deepcopy(lstm)(clips)[0], expected)
    equal(pickle.loads(pickle.dumps(lstm))(clips)[0], expected)
    buffer = io.BytesIO()
    torch.save(lstm.state_dict(), buffer)
    buffer.seek(0)
    other = layer(3, 5, 3, num_layers=2, bidirectional=True)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    equal(other(clips)[0], expected)


@pytest.mark.parametrize("layer", LAYERS)
def test_recomputation_gives_the_same_gradients(layer: Any, clips: Tensor) -> None:
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        lstm = layer(3, 5, 3, recompute_gates=recompute)
        x = clips.clone().requires_grad_()
        lstm(x)[0].square().sum().backward()
        grads.append([x.grad, *(p.grad for p in lstm.parameters())])
    for kept, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(kept, recomputed)


@pytest.mark.parametrize("layer", LAYERS)
def test_frozen_parameters_and_input(layer: Any, clips: Tensor) -> None:
    """Only what asks for a gradient gets one, whichever it is."""
    full = layer(3, 5, 3)
    full(clips)[0].sum().backward()
    for name, _ in full.named_parameters():
        partial = copy.deepcopy(full)
        partial.zero_grad()
        for other, parameter in partial.named_parameters():
            parameter.requires_grad_(other == name)
        partial(clips)[0].sum().backward()
        for other, parameter in partial.named_parameters():
            if other == name:
                torch.testing.assert_close(parameter.grad, dict(full.named_parameters())[name].grad)
            else:
                assert parameter.grad is None


@pytest.mark.parametrize("layer", LAYERS)
def test_backward_twice_with_retain_graph(layer: Any, clips: Tensor) -> None:
    lstm = layer(3, 5, 3)
    loss = lstm(clips)[0].square().sum()
    first = torch.autograd.grad(loss, list(lstm.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(lstm.parameters()))
    for a, b in zip(first, second, strict=True):
        equal(a, b)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_of_gradients(layer: Any, clips: Tensor, backend: str) -> None:
    x = clips.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer(3, 5, 3)(x)[0].square().sum(), x, create_graph=True)
    if backend == "reference":
        grad.square().sum().backward()
        assert x.grad is not None
    else:
        with pytest.raises(RuntimeError, match='use backend="reference"'):
            grad.square().sum().backward()


@pytest.mark.parametrize("layer", LAYERS)
def test_nan_passes_through(layer: Any, clips: Tensor) -> None:
    """As in torch: NaN in, NaN out, no error; other samples are untouched."""
    clips[2, 0, 0, 0, 0] = float("nan")
    output, _ = layer(3, 5, 3)(clips)
    assert output[2:, 0].isnan().any()
    assert not output[:, 1].isnan().any()


def test_explain_names_the_backend(clips: Tensor, backend: str) -> None:
    explanation = explain(nn.Sequential(ConvLSTM2d(3, 5, 3, num_layers=2)), clips)
    assert explanation.backends == (backend, backend)
    assert f"{backend}: ran (asked for)" in str(explanation)
    other = "cpu" if backend == "reference" else "reference"
    assert f"{other}: could serve it, but {backend!r} was asked for" in str(explanation)


def test_choice_of_backend(monkeypatch: pytest.MonkeyPatch, clips: Tensor) -> None:
    """Argument over context manager over environment over automatic; a name that cannot serve raises."""
    lstm = ConvLSTM2d(3, 5, 3)
    with use_backend("auto"):
        assert explain(lstm, clips).backends == ("cpu",)
        assert explain(lstm, clips).choices[0].requested == "auto"
    with use_backend("reference"):
        assert explain(lstm, clips).backends == ("reference",)
        lstm.backend = "cpu"
        assert explain(lstm, clips).backends == ("cpu",)
        lstm.half()
        with pytest.raises(BackendError, match="float16"):
            lstm(clips.half())
    with pytest.raises(ValueError, match="unknown backend 'gpu'; choose one of 'auto'"):
        ConvLSTM2d(3, 5, 3, backend="gpu")
    monkeypatch.setattr("fused_convlstm.backends.registry._requested", Settings())
    monkeypatch.setenv("FUSED_CONVLSTM_BACKEND", "reference")
    assert explain(ConvLSTM2d(3, 5, 3), clips).backends == ("reference",)
    monkeypatch.setenv("FUSED_CONVLSTM_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FUSED_CONVLSTM_BACKEND"):
        ConvLSTM2d(3, 5, 3)(clips)


def test_blocks_that_overlap() -> None:
    """As those of two threads do, or of two generators."""
    outside, first, second = requested_backend(None), use_backend("cpu"), use_backend("triton")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert requested_backend(None) == "triton"
    second.__exit__(None, None, None)
    assert requested_backend(None) == outside


def test_explain_within_explain(clips: Tensor) -> None:
    lstm = ConvLSTM2d(3, 5, 3)
    outer = explain(lambda: (explain(lstm, clips), lstm(clips)))
    assert len(outer.choices) == 2
    assert len(explain(lstm, clips).choices) == 1


def test_attributes_of_a_convolution() -> None:
    module = ConvLSTM2d(6, 4, (5, 3), stride=2, dilation=(1, 2), groups=2, padding_mode="circular")
    plain = nn.Conv2d(6, 4, (5, 3), stride=2, padding=(2, 2), dilation=(1, 2), groups=2, padding_mode="circular")
    for name in ("kernel_size", "stride", "dilation", "groups", "padding_mode"):
        assert getattr(module, name) == getattr(plain, name)
    assert module.padding == (2, 2, 2, 2)
