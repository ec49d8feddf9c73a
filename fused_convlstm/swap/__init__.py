"""Put the fused layers into a model that exists."""

from .adapters import SwappedLayer
from .swap import Kept, Replaced, SwapReport, Verification, swap, unswap

__all__ = ["Kept", "Replaced", "SwapReport", "SwappedLayer", "Verification", "swap", "unswap"]
