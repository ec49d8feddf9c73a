"""Fused layers from the weights of other libraries, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.call import same_padding
from ..modules import ConvLSTM2d, PooledGateConvLSTM2d
from .layouts import (
    LAYOUTS,
    POOLED_LAYOUTS,
    REFUSED_LAYOUTS,
    LayerWeights,
    Layout,
    as_tensors,
    missing_array,
    read_layer,
    read_pooled,
    write_layer,
    write_pooled,
)


def from_weights(
    arrays: Mapping[str, Any], layout: str, *, prefix: str = "", **options: Any
) -> ConvLSTM2d | PooledGateConvLSTM2d:
    """A fused layer that computes what another library's layer computes with these weights.

    Args:
        arrays: the weights by their names, a state dict for instance: tensors, NumPy or JAX arrays, TensorFlow
            variables, MXNet arrays; nested dictionaries are read with their keys joined by dots.
        layout: "ndrplz", "torchgeo", "snntorch", "automan000", "Hzzone", "SA-ConvLSTM", "OpenSTL", "kamo-naoyuki",
            "aserdega", "Keras", "TensorFlow", "Flax", "Sonnet", "MXNet" or "AttentionConvLSTM" (variant (a)).
        prefix: what stands before the names in ``arrays``; arrays without it are left alone.
        options: of :class:`ConvLSTM2d` or :class:`PooledGateConvLSTM2d`, for what the weights do not tell: stride,
            padding, dilation, gate_activation, batch_first ... Sizes, bias, peepholes, type and device come from the
            weights. ``image_size`` is needed with per-pixel peepholes where a stride makes the state smaller than the
            input. Flax and TensorFlow keep their state as (c, h).

    Returns:
        :class:`ConvLSTM2d`, for "AttentionConvLSTM" :class:`PooledGateConvLSTM2d`. It shares no memory with ``arrays``.

    Raises:
        ValueError: the layout is unknown, the weights do not fit it, or its cell is no ConvLSTM of this package.
    """
    tensors = as_tensors(arrays, prefix)
    if layout in POOLED_LAYOUTS:
        return _pooled_from(tensors, layout, options)
    table = _find(layout)
    directions = ("", "_reverse") if table.has_layer(tensors, 0, "_reverse") else ("",)
    layers: list[LayerWeights] = []
    while not layers or table.has_layer(tensors, len(layers) // len(directions)):
        layers += [read_layer(tensors, table, len(layers) // len(directions), direction) for direction in directions]
    _only_one({tuple(one.weight_ih.shape[2:]) for one in layers}, "kernel_size")
    _only_one({tuple(one.weight_hh.shape[2:]) for one in layers}, "recurrent_kernel_size")
    _only_one({one.bias is not None for one in layers}, "bias")
    _only_one({one.peephole_kind for one in layers}, "peephole")
    first, peephole = layers[0], layers[0].peephole
    settings: dict[str, Any] = {
        "num_layers": len(layers) // len(directions),
        "recurrent_kernel_size": tuple(first.weight_hh.shape[2:]),
        "recurrent_dilation": None if table.recurrent_dilation == "shared" else 1,
        "bias": first.bias is not None,
        "peephole": first.peephole_kind,
        "bidirectional": len(directions) == 2,
        "device": first.weight_ih.device,
        "dtype": first.weight_ih.dtype,
    }
    if peephole is not None and peephole.dim() == 4:
        settings["image_size"] = tuple(peephole.shape[2:])
    module: ConvLSTM2d = build(
        ConvLSTM2d,
        first.weight_ih.size(1),
        [one.channels for one in layers[:: len(directions)]],
        tuple(first.weight_ih.shape[2:]),
        **(settings | options),
    )
    for suffix, weights in zip(module._suffixes(), layers, strict=True):
        copy_layer(module, suffix, vars(weights))
    return module


def to_weights(module: ConvLSTM2d | PooledGateConvLSTM2d, layout: str, *, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a fused layer as another library stores them: the inverse of :func:`from_weights`.

    A layout with two biases gets everything in the first and zero in the second. The arrays share no memory with the
    module's parameters.

    Raises:
        ValueError: the library's cell cannot compute what ``module`` computes.
    """
    if layout in POOLED_LAYOUTS:
        return {prefix + name: value for name, value in _pooled_to(module, layout).items()}
    table = _find(layout)
    if not isinstance(module, ConvLSTM2d):
        raise ValueError(f"module: expected a ConvLSTM2d for layout {layout!r}, got {type(module).__name__}")
    if module.num_layers > 1 and "{layer}" not in table.kernels[0]:
        raise ValueError(f"num_layers: layout {layout!r} has one layer, got {module.num_layers}")
    if module.bidirectional and "{direction}" not in table.kernels[0]:
        raise ValueError(f"bidirectional: layout {layout!r} has one direction")
    if module.bidirectional and module.merge_mode != "concat":
        raise ValueError(f"merge_mode: layout {layout!r} has 'concat' only, got {module.merge_mode!r}")
    check_options(module, layout)
    arrays: dict[str, Tensor] = {}
    for suffix in module._suffixes():
        layer, _, reverse = suffix[2:].partition("_")
        weights = LayerWeights(*module._layer_parameters(suffix))
        arrays |= write_layer(weights, table, int(layer), f"_{reverse}" if reverse else "")
    return {prefix + name: value for name, value in arrays.items()}


