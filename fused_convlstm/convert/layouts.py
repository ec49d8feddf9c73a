"""How other libraries store the weights of a ConvLSTM: one table, read in both directions.

Everything that tells two libraries apart is in :class:`Layout`: the order of the gates, the axes of a kernel, one
kernel over the concatenation of x and h or two, all gates in one array or one array a gate, how many biases there are,
what is added to the forget gate at run time, and how the peepholes are kept.

Shapes: Cin and C input and hidden channels, kh x kw and rh x rw kernel sizes, Ho x Wo state size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class LayerWeights:
    """The parameters of one layer and direction of a ConvLSTM2d, gate order i, f, g, o."""

    weight_ih: Tensor  # (4 * C, Cin, kh, kw)
    weight_hh: Tensor  # (4 * C, C, rh, rw)
    bias: Tensor | None = None  # (4 * C,)
    peephole: Tensor | None = None  # (3, C) or (3, C, Ho, Wo), order i, f, o

    @property
    def channels(self) -> int:
        return self.weight_hh.size(1)

    @property
    def peephole_kind(self) -> str:
        return "none" if self.peephole is None else "pixel" if self.peephole.dim() == 4 else "channel"


@dataclass(frozen=True)
class Layout:
    """How one layer and direction is stored.

    Names are format strings over ``{layer}``, ``{direction}`` ("" or "_reverse") and ``{gate}``; a kernel's name with
    ``{gate}`` in it means one array a gate. Nested dictionaries are read with their keys joined by dots.
    """

    gates: str  # order of the gates' blocks, in the library's own letters; "c" is another name for "g"
    kernels: tuple[str, ...]  # one over the concatenation of x and h, or one for x and one for h
    axes: str = "oihw"  # of a kernel: "oihw" (PyTorch, MXNet) or "hwio" (TensorFlow, Keras, JAX)
    input_first: bool = True  # whether x stands before h in one kernel over both
    biases: tuple[str, ...] = ()  # they are added up
    forget_offset: float = 0.0  # added to the forget gate at run time
    peephole: str | None = None  # one array a gate i, f, o: (C, ...), or one of (3 * C, ...) for all without {gate}
    peephole_axes: str = "c"  # "c": (C,) or (C, Ho, Wo); "1c": the same with an axis of one in front
    refused: Mapping[str, str] = field(default_factory=dict)  # name -> why weights with such an array do not convert
    gate_activations: tuple[str, ...] = ("sigmoid",)  # that the library has
    recurrent_dilation: str = "none"  # "none", "own": an option of its own, "shared": that of the input convolution

    def name(self, template: str, layer: int = 0, direction: str = "", gate: str = "") -> str:
        return template.format(layer=layer, direction=direction, gate=gate)

    def has_layer(self, arrays: Mapping[str, Tensor], layer: int, direction: str = "") -> bool:
        if (layer > 0 and "{layer}" not in self.kernels[0]) or (direction and "{direction}" not in self.kernels[0]):
            return False
        return self.name(self.kernels[0], layer, direction, self.gates[0]) in arrays


_CELL_LIST = "cell_list.{layer}."
_NDRPLZ = Layout("ifog", kernels=(_CELL_LIST + "conv.weight",), biases=(_CELL_LIST + "conv.bias",))
_NORM = "the {} acts on the pre-activations, so it is not a function of the weights alone"

LAYOUTS: dict[str, Layout] = {
    "ndrplz": _NDRPLZ,
    "torchgeo": _NDRPLZ,
    "snntorch": Layout("ifog", kernels=("conv.weight",), biases=("conv.bias",)),
    "automan000": Layout(
        "ifco",
        kernels=("cell{layer}.Wx{gate}.weight", "cell{layer}.Wh{gate}.weight"),
        biases=("cell{layer}.Wx{gate}.bias",),
    ),
    "Hzzone": Layout(
        "ifgo", kernels=("_conv.weight",), biases=("_conv.bias",), peephole="Wc{gate}", peephole_axes="1c"
    ),
    "SA-ConvLSTM": Layout("ifco", kernels=("conv.weight",), biases=("conv.bias",), peephole="W_c{gate}"),
    "OpenSTL": Layout(
        "ifgo",
        kernels=(_CELL_LIST + "conv_x.0.weight", _CELL_LIST + "conv_h.0.weight"),
        refused={_CELL_LIST + "conv_x.1.weight": _NORM.format("LayerNorm")},
    ),
    "kamo-naoyuki": Layout(
        "ifgo",
        kernels=("weight_ih_l{layer}{direction}", "weight_hh_l{layer}{direction}"),
        biases=("bias_ih_l{layer}{direction}", "bias_hh_l{layer}{direction}"),
        refused={"weight_pi_l{layer}{direction}": "its peepholes are convolutions, not products"},
        recurrent_dilation="shared",
    ),
    "aserdega": Layout(
        "ifog",
        kernels=(_CELL_LIST + "conv.weight",),
        biases=(_CELL_LIST + "conv.bias",),
        peephole=_CELL_LIST + "Wc{gate}",
    ),
    "Keras": Layout(
        "ifco",
        axes="hwio",
        kernels=("kernel", "recurrent_kernel"),
        biases=("bias",),
        gate_activations=("sigmoid", "hard_sigmoid", "hard_sigmoid_keras2"),
    ),
    "TensorFlow": Layout("igfo", axes="hwio", kernels=("kernel",), biases=("biases",), forget_offset=1.0),
    "Flax": Layout(
        "igfo",
        axes="hwio",
        kernels=("ih.kernel", "hh.kernel"),
        biases=("ih.bias", "hh.bias"),
        forget_offset=1.0,
    ),
    "Sonnet": Layout("ifgo", axes="hwio", kernels=("input_to_hidden.w", "hidden_to_hidden.w"), biases=("b",)),
    "MXNet": Layout(
        "ifco", kernels=("i2h_weight", "h2h_weight"), biases=("i2h_bias", "h2h_bias"), recurrent_dilation="own"
    ),
}

# Libraries whose cell is no ConvLSTM of this package, whatever the weights.
REFUSED_LAYOUTS = {
    "jhhuang96": _NORM.format("GroupNorm"),
    "czifan": _NORM.format("BatchNorm") + ", and its candidate has no tanh",
    "georgeyiasemis": "its candidate passes through tanh twice",
}

# The pooled-gate cell: parameter name -> (stored name, how it is stored).
PooledLayout = dict[str, tuple[str, str]]

POOLED_LAYOUTS: dict[str, PooledLayout] = {
    "AttentionConvLSTM": {
        "gate_weight_ih": ("gate_kernel", "dense"),
        "gate_weight_hh": ("recurrent_gate_kernel", "dense"),
        "gate_bias": ("gate_bias", "vector"),
        "depthwise_ih": ("depthwise_kernel", "depthwise"),
        "depthwise_hh": ("recurrent_depthwise_kernel", "depthwise"),
        "pointwise_ih": ("pointwise_kernel", "dense"),
        "pointwise_hh": ("recurrent_pointwise_kernel", "dense"),
        "bias": ("bias", "vector"),
    }
}


def read_pooled(array: Tensor, kind: str) -> Tensor:
    """A stored array of a pooled-gate cell as the parameter."""
    if kind == "dense":  # (1, 1, in, out) -> (out, in)
        return array[0, 0].t()
    return array.permute(2, 3, 0, 1) if kind == "depthwise" else array  # (kh, kw, C, 1) -> (C, 1, kh, kw)


def write_pooled(parameter: Tensor, kind: str) -> Tensor:
    """The inverse of :func:`read_pooled`; shares no memory with the parameter."""
    if kind == "dense":
        return parameter.t()[None, None].clone(memory_format=torch.contiguous_format)
    if kind == "depthwise":
        return parameter.permute(2, 3, 0, 1).clone(memory_format=torch.contiguous_format)
    return parameter.clone()


def as_tensors(arrays: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Arrays of any library as tensors, nested dictionaries flattened, names without ``prefix``."""
    flat: dict[str, Tensor] = {}
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in as_tensors(value).items()}
        else:
            flat[name] = as_tensor(value)
    return {name[len(prefix) :]: value for name, value in flat.items() if name.startswith(prefix)}


