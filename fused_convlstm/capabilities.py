"""The table of what each backend serves, asked of the backends themselves."""

from __future__ import annotations

from dataclasses import replace

import torch

from .backends import registry
from .backends.call import SAVE_CELLS, SAVE_GATES, Call, ConvLSTMOptions, same_padding

_CALL = Call(
    cell="conv_lstm2d",
    device=torch.device("cpu"),
    dtype=torch.float32,
    steps=8,
    batch=4,
    in_channels=32,
    hidden_channels=32,
    input_size=(16, 16),
    state_size=(16, 16),
    kernel_size=(3, 3),
    recurrent_kernel_size=(3, 3),
    options=ConvLSTMOptions(padding=same_padding((3, 3), (1, 1))),
    save=SAVE_GATES,
)


def _with(**options: object) -> Call:
    return replace(_CALL, options=replace(_CALL.options, **options))  # type: ignore[arg-type]


ROWS: dict[str, Call] = {
    "ConvLSTM, training": _CALL,
    "ConvLSTM, inference": replace(_CALL, save="nothing"),
    "pooled gates, training": replace(_CALL, cell="pooled_gate_conv_lstm2d"),
    "pooled gates, inference": replace(_CALL, cell="pooled_gate_conv_lstm2d", save="nothing"),
    "bfloat16": replace(_CALL, dtype=torch.bfloat16),
    "float16": replace(_CALL, dtype=torch.float16),
    "float64": replace(_CALL, dtype=torch.float64),
    "gates recomputed in backward": replace(_CALL, save=SAVE_CELLS),
    "lengths, packed sequences, reset": replace(_CALL, step_flags=True),
    "reversed direction": _with(reverse=True),
    "stride": replace(_with(stride=(2, 2)), state_size=(8, 8)),
    "padding valid, explicit, uneven": replace(_with(padding=(0, 1, 0, 0)), state_size=(15, 14)),
    "dilation": _with(dilation=(2, 2), recurrent_dilation=(2, 2), padding=(2, 2, 2, 2)),
    "kernel 5x3, recurrent 1x1": replace(
        _with(padding=same_padding((5, 3), (1, 1))), kernel_size=(5, 3), recurrent_kernel_size=(1, 1)
    ),
    "even kernels": replace(
        _with(padding=same_padding((4, 4), (1, 1))), kernel_size=(4, 4), recurrent_kernel_size=(4, 4)
    ),
    "groups": _with(groups=2),
    "padding mode circular": _with(padding_mode="circular"),
    "padding mode replicate": _with(padding_mode="replicate"),
    "padding mode reflect": _with(padding_mode="reflect"),
    "peepholes per channel": replace(_CALL, peephole="channel"),
    "peepholes per pixel": replace(_CALL, peephole="pixel"),
    "hard sigmoid gates": _with(gate_activation="hard_sigmoid"),
}
DEVICES = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


def capabilities() -> str:
    """A Markdown table: a row an option, a column a backend."""
    names = sorted((name for name in registry.names() if name in DEVICES), key=list(DEVICES).index)
    lines = [
        "| | reference | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * (len(names) + 1),
        "| device | any | " + " | ".join("NVIDIA GPU" if DEVICES[name] == "cuda" else "CPU" for name in names) + " |",
    ]
    for row, call in ROWS.items():
        served = (
            registry.get(name).refuse(replace(call, device=torch.device(DEVICES[name]))) is None for name in names
        )
        lines.append(f"| {row} | yes | " + " | ".join("yes" if serves else "no" for serves in served) + " |")
    lines.append("| gradients of gradients | yes |" + " no |" * len(names))
    return "\n".join(lines)
