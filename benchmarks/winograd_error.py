"""Largest error of direct and Winograd convolutions against float64, relative to that of plain PyTorch.

python benchmarks/winograd_error.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_convlstm import ConvLSTM2d, use_winograd

CHANNELS = (16, 64, 256)
TILES = {"F(2x2, 3x3)": 2, "F(4x4, 3x3)": 4}
SIZE = (2, 6, 12, 12)  # batch, steps, height, width


def normal(channels: int) -> Tensor:
    batch, steps, height, width = SIZE
    return torch.randn(steps, batch, channels, height, width)


def hot_pixel(channels: int) -> Tensor:
    frames = normal(channels)
    frames[..., 5, 5] = 100.0
    return frames


DATA: dict[str, Callable[[int], Tensor]] = {
    "normal": normal,
    "uniform, 0 to 1": lambda channels: torch.rand_like(normal(channels)),
    "2 % of normal values, zeros else": lambda channels: normal(channels) * (torch.rand_like(normal(channels)) < 0.02),
    "normal, to the fourth power": lambda channels: normal(channels) ** 4,
    "normal, one pixel of 100": hot_pixel,
    "normal + 100": lambda channels: normal(channels) + 100,
}


def largest_errors(channels: int, make: Callable[[int], Tensor]) -> dict[str, float]:
    """Of the output, by what computed it: the largest of a few seeds."""
    errors = dict.fromkeys(("plain", "direct", *TILES), 0.0)
    for seed in range(5):
        torch.manual_seed(seed)
        layer = ConvLSTM2d(channels, channels, 3)
        frames = make(channels)
        plain = ConvLSTM2d(channels, channels, 3, backend="reference")
        exact = ConvLSTM2d(channels, channels, 3, backend="reference", dtype=torch.float64)
        plain.load_state_dict(layer.state_dict())
        exact.load_state_dict(layer.state_dict())
        with torch.inference_mode():
            outputs = {"plain": plain(frames)[0]}
            outputs["direct"] = layer(frames)[0]
            for name, tile in TILES.items():
                with use_winograd("always", tile):
                    outputs[name] = layer(frames)[0]
            expected = exact(frames.double())[0]
        for name, output in outputs.items():
            errors[name] = max(errors[name], float((output - expected).abs().max()))
    return errors


def main() -> None:
    names = ("direct", *TILES)
    print(
        f"| data | channels | plain PyTorch's error | {' | '.join(names)} |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, make in DATA.items():
        for channels in CHANNELS:
            errors = largest_errors(channels, make)
            relative = (f"{errors[key] / errors['plain']:.2f}" for key in names)
            print(f"| {name} | {channels} | {errors['plain']:.1e} | {' | '.join(relative)} |")


if __name__ == "__main__":
    main()
