"""What the shapes and names of a module's tensors tell about a ConvLSTM in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..backends.call import ConvLSTMOptions, conv_output_size, same_padding
from ..convert.layouts import Layout
from ..functional import resolve_padding
from ..modules._recurrent import ConvolutionArguments

# Names of the height and the width of the frames that a module was made for.
_SIZE_ATTRIBUTES = (("height", "width"), ("_state_height", "_state_width"))
_SIZE_PAIRS = ("input_size", "image_size", "frame_size", "shape")
_PEEPHOLE = re.compile(r"^(W_?c_?|w_?c_?|weight_?c_?|peephole_?)([ifo])$")


@dataclass(frozen=True)
class Gates:
    """The convolutions that make the gates of one cell."""

    layouts: tuple[Layout, ...]  # the possible ones; the order of the gates in them is a guess, unless names tell it
    order_known: bool
    input_conv: nn.Conv2d
    recurrent_conv: nn.Conv2d  # the same as input_conv, if that works on x and h together
    channels: int
    in_channels: int
    norms: tuple[str, ...]  # kinds of the layers between a convolution and the gates
    size: tuple[int, int] | None  # of the frames, if the module was made for one size

    def options(self) -> dict[str, Any]:
        """Arguments of ConvLSTM2d."""
        top, bottom, left, right = _padding(self.input_conv)
        return {
            "kernel_size": self.input_conv.kernel_size,
            "recurrent_kernel_size": self.recurrent_conv.kernel_size,
            "stride": self.input_conv.stride,
            "padding": ((top, bottom), (left, right)),
            "dilation": self.input_conv.dilation,
            "recurrent_dilation": self.recurrent_conv.dilation,
            "padding_mode": self.input_conv.padding_mode,
        }

    def convolution_options(self) -> ConvLSTMOptions:
        return ConvolutionArguments(**self.options(), groups=1, gate_activation="sigmoid").options()

    def state_size(self, size: tuple[int, int]) -> tuple[int, int]:
        o = self.convolution_options()
        return conv_output_size(size, _two(self.input_conv.kernel_size), o.stride, o.padding, o.dilation)

    def refusal(self) -> str | None:
        """Why these convolutions are none of a ConvLSTM2d; None if they are."""
        for conv in (self.input_conv, self.recurrent_conv):
            if conv.groups != 1:
                return f"its convolution has {conv.groups} groups over all gates together"
            if "weight" not in conv._parameters:
                return (
                    "its convolution's weight is computed from others (weight_norm, pruning or the like): remove that"
                )
        recurrent = self.recurrent_conv
        if _two(recurrent.stride) != (1, 1) or _padding(recurrent) != same_padding(
            _two(recurrent.kernel_size), _two(recurrent.dilation)
        ):
            return "its recurrent convolution does not keep the size of the state"
        if self.input_conv.padding_mode != recurrent.padding_mode:
            return "its two convolutions differ in their padding_mode"
        return None


def find_gates(module: nn.Module) -> Gates | None:
    """The gate convolutions among the direct children of ``module``; None if it has none."""
    convs = dict(_convolutions(module))
    return _eight(module, convs) or _two_kernels(module, convs) or _one_kernel(module, convs)


def convolution_count(module: nn.Module) -> int:
    """How many convolutions, of any kind, ``module`` has anywhere in it."""
    return sum(isinstance(child, nn.modules.conv._ConvNd) for child in module.modules())


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is trained, or was before it was frozen: a parameter, or a plain tensor with a gradient."""
    return isinstance(tensor, nn.Parameter) or tensor.requires_grad


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensors that are plain attributes, by their dotted names."""
    tensors: dict[str, Tensor] = {}
    for prefix, child in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        tensors |= {dot + name: value for name, value in vars(child).items() if isinstance(value, Tensor)}
        tensors |= {dot + name: value for name, value in child.named_parameters(recurse=False)}
        tensors |= {dot + name: value for name, value in child.named_buffers(recurse=False)}
    return tensors


def with_prefix(layout: Layout, prefix: str) -> Layout:
    """The layout of a cell as seen from a module that has it as ``prefix``."""
    return replace(
        layout,
        kernels=tuple(prefix + name for name in layout.kernels),
        biases=tuple(prefix + name for name in layout.biases),
        peephole=None if layout.peephole is None else prefix + layout.peephole,
    )


def frame_size(module: nn.Module) -> tuple[int, int] | None:
    """The only size of frames that ``module`` takes, as its attributes tell; None if they do not."""
    pairs: list[Any] = [(getattr(module, h, None), getattr(module, w, None)) for h, w in _SIZE_ATTRIBUTES]
    pairs += [getattr(module, name, None) for name in _SIZE_PAIRS]
    for pair in pairs:
        if isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(n, int) for n in pair):
            return pair[0], pair[1]
    return None


@dataclass(frozen=True)
class _Named:
    """A convolution, with the name of its weight without the ending, and the kinds of the layers behind it."""

    conv: nn.Conv2d
    name: str
    behind: tuple[str, ...] = ()


def _convolutions(module: nn.Module) -> Iterator[tuple[str, _Named]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            yield name, _Named(child, name)
        elif isinstance(child, nn.Sequential) and len(child) and isinstance(child[0], nn.Conv2d):
            yield name, _Named(child[0], f"{name}.0", tuple(type(layer).__name__ for layer in list(child)[1:]))


def _make(
    module: nn.Module,
    layouts: tuple[Layout, ...],
    order_known: bool,
    convs: tuple[_Named, _Named],
    channels: int,
    in_channels: int,
) -> Gates:
    peephole = _peephole(module, channels)
    input_conv, recurrent_conv = convs[0].conv, convs[1].conv
    gates = Gates(
        tuple(replace(layout, **peephole[0]) for layout in layouts) if peephole else layouts,
        order_known,
        input_conv,
        recurrent_conv,
        channels,
        in_channels,
        tuple(dict.fromkeys(convs[0].behind + convs[1].behind)),
        frame_size(module),
    )
    if peephole and peephole[1] is not None and gates.size is None:
        return replace(gates, size=_input_size(gates, peephole[1]))
    return gates


def _one_kernel(module: nn.Module, convs: Mapping[str, _Named]) -> Gates | None:
    fitting = [
        c for c in convs.values() if c.conv.out_channels % 4 == 0 and c.conv.in_channels > c.conv.out_channels // 4
    ]
    if len(fitting) != 1:
        return None
    named = fitting[0]
    channels = named.conv.out_channels // 4
    layout = Layout("ifgo", (f"{named.name}.weight",), biases=(f"{named.name}.bias",))
    layouts = (layout, replace(layout, input_first=False))
    return _make(module, layouts, False, (named, named), channels, named.conv.in_channels - channels)


def _two_kernels(module: nn.Module, convs: Mapping[str, _Named]) -> Gates | None:
    """A convolution from x and one from h to all gates; which is which, the names tell if the shapes do not."""
    by_outputs: dict[int, list[_Named]] = {}
    for named in convs.values():
        by_outputs.setdefault(named.conv.out_channels, []).append(named)
    for outputs, fitting in by_outputs.items():
        recurrent = [c for c in fitting if 4 * c.conv.in_channels == outputs]
        if len(fitting) == 2 and recurrent:
            break
    else:
        return None
    channels = outputs // 4
    if len(recurrent) == 2:
        recurrent = [c for c in fitting if re.search(r"(^|_)h|hh|rec", c.name)][:1] or fitting[1:]
    second = recurrent[0]
    first = fitting[0] if fitting[1] is second else fitting[1]
    layout = Layout(
        "ifgo",
        (f"{first.name}.weight", f"{second.name}.weight"),
        biases=(f"{first.name}.bias", f"{second.name}.bias"),
    )
    return _make(module, (layout,), False, (first, second), channels, first.conv.in_channels)


def _eight(module: nn.Module, convs: Mapping[str, _Named]) -> Gates | None:
    """A convolution from x and one from h for each gate, named by the gates' letters."""
    families: dict[str, dict[str, _Named]] = {}
    for name, named in convs.items():
        if not named.behind:
            families.setdefault(name[:-1], {})[name[-1:]] = named
    for letters in ("ifco", "ifgo"):
        complete = [(stem, family) for stem, family in families.items() if set(family) == set(letters)]
        if len(complete) != 2:
            continue
        channels = complete[0][1]["i"].conv.out_channels
        recurrent = [k for k, (_, family) in enumerate(complete) if family["i"].conv.in_channels == channels]
        if not recurrent:
            return None
        if len(recurrent) == 2:
            recurrent = [k for k, (stem, _) in enumerate(complete) if "h" in stem.lower()][:1] or [1]
        (second, second_family), (first, first_family) = complete[recurrent[0]], complete[1 - recurrent[0]]
        layout = Layout(
            letters,
            (f"{first}{{gate}}.weight", f"{second}{{gate}}.weight"),
            biases=(f"{first}{{gate}}.bias", f"{second}{{gate}}.bias"),
        )
        pair = (first_family["i"], second_family["i"])
        return _make(module, (layout,), True, pair, channels, pair[0].conv.in_channels)
    return None