def check_options(module: ConvLSTM2d, layout: str) -> None:
    """Raises ValueError if a library has no cell with the options of ``module``, whatever the weights."""
    table, convolution = LAYOUTS[layout], module.convolution
    if convolution.groups != 1:
        raise ValueError(f"groups: layout {layout!r} has no groups of this kind, got {convolution.groups}")
    if convolution.gate_activation not in table.gate_activations:
        choices = " or ".join(map(repr, table.gate_activations))
        raise ValueError(f"gate_activation: layout {layout!r} has {choices}, got {convolution.gate_activation!r}")
    possible = {"none": (1, 1), "own": convolution.recurrent_dilation, "shared": convolution.dilation}
    if convolution.recurrent_dilation != possible[table.recurrent_dilation]:
        raise ValueError(
            f"recurrent_dilation: layout {layout!r} has {possible[table.recurrent_dilation]}, "
            f"got {convolution.recurrent_dilation}"
        )


def build(kind: Any, *arguments: Any, **options: Any) -> Any:
    """A module without the time that its initialisation takes: its parameters hold anything."""
    return nn.utils.skip_init(kind, *arguments, **({"device": "cpu"} | options))


@torch.no_grad()
def copy_layer(module: nn.Module, suffix: str, weights: Mapping[str, Tensor | None]) -> None:
    """Copies weights into the parameters of one layer and direction, whose names end in ``suffix``."""
    for name, value in weights.items():
        parameter = getattr(module, name + suffix)
        if (parameter is None) != (value is None):
            raise ValueError(f"{name}{suffix}: expected {'none' if parameter is None else 'a tensor'}")
        if parameter is None or value is None:
            continue
        if parameter.shape != value.shape:
            raise ValueError(
                f"{name}{suffix}: expected shape {tuple(parameter.shape)}, got {tuple(value.shape)} from the weights"
            )
        parameter.copy_(value)


def _find(layout: str) -> Layout:
    if layout in REFUSED_LAYOUTS:
        raise ValueError(f"layout: {layout!r} weights do not convert: {REFUSED_LAYOUTS[layout]}")
    if layout not in LAYOUTS:
        choices = ", ".join(map(repr, (*LAYOUTS, *POOLED_LAYOUTS)))
        raise ValueError(f"layout: expected one of {choices}, got {layout!r}")
    return LAYOUTS[layout]


def _only_one(values: set[Any], name: str) -> None:
    if len(values) > 1:
        raise ValueError(
            f"{name}: expected the same for all layers, got {sorted(map(str, values))}; convert each layer on its own"
        )


def _pooled_from(tensors: Mapping[str, Tensor], layout: str, options: dict[str, Any]) -> PooledGateConvLSTM2d:
    weights: dict[str, Tensor | None] = {}
    for name, (stored, kind) in POOLED_LAYOUTS[layout].items():
        if stored not in tensors and "bias" not in name:
            raise missing_array(stored, tensors)
        weights[name] = read_pooled(tensors[stored], kind) if stored in tensors else None
    if weights["bias"] is None:
        weights["gate_bias"] = None  # without use_bias the authors' code makes one, but does not add it
    elif weights["gate_bias"] is None:
        raise ValueError("arrays: expected one named 'gate_bias' beside 'bias'")
    depthwise_ih = read_pooled(tensors["depthwise_kernel"], "depthwise")
    depthwise_hh = read_pooled(tensors["recurrent_depthwise_kernel"], "depthwise")
    settings: dict[str, Any] = {
        "recurrent_kernel_size": tuple(depthwise_hh.shape[2:]),
        "recurrent_dilation": 1,
        "bias": weights["bias"] is not None,
        "gate_activation": "hard_sigmoid_keras2",  # the authors' code; the paper says sigmoid
        "device": depthwise_ih.device,
        "dtype": depthwise_ih.dtype,
    }
    module: PooledGateConvLSTM2d = build(
        PooledGateConvLSTM2d,
        depthwise_ih.size(0),
        depthwise_hh.size(0),
        tuple(depthwise_ih.shape[2:]),
        **(settings | options),
    )
    copy_layer(module, "_l0", weights)
    return module


def _pooled_to(module: nn.Module, layout: str) -> dict[str, Tensor]:
    if not isinstance(module, PooledGateConvLSTM2d) or module.num_layers > 1 or module.bidirectional:
        raise ValueError(f"module: expected a PooledGateConvLSTM2d of one layer and direction for layout {layout!r}")
    return {
        stored: write_pooled(parameter.detach(), kind)
        for name, (stored, kind) in POOLED_LAYOUTS[layout].items()
        if (parameter := getattr(module, f"{name}_l0")) is not None
    }


def same_padding_strided(
    size: tuple[int, int], kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int] = (1, 1)
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Padding ((top, bottom), (left, right)) of a "same" convolution in TensorFlow, Keras and JAX.

    The output has ceil(size / stride) pixels; what padding that takes depends on the size of the input, and an odd one
    goes to the end. At stride 1 this is ``padding="same"``.
    """
    if stride == (1, 1):
        top, bottom, left, right = same_padding(kernel_size, dilation)
        return (top, bottom), (left, right)
    sides = []
    for n, k, s, d in zip(size, kernel_size, stride, dilation, strict=True):
        total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
        sides.append((total // 2, total - total // 2))
    return sides[0], sides[1]