def as_tensor(value: Any) -> Tensor:
    """A tensor, NumPy or JAX array, TensorFlow variable or MXNet array as a tensor without history.

    A tensor shares memory with what it is made of, anything else does not.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if hasattr(value, "asnumpy"):  # MXNet
        value = value.asnumpy()
    array = np.asarray(value).copy()
    if array.dtype.name == "bfloat16":  # of JAX and TensorFlow; NumPy has none
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array)


def missing_array(name: str, arrays: Mapping[str, Tensor]) -> ValueError:
    names = [repr(one) for one in arrays]
    text = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return ValueError(f"arrays: expected one named {name!r}, got {text or 'none with this prefix'}")


def read_layer(arrays: Mapping[str, Tensor], layout: Layout, layer: int = 0, direction: str = "") -> LayerWeights:
    """The parameters of one layer and direction from a library's arrays.

    Returns:
        weight_ih (4 * C, Cin, kh, kw), weight_hh (4 * C, C, rh, rw), bias (4 * C,) or None, peephole (3, C) or
        (3, C, Ho, Wo) or None. New tensors, on the device and of the type of the arrays.

    Raises:
        ValueError: an array is missing, has the wrong shape, or tells that these weights do not convert.
    """

    def get(template: str, gate: str = "") -> Tensor:
        name = layout.name(template, layer, direction, gate)
        if name not in arrays:
            raise missing_array(name, arrays)
        return arrays[name]

    def blocks(template: str) -> list[Tensor]:
        """Blocks of the gates in the order i, f, g, o, outputs first."""
        if "{gate}" in template:
            stored = [_outputs_first(get(template, gate), layout.axes) for gate in layout.gates]
        else:
            whole = _outputs_first(get(template), layout.axes)
            if whole.size(0) % 4:
                raise ValueError(
                    f"{layout.name(template, layer, direction)}: expected four gates, got {whole.size(0)} outputs"
                )
            stored = list(whole.chunk(4))
        return [stored[_order(layout).index(gate)] for gate in "ifgo"]

    for template, reason in layout.refused.items():
        if layout.name(template, layer, direction) in arrays:
            raise ValueError(f"{layout.name(template, layer, direction)}: these weights do not convert: {reason}")
    kernels = [torch.cat(blocks(template)) for template in layout.kernels]
    if len(kernels) == 1:
        channels = kernels[0].size(0) // 4
        in_channels = kernels[0].size(1) - channels
        if in_channels < 1:
            raise ValueError(
                f"{layout.name(layout.kernels[0], layer, direction)}: expected more than {channels} input channels for "
                f"{channels} hidden channels, got {kernels[0].size(1)}"
            )
        sizes = [in_channels, channels] if layout.input_first else [channels, in_channels]
        kernels = list(kernels[0].split(sizes, dim=1))
        kernels = kernels if layout.input_first else kernels[::-1]
    weight_ih, weight_hh = (kernel.contiguous() for kernel in kernels)
    channels = weight_hh.size(0) // 4
    if weight_hh.size(1) != channels or weight_ih.size(0) != 4 * channels:
        raise ValueError(
            f"{layout.name(layout.kernels[-1], layer, direction)}: expected {weight_ih.size(0) // 4} input channels "
            f"and four times as many outputs, got shape {tuple(weight_hh.shape)} (outputs first)"
        )
    bias = None
    for template in layout.biases:
        if layout.name(template, layer, direction, layout.gates[0]) in arrays:
            one = torch.cat(blocks(template))
            bias = one if bias is None else bias + one
    if layout.forget_offset:
        bias = weight_hh.new_zeros(4 * channels) if bias is None else bias
        bias = bias + _forget_offset(bias, layout)
    return LayerWeights(weight_ih, weight_hh, bias, _read_peephole(arrays, layout, layer, direction))


def write_layer(weights: LayerWeights, layout: Layout, layer: int = 0, direction: str = "") -> dict[str, Tensor]:
    """The inverse of :func:`read_layer`. Of several biases the first gets everything, the others are zero.

    Raises:
        ValueError: the layout has no place for a bias or a peephole that is there.
    """
    arrays: dict[str, Tensor] = {}

    def put(template: str, whole: Tensor) -> None:
        """Stores an array (4 * C, ...) in the order i, f, g, o."""
        chunks = whole.chunk(4)
        ordered = [chunks["ifgo".index(gate)] for gate in _order(layout)]
        if "{gate}" in template:
            for gate, block in zip(layout.gates, ordered, strict=True):
                arrays[layout.name(template, layer, direction, gate)] = _outputs_last(block, layout.axes)
        else:
            arrays[layout.name(template, layer, direction)] = _outputs_last(torch.cat(ordered), layout.axes)

    weight_ih, weight_hh = weights.weight_ih.detach(), weights.weight_hh.detach()
    if len(layout.kernels) == 2:
        put(layout.kernels[0], weight_ih)
        put(layout.kernels[1], weight_hh)
    elif weight_ih.shape[2:] == weight_hh.shape[2:]:
        parts = (weight_ih, weight_hh) if layout.input_first else (weight_hh, weight_ih)
        put(layout.kernels[0], torch.cat(parts, dim=1))
    else:
        raise ValueError(
            "recurrent_kernel_size: expected the size of the input kernel, as this layout has one kernel for both, "
            f"got {tuple(weight_hh.shape[2:])} beside {tuple(weight_ih.shape[2:])}"
        )
    if weights.bias is not None or layout.forget_offset:
        bias = weight_hh.new_zeros(weight_hh.size(0)) if weights.bias is None else weights.bias.detach()
        if layout.forget_offset:
            bias = bias - _forget_offset(bias, layout)
        for k, template in enumerate(layout.biases):
            put(template, bias if k == 0 else torch.zeros_like(bias))
        if not layout.biases and bool(bias.any()):
            raise ValueError("bias: expected none (or zero), as this layout has no place for it")
    if weights.peephole is not None:
        arrays |= _write_peephole(weights.peephole.detach(), layout, layer, direction)
    return arrays


def _order(layout: Layout) -> str:
    return layout.gates.replace("c", "g")


def _outputs_first(array: Tensor, axes: str) -> Tensor:
    return array.permute(3, 2, 0, 1) if axes == "hwio" and array.dim() == 4 else array


def _outputs_last(array: Tensor, axes: str) -> Tensor:
    return array.permute(2, 3, 1, 0).contiguous() if axes == "hwio" and array.dim() == 4 else array.clone()


def _forget_offset(bias: Tensor, layout: Layout) -> Tensor:
    offset = torch.zeros_like(bias)
    offset.chunk(4)[1].fill_(layout.forget_offset)
    return offset


def _read_peephole(arrays: Mapping[str, Tensor], layout: Layout, layer: int, direction: str) -> Tensor | None:
    if layout.peephole is None:
        return None
    if "{gate}" in layout.peephole:
        names = [layout.name(layout.peephole, layer, direction, gate) for gate in "ifo"]
        missing = [name for name in names if name not in arrays]
        if len(missing) == 3:
            return None
        if missing:
            raise ValueError(f"arrays: expected one named {missing[0]!r} beside the other peepholes")
        parts = [arrays[name] for name in names]
    else:
        name = layout.name(layout.peephole, layer, direction)
        if name not in arrays:
            return None
        parts = list(arrays[name].chunk(3, dim=1 if layout.peephole_axes == "1c" else 0))
    peephole = torch.stack([part[0] if layout.peephole_axes == "1c" else part for part in parts])
    # One value a channel: (3, C), whatever axes of size one the library keeps behind it. A state of one pixel has the
    # same shape and the same meaning.
    return peephole.flatten(1) if peephole.shape[2:].numel() == 1 else peephole


def _write_peephole(peephole: Tensor, layout: Layout, layer: int, direction: str) -> dict[str, Tensor]:
    if layout.peephole is None:
        raise ValueError("peephole: expected none, as this layout has no place for it")
    if peephole.dim() == 2:
        peephole = peephole[:, :, None, None]
    parts = [part[None] if layout.peephole_axes == "1c" else part for part in peephole]
    if "{gate}" in layout.peephole:
        return {
            layout.name(layout.peephole, layer, direction, gate): part.clone()
            for gate, part in zip("ifo", parts, strict=True)
        }
    axis = 1 if layout.peephole_axes == "1c" else 0
    return {layout.name(layout.peephole, layer, direction): torch.cat(parts, dim=axis)}