def _peephole(module: nn.Module, channels: int) -> tuple[dict[str, Any], tuple[int, int] | None] | None:
    """How the peepholes of ``module`` are stored and for which size of the state; None if it has none.

    Tensors that are no weights are none: they are the zeros of a module that has given up on them.
    """
    direct = {name: value for name, value in named_tensors(module).items() if "." not in name and is_weight(value)}
    stems: dict[str, set[str]] = {}
    for name in direct:
        match = _PEEPHOLE.match(name)
        if match:
            stems.setdefault(match[1], set()).add(match[2])
    for stem, letters in stems.items():
        shape = tuple(direct[f"{stem}i"].shape) if letters == set("ifo") else ()
        axes = "1c" if shape[:2] == (1, channels) and len(shape) == 4 else "c"
        core = shape[1:] if axes == "1c" else shape
        if core[:1] == (channels,) and len(core) in (1, 3):
            size = (core[1], core[2]) if len(core) == 3 and core[1:] != (1, 1) else None
            return {"peephole": f"{stem}{{gate}}", "peephole_axes": axes}, size
    for name, value in direct.items():
        if tuple(value.shape[:2]) == (1, 3 * channels) and value.dim() == 4:
            size = (value.size(2), value.size(3)) if value.shape[2:].numel() > 1 else None
            return {"peephole": name, "peephole_axes": "1c"}, size
    return None


def _input_size(gates: Gates, state_size: tuple[int, int]) -> tuple[int, int]:
    """The smallest frames that have a state of ``state_size``."""
    conv = gates.input_conv
    top, bottom, left, right = _padding(conv)
    stride, kernel, dilation = _two(conv.stride), _two(conv.kernel_size), _two(conv.dilation)
    height = (state_size[0] - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1 - top - bottom
    width = (state_size[1] - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1 - left - right
    return height, width


def _padding(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    return resolve_padding(conv.padding, _two(conv.kernel_size), _two(conv.dilation))


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]
