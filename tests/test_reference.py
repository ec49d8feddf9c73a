"""The reference against itself: gradcheck, and properties that hold for any right implementation."""

import pytest
import torch
from cases import Case, case_id, make_tensors, ordinary, run


@pytest.mark.parametrize("cell", ["conv_lstm2d", "pooled_gate_conv_lstm2d"])
@pytest.mark.parametrize("index", range(len(ordinary("pooled_gate_conv_lstm2d"))))
def test_every_case_runs(cell: str, index: int) -> None:
    case = ordinary(cell)[index]
    results = run(case, make_tensors(case), "reference")
    for name, value in results.items():
        assert not value.isnan().any(), f"{case_id(case)}: {name}"


def test_reference_is_an_lstm_on_single_pixels() -> None:
    """On 1x1 frames with 1x1 kernels, a ConvLSTM is nn.LSTM."""
    case = Case(size=(1, 1), kernel_size=(1, 1), recurrent_kernel_size=(1, 1), steps=5)
    tensors = make_tensors(case)
    lstm = torch.nn.LSTM(case.in_channels, case.hidden_channels, dtype=torch.float64)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(tensors.weights["weight_ih"].flatten(1))
        lstm.weight_hh_l0.copy_(tensors.weights["weight_hh"].flatten(1))
        lstm.bias_ih_l0.copy_(tensors.weights["bias"])
        lstm.bias_hh_l0.zero_()
    h_0, c_0 = (state.flatten(1)[None] for state in tensors.hx)
    expected, (h_n, c_n) = lstm(tensors.input.flatten(2), (h_0, c_0))
    actual = run(case, tensors, "reference", training=False)
    torch.testing.assert_close(actual["output"].flatten(2), expected)
    torch.testing.assert_close(actual["h_n"].flatten(1), h_n[0])
    torch.testing.assert_close(actual["c_n"].flatten(1), c_n[0])
