"""The Triton kernels against the reference, under Triton's interpreter; the cells in a process each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case, case_id, make_tensors, ordinary, run
from triton_interpreter import INTERPRETED_CELL, INTERPRETING, rerun_interpreted

pytest.importorskip("triton")

if not INTERPRETING:

    @pytest.mark.parametrize("cell", ["conv_lstm2d", "pooled_gate_conv_lstm2d"])
    def test_under_the_interpreter(cell: str) -> None:
        rerun_interpreted(__file__, cell)

else:
    import strategies
    from hypothesis import given, settings
    from kernel_checks import check_kept_cells, check_repeatable
    from triton_checks import (
        check,
        check_chunks_equal_whole,
        check_in_single_step_chunks,
        check_recomputation_is_exact,
    )

    from fused_convlstm.backends import BackendError
    from fused_convlstm.backends.triton import conv_lstm2d, pooled_gate_conv_lstm2d, tuning
    from fused_convlstm.backends.triton.tile import Tile

    CELL = INTERPRETED_CELL
    BASE = Case(cell=CELL)

    @pytest.mark.parametrize("case", ordinary(CELL), ids=case_id)
    def test_training(case: Case) -> None:
        check(case, torch.float32)

    HALF = [case for case in ordinary(CELL) if case.padding_mode == "zeros"][::2]

    @pytest.mark.parametrize("case", HALF, ids=case_id)
    def test_training_in_half_precision(case: Case) -> None:
        check(case, torch.float16)

    @pytest.mark.parametrize("case", ordinary(CELL)[1::2], ids=case_id)
    def test_inference(case: Case) -> None:
        check(case, torch.float16, training=False)

    MORE_INFERENCE = [
        replace(BASE, in_channels=17, layout="channels_last"),  # x where it lies
        replace(BASE, in_channels=17, stride=(2, 1), reverse=True),  # x in chunks
        replace(BASE, padding_mode="circular", reverse=True),
        replace(BASE, in_channels=16, lengths=True, reset=True, layout="channels_last"),
    ]

    @pytest.mark.parametrize("case", MORE_INFERENCE, ids=case_id)
    def test_input_of_inference(case: Case) -> None:
        check(case, torch.float32, training=False)

    CHUNKED = [
        BASE,
        replace(BASE, reverse=True, recompute_gates=True),
        replace(BASE, lengths=True, reset=True, recompute_gates=True, steps=4),
        replace(BASE, lengths=True, reset=True, reverse=True, steps=4),
        replace(BASE, state=False, layout="channels_last", hidden_channels=4),
    ]

    @pytest.mark.parametrize("case", CHUNKED, ids=case_id)
    def test_time_chunks(case: Case) -> None:
        check_in_single_step_chunks(case)

    @pytest.mark.parametrize("case", [BASE, replace(BASE, lengths=True, reset=True, reverse=True)], ids=case_id)
    def test_recomputation_is_exact(case: Case) -> None:
        check_recomputation_is_exact(case)

    KEPT = [BASE, replace(BASE, state=False, layout="channels_last")]
    if CELL == "conv_lstm2d":
        KEPT.append(replace(BASE, peephole="channel"))

    @pytest.mark.parametrize("case", KEPT, ids=case_id)
    def test_kept_cells(case: Case) -> None:
        for recompute in (False, True):
            check_kept_cells(replace(case, steps=4, reset=True, recompute_gates=recompute), "triton", torch.float16)

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
    def test_two_calls_equal_one(layout: str) -> None:
        check_chunks_equal_whole(replace(BASE, steps=4, layout=layout, in_channels=4))

    # The epilogue goes through wide tiles in parts.
    @pytest.mark.parametrize("tile", [Tile(16, 128, 32, 4, 1), Tile(64, 64, 32, 4, 1), Tile(16, 16, 64, 4, 1)], ids=str)
    def test_tiles(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tuning, "choose", lambda *args, **kwargs: tile)
        check(replace(BASE, steps=2, hidden_channels=70, size=(3, 4), recurrent_kernel_size=(1, 3)), torch.float32)

    def test_repeatable() -> None:
        check_repeatable(replace(BASE, lengths=True, reset=True, steps=4), "triton", torch.float16)

    def test_wide_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
        for backend in (conv_lstm2d, pooled_gate_conv_lstm2d):
            monkeypatch.setattr(backend, "passes_int32", lambda *tensors: True)
        check(replace(BASE, lengths=True, reset=True), torch.float32)
        check(replace(BASE, in_channels=17), torch.float32, training=False)

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(case=strategies.cases(CELL, max_channels=24, max_work=3e5, max_size=8))
    def test_any_call(case: Case) -> None:
        check(case, torch.float32)

    def test_refusals() -> None:
        tensors = make_tensors(BASE)
        for dtype, reason in ((torch.float64, "float64"), (torch.bfloat16, "bfloat16")):
            with pytest.raises(BackendError, match=reason):
                run(BASE, tensors.to(dtype), "triton")
