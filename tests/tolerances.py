"""The error bar, in one place.

A kernel in precision p is judged against the reference in float64: its largest error may be at most twice that of plain
PyTorch in the same precision on the same numbers, plus a floor for results that plain PyTorch happens to hit exactly.
A fixed tolerance would either fail good kernels on long sums or pass bad ones on short sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
WINOGRAD_FACTOR = {2: 2.5, 4: 15.0}  # by the tile, as docs/cpu.md has it for ordinary data
# In units of the type's epsilon times the largest magnitude of the result. Float64 has no better reference than
# itself, so its floor alone has to cover the rounding of the longest sums in the tests (a few thousand terms). That of
# float32 covers results of a few elements in which large terms cancel: plain PyTorch's error is a matter of luck there.
FLOOR = {torch.float64: 200.0, torch.float32: 16.0, torch.float16: 2.0, torch.bfloat16: 2.0}


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest absolute error; infinite if a value is missing (NaN) where the exact one is not."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.double().cpu() - exact.double().cpu()).abs()
    return float("inf") if difference.isnan().any() else float(difference.max())


def assert_within_error_bar(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    dtype: torch.dtype,
    factor: float = FACTOR,
) -> None:
    """``actual``: the kernel; ``plain``: plain PyTorch in ``dtype``; ``exact``: the reference in float64."""
    assert actual.keys() == plain.keys() == exact.keys()
    largest = max((float(value.abs().max()) for value in exact.values() if value.numel()), default=0.0)
    for name, value in actual.items():
        assert value.shape == exact[name].shape, f"{name}: shape {tuple(value.shape)}, not {tuple(exact[name].shape)}"
        assert value.dtype == plain[name].dtype, f"{name}: {value.dtype}, not {plain[name].dtype}"
        scale = float(exact[name].abs().max()) if exact[name].numel() else 0.0
        floor = (
            factor // FACTOR * FLOOR[dtype]
        )  # only F(4x4, 3x3), which rounds several times as much, needs more of it
        bar = factor * error(plain[name], exact[name]) + floor * torch.finfo(dtype).eps * scale
        if dtype == torch.float64:  # the slope of a saturated activation is as exact as its value, not as its size
            bar = max(bar, 16 * torch.finfo(dtype).eps * largest)
        found = error(value, exact[name])
        assert found <= bar, f"{name}: error {found:.3g} over the bar {bar:.3g} (largest magnitude {scale:.3g})"
