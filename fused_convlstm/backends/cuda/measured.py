"""When the automatic choice leaves a call to Triton: by measurement, for each architecture and class of shapes."""

from __future__ import annotations

from .. import registry
from ..call import SAVE_NOTHING, Call

# (major, minor) of the compute capability -> shape class -> whether `cuda` was the faster one. Filled from the GPU
# report; empty: nothing has been measured yet.
FASTER: dict[tuple[int, int], dict[str, bool]] = {}

SMALL_MAP = 12 * 12  # pixels; up to here a step is too short to fill a device


def shape_class(call: Call) -> str:
    """Calls of one class are expected to rank the two backends alike."""
    pixels = call.state_size[0] * call.state_size[1]
    size = "small" if pixels <= SMALL_MAP else "large"
    use = "inference" if call.save == SAVE_NOTHING else "training"
    return f"{call.cell} {size} {use}"


def prefer_other(call: Call, capability: tuple[int, int]) -> str | None:
    """Why Triton's kernels take this call; None if these do, also where Triton cannot."""
    if registry.cannot_serve(registry.get("triton"), call) is not None:
        return None
    kind, architecture = shape_class(call), f"sm_{capability[0]}{capability[1]}"
    faster = FASTER.get(capability, {}).get(kind)
    if faster is None:
        return f"not measured against triton on {architecture} for {kind!r}; triton is the default until it is"
    return None if faster else f"triton was measured to be faster on {architecture} for {kind!r}"
