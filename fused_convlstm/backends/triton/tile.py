"""The shape of a program's tile."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Rows, channels and depth of a program's tile, and how the compiler is to schedule it."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
