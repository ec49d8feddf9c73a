"""Fused layers behind the call signatures of the modules that they replace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from ..backends.call import state_dtype
from ..convert.layouts import LayerWeights, Layout, read_layer, write_layer
from ..convert.weights import build, copy_layer
from ..modules import ConvLSTM2d, ConvLSTM2dCell
from .structure import named_tensors

PARAMETERS = tuple(field.name for field in fields(LayerWeights))
_REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class CellPlan:
    """How one layer and direction of a module becomes parameters of a fused layer."""

    layout: Layout  # names as seen from the module that is replaced
    options: Mapping[str, Any]  # arguments of ConvLSTM2d
    size: tuple[int, int] | None  # the only size of frames that the cell takes
    description: str


@dataclass(frozen=True)
class Call:
    """Arguments to try a module with. ``optional``: a call that the module need not understand."""

    args: tuple[Any, ...]
    optional: bool = False


class SwappedLayer(nn.Module):
    """Base of the adapters: holds the fused layers, and the module that they replace.

    The replaced module is kept outside of the parameters and buffers, for :meth:`restore` and for attributes and
    methods that only it has. Its weights are not used. A state dict in its layout can be loaded.
    """

    # What kind of call the adapter has, for the report.
    kind: ClassVar[str]
    # Arguments of the constructor that running the module has to decide.
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(self, original: Any, plans: Sequence[Sequence[CellPlan]]) -> None:
        """``plans``: one list a layer, of one plan a direction."""
        nn.Module.__init__(self)  # not that of the replaced module's class, which SpikingCell has among its bases
        self.__dict__["_original"] = (original,)
        self._plans = [list(directions) for directions in plans]
        self._signature = [
            (p.name, p.default)
            for p in inspect.signature(original.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]
        tensors = named_tensors(original)
        self.layers = nn.ModuleList([self._make_layer(directions, tensors) for directions in plans])
        self._read(tensors)
        for layer, suffix, plan in self._cells():
            trained = _trained(plan.layout, tensors)
            for name in PARAMETERS:
                parameter = getattr(layer, name + suffix)
                if parameter is not None:
                    parameter.requires_grad_(True in trained[name])
        self.train(original.training)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether ``module`` could be called as this adapter is, judging by attributes and by its signature."""
        raise NotImplementedError

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        """Calls to try. ``frames`` is (T, B, Cin, H, W), ``states`` (h, c) of each layer."""
        raise NotImplementedError

    @classmethod
    def make(cls, original: nn.Module, plans: Sequence[Sequence[CellPlan]], **variant: Any) -> SwappedLayer:
        return cls(original, plans, **variant)

    @property
    def original(self) -> nn.Module:
        """The module that this one replaces, with the weights that it had then."""
        original: nn.Module = self.__dict__["_original"][0]
        return original

    def restore(self) -> nn.Module:
        """The module that this one replaces, with the present weights, frozen as they are now."""
        tensors = named_tensors(self.original)
        with torch.no_grad():
            for layer, suffix, plan in self._cells():
                weights = LayerWeights(*(getattr(layer, name + suffix) for name in PARAMETERS))
                for name, value in write_layer(weights, _with_present_biases(plan.layout, tensors)).items():
                    tensors[name].copy_(value)
                trained = {name: one.requires_grad for name, one in vars(weights).items() if one is not None}
                stored = _stored(plan.layout, tensors)
                # Trained ones last: a kernel over x and h is trained if either part is.
                for parameter in sorted(trained, key=lambda name: trained[name]):
                    for names in stored[parameter]:
                        # As before, where that is as trained as now: one bias of two may be frozen.
                        if any(tensors[name].requires_grad for name in names) != trained[parameter]:
                            for name in names:
                                tensors[name].requires_grad_(trained[parameter])
        return self.original.train(self.training)

    def frozen_in_part(self) -> str | None:
        """Why training would not go on as before: a parameter is made of frozen weights and of others."""
        tensors = named_tensors(self.original)
        for _, _, plan in self._cells():
            if any(len(trained) > 1 for trained in _trained(plan.layout, tensors).values()):
                return "some of its weights are frozen and others not, that are one parameter in a fused layer"
        return None

    def frame_size(self) -> tuple[int, int] | None:
        """The only size of frames that the replaced module takes; None if it takes any."""
        return self._plans[0][0].size

    def describe(self) -> str:
        texts = list(dict.fromkeys(plan.description for directions in self._plans for plan in directions))
        layers = "1 layer" if len(self._plans) == 1 else f"{len(self._plans)} layers"
        return f"{self.kind}, {layers}; {'; '.join(texts)}"

    def _make_layer(self, directions: Sequence[CellPlan], tensors: Mapping[str, Tensor]) -> nn.Module:
        return self._build(ConvLSTM2d, directions, tensors, bidirectional=len(directions) == 2)

    def _build(
        self, kind: type[nn.Module], directions: Sequence[CellPlan], tensors: Mapping[str, Tensor], **options: Any
    ) -> nn.Module:
        plan = directions[0]
        weights = read_layer(tensors, plan.layout)
        if weights.peephole_kind == "pixel":
            options["image_size"] = plan.size
        layer: nn.Module = build(
            kind,
            weights.weight_ih.size(1),
            weights.channels,
            bias=weights.bias is not None,
            peephole=weights.peephole_kind,
            device=weights.weight_ih.device,
            dtype=weights.weight_ih.dtype,
            **plan.options,
            **options,
        )
        return layer

    def _cells(self) -> Iterator[tuple[nn.Module, str, CellPlan]]:
        """Layer, ending of its parameters' names, and plan, for each layer and direction."""
        for layer, directions in zip(self.layers, self._plans, strict=True):
            for suffix, plan in zip(_suffixes(layer), directions, strict=True):
                yield layer, suffix, plan

    def _read(self, tensors: Mapping[str, Tensor]) -> None:
        for layer, suffix, plan in self._cells():
            copy_layer(layer, suffix, vars(read_layer(tensors, plan.layout)))

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments of a call in the order of the replaced module's signature, under whatever names they came."""
        values = list(args)
        for name, default in self._signature[len(args) :]:
            value = kwargs.pop(name, default)
            if value is _REQUIRED:
                raise TypeError(f"forward() missing required argument {name!r}")
            values.append(value)
        if kwargs or len(values) > len(self._signature):
            names = ", ".join(name for name, _ in self._signature)
            raise TypeError(f"forward() takes {names}; got {len(args)} arguments and {sorted(kwargs)}")
        return values

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        self.original._apply(fn, recurse)  # its methods make states where its weights are
        module: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = self.state_dict(keep_vars=True)
        given = {
            name: state_dict[prefix + name]
            for name in self.original.state_dict()
            if name not in own and prefix + name in state_dict
        }
        if given:  # a checkpoint from before the swap
            tensors = named_tensors(self.original)
            for name, value in list(given.items()):
                del state_dict[prefix + name]
                if value.shape != tensors[name].shape:
                    args[-1].append(  # the errors that load_state_dict collects
                        f"size mismatch for {prefix}{name}: expected {tuple(tensors[name].shape)}, "
                        f"got {tuple(value.shape)} from the checkpoint"
                    )
                    del given[name]
            # Also what no fused layer needs: unswap gives it back.
            assign = args[0].get("assign_to_params_buffers", False)
            self.original.load_state_dict(given, strict=False, assign=assign)
            tensors = named_tensors(self.original)
            for k, (layer, directions) in enumerate(zip(self.layers, self._plans, strict=True)):
                for suffix, plan in zip(_suffixes(layer), directions, strict=True):
                    for name, value in vars(read_layer(tensors, plan.layout)).items():
                        if value is not None:
                            state_dict[f"{prefix}layers.{k}.{name}{suffix}"] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_original" not in self.__dict__:
                raise
        value = getattr(self.original, name)
        if isinstance(value, (Tensor, nn.Module)):
            raise AttributeError(
                f"{name!r} of the {type(self.original).__name__} is not used any more: {type(self).__name__} keeps its "
                "weights in its layers; unswap() gives it back"
            )
        return value

    def extra_repr(self) -> str:
        return f"in place of {type(self.original).__name__}: {self.describe()}"


def _suffixes(layer: nn.Module) -> list[str]:
    """The endings of the names of a layer's parameters."""
    return layer._suffixes() if isinstance(layer, ConvLSTM2d) else [""]


def _state(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A state of any precision as a fused layer takes it with x: the replaced code would promote it, and a c that
    broadcasts, too."""
    c = torch.broadcast_tensors(h, c)[1]
    return h.to(x.dtype), c.to(state_dtype(x.dtype))


def _trained(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, set[bool]]:
    """For each parameter of a fused cell, whether the weights that it is made of are trained: more than one answer if
    that differs from gate to gate. One trained bias of two that are added learns what both would."""
    return {
        parameter: {any(tensors[name].requires_grad for name in names) for names in by_gate}
        for parameter, by_gate in _stored(layout, tensors).items()
    }


def _stored(layout: Layout, tensors: Mapping[str, Tensor]) -> dict[str, list[list[str]]]:
    """For each parameter of a fused cell, the names of what it is made of, gate by gate."""
    templates = {
        "weight_ih": layout.kernels[:1],
        "weight_hh": layout.kernels[-1:],
        "bias": layout.biases,
        "peephole": (layout.peephole,) if layout.peephole else (),
    }
    stored = {}
    for parameter, of_it in templates.items():
        by_gate = [[name for one in of_it if (name := one.format(gate=gate)) in tensors] for gate in layout.gates]
        stored[parameter] = [names for names in by_gate if names]
    return stored


def _with_present_biases(layout: Layout, tensors: Mapping[str, Tensor]) -> Layout:
    """The layout without the biases that the module does not have."""
    return replace(layout, biases=tuple(name for name in layout.biases if name.format(gate="i") in tensors))


def _first(result: Any) -> Tensor:
    first: Tensor = result[0]
    return first


def _parameter_count(module: nn.Module, required: bool = False) -> int:
    """How many arguments the module's forward takes, or has to get."""
    parameters = inspect.signature(module.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and (not required or p.default is _REQUIRED) for p in parameters)


# --- one step a call -------------------------------------------------------------------------------------------------


class OneCell(SwappedLayer):
    """Base of the adapters of modules that have the convolutions of one cell themselves."""

    from_zeros: ClassVar[bool] = False  # whether a call can only begin with a state of zeros

    @classmethod
    def observe(cls, module: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        """h after one step, as ``module`` computes it. x is (B, Cin, H, W), the others (B, C, Ho, Wo)."""
        raise NotImplementedError


class CellAdapter(OneCell):
    """Base of the adapters of modules that make one step a call."""

    def _make_layer(self, directions: Sequence[CellPlan], tensors: Mapping[str, Tensor]) -> nn.Module:
        return self._build(ConvLSTM2dCell, directions, tensors)


class StatePairCell(CellAdapter):
    """``cell(x, (h, c)) -> (h, c)``: ndrplz, torchgeo, aserdega."""

    kind = "cell(x, (h, c)) -> (h, c)"
    variants = ({"state_type": tuple}, {"state_type": list})

    def __init__(self, original: Any, plans: Sequence[Sequence[CellPlan]], state_type: type = tuple) -> None:
        super().__init__(original, plans)
        self.state_type = state_type

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _parameter_count(module) >= 2 and _parameter_count(module, required=True) <= 2

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        return [Call((frames[0], states[0])), Call((frames[0],), optional=True)]

    @classmethod
    def observe(cls, module: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return _first(module(x, (h, c)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x, state, *_ = self._arguments(args, kwargs)
        h, c = self.layers[0](x, None if state is None else _state(x, *state))
        return self.state_type((h.to(x.dtype), c.to(x.dtype)))


class SeparateStateCell(CellAdapter):
    """``cell(x, h, c) -> (h, c)``: OpenSTL, automan000, SA-ConvLSTM."""

    kind = "cell(x, h, c) -> (h, c)"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _parameter_count(module) >= 3 and _parameter_count(module, required=True) <= 3

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        return [Call((frames[0], *states[0]))]

    @classmethod
    def observe(cls, module: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return _first(module(x, h, c))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        x, h, c, *_ = self._arguments(args, kwargs)
        h, c = self.layers[0](x, _state(x, h, c))
        return h.to(x.dtype), c.to(x.dtype)


# --- a sequence a call, one layer ------------------------------------------------------------------------------------


class TimeMajorSequence(OneCell):
    """``layer(inputs, states, seq_len) -> (outputs, (h, c))`` over (T, B, C, H, W): Hzzone."""

    kind = "layer(inputs, (h, c), seq_len) over (T, B, C, H, W) -> outputs, (h, c)"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _parameter_count(module) == 3 and "seq_len" in inspect.signature(module.forward).parameters

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        steps = len(frames)
        return [
            Call((frames, states[0], steps)),
            Call((frames, states[0], steps - 1)),
            Call((frames, None, steps)),
            Call((None, states[0], steps), optional=True),
        ]

    @classmethod
    def observe(cls, module: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return _first(_first(module(x[None], (h, c), 1)))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs, states, steps = self._arguments(args, kwargs)
        layer = self.layers[0]
        if inputs is None:
            if states is None:
                raise ValueError("inputs: expected frames where there are no states")
            h = states[0]
            stride, size = layer.convolution.stride, self.frame_size()
            if size is None and stride != (1, 1):
                raise ValueError("inputs: expected frames, as the size of the input is not that of the state")
            inputs = h.new_zeros(1, h.size(0), layer.in_channels, *(size or h.shape[2:])).expand(steps, -1, -1, -1, -1)
        outputs, finals = _run_stack(self.layers, inputs[:steps], None if states is None else [states])
        return outputs[0], finals[0]


class BatchFirstSequence(OneCell):
    """``layer(x) -> outputs`` over (B, T, C, H, W), from a state of zeros."""

    kind = "layer(x) over (B, T, C, H, W) -> outputs"
    from_zeros = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _parameter_count(module, required=True) == 1

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        return [Call((frames.transpose(0, 1),))]

    @classmethod
    def observe(cls, module: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return _first(module(x[:, None]).transpose(0, 1))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, *_ = self._arguments(args, kwargs)
        outputs, _ = _run_stack(self.layers, x.transpose(0, 1), None)
        return outputs[0].transpose(0, 1)


# --- a sequence a call, one or more layers, made of cells ------------------------------------------------------------


class StackAdapter(SwappedLayer):
    """Base of the adapters of modules that loop over cells of their own."""

    @classmethod
    def cells(cls, module: nn.Module) -> dict[str, nn.Module] | None:
        """The cells of ``module`` in the order of its layers, by their names; None if there is no such thing."""
        raise NotImplementedError


class CellListStack(StackAdapter):
    """``stack(x, states) -> [outputs of a layer], [(h, c) of a layer]``, always batch first: ndrplz, torchgeo.

    Some versions take states and start from zeros all the same; ``uses_state`` tells.
    """

    kind = "stack(x, states) -> layer outputs, last states"
    variants = tuple({"state_type": t, "uses_state": u} for u in (True, False) for t in (list, tuple))

    def __init__(
        self,
        original: Any,
        plans: Sequence[Sequence[CellPlan]],
        state_type: type = list,
        uses_state: bool = True,
    ) -> None:
        super().__init__(original, plans)
        self.state_type = state_type
        self.uses_state = uses_state
        self.batch_first = bool(original.batch_first)
        self.return_all_layers = bool(original.return_all_layers)

    @classmethod
    def cells(cls, module: nn.Module) -> dict[str, nn.Module] | None:
        return _listed_cells(module) if hasattr(module, "return_all_layers") else None

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return hasattr(module, "batch_first") and hasattr(module, "return_all_layers")

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        x = frames.transpose(0, 1) if module.batch_first else frames
        return [Call((x,)), Call((x, states), optional=True)]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], list[Any]]:
        x, states, *_ = self._arguments(args, kwargs)
        states = states if self.uses_state else None
        outputs, finals = _run_stack(self.layers, x.transpose(0, 1) if self.batch_first else x, states)
        first = 0 if self.return_all_layers else -1
        return (
            [output.transpose(0, 1) for output in outputs[first:]],
            [self.state_type(final) for final in finals[first:]],
        )


class LastOutputStack(StackAdapter):
    """``stack(x, states) -> last layer's outputs, [(h, c) of a layer]``, time first or batch first: aserdega."""

    kind = "stack(x, states) -> outputs, last states"
    variants = ({"state_type": tuple}, {"state_type": list})

    def __init__(self, original: Any, plans: Sequence[Sequence[CellPlan]], state_type: type = tuple) -> None:
        super().__init__(original, plans)
        self.state_type = state_type
        self.batch_first = bool(original.batch_first)

    @classmethod
    def cells(cls, module: nn.Module) -> dict[str, nn.Module] | None:
        return _listed_cells(module)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return hasattr(module, "batch_first") and not hasattr(module, "return_all_layers")

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        x = frames.transpose(0, 1) if module.batch_first else frames
        return [Call((x, states)), Call((x, None), optional=True)]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Any]]:
        x, states, *_ = self._arguments(args, kwargs)
        outputs, finals = _run_stack(self.layers, x.transpose(0, 1) if self.batch_first else x, states or None)
        output = outputs[-1].transpose(0, 1) if self.batch_first else outputs[-1]
        return output, [self.state_type(final) for final in finals]


class RepeatedFrameStack(StackAdapter):
    """``stack(x) -> [outputs of the effective steps], (h, c)``: the same frame at every step: automan000."""

    kind = "stack(x), the same frame at every step -> outputs of the effective steps, (h, c)"

    @classmethod
    def cells(cls, module: nn.Module) -> dict[str, nn.Module] | None:
        cells = {f"cell{k}": cell for k in range(len(module._modules)) if (cell := module._modules.get(f"cell{k}"))}
        return cells or None

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return hasattr(module, "step") and hasattr(module, "effective_step")

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        return [Call((frames[0],))]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        (x,) = self._arguments(args, kwargs)
        outputs, finals = _run_stack(self.layers, x.expand(self.step, *x.shape), None)
        return [outputs[-1][t] for t in range(self.step) if t in self.effective_step], finals[-1]


class ChannelsBeforeTime(StackAdapter):
    """``layer(x, h, c) -> outputs`` over (B, C, T, H, W): SA-ConvLSTM.

    Some versions take a state and then start from zeros all the same; ``uses_state`` tells.
    """

    kind = "layer(x) over (B, C, T, H, W) -> outputs"
    variants = ({"uses_state": True}, {"uses_state": False})

    def __init__(self, original: Any, plans: Sequence[Sequence[CellPlan]], uses_state: bool = True) -> None:
        super().__init__(original, plans)
        self.uses_state = uses_state

    @classmethod
    def cells(cls, module: nn.Module) -> dict[str, nn.Module] | None:
        children = dict(module.named_children())
        return children if len(children) == 1 else None

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return _parameter_count(module, required=True) == 1

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        x = frames.permute(1, 2, 0, 3, 4)
        calls = [Call((x,))]
        if _parameter_count(module) == 3:
            calls.append(Call((x, *states[0]), optional=True))
        return calls

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x, *state = self._arguments(args, kwargs)
        given = self.uses_state and len(state) == 2 and state[0] is not None
        outputs, _ = _run_stack(self.layers, x.permute(2, 0, 1, 3, 4), [state] if given else None)
        return outputs[0].permute(1, 2, 0, 3, 4)


def _listed_cells(module: nn.Module) -> dict[str, nn.Module] | None:
    """The cells in the only ModuleList among the children, if there is nothing else."""
    children = list(module.named_children())
    if len(children) != 1 or not isinstance(children[0][1], nn.ModuleList):
        return None
    name, cells = children[0]
    return {f"{name}.{k}": cell for k, cell in cells.named_children()} or None


def _run_stack(
    layers: nn.ModuleList,
    x: Tensor,  # (T, B, Cin, H, W)
    states: Sequence[Sequence[Tensor]] | None,  # (h, c) of each layer, (B, C, H, W)
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The outputs (T, B, C, H, W) and last states (h, c) of every layer, all in the type of ``x``."""
    outputs: list[Tensor] = []
    finals: list[tuple[Tensor, Tensor]] = []
    dtype = x.dtype
    for k, layer in enumerate(layers):
        hx = None
        if states is not None:
            h, c = _state(x, *states[k])
            hx = (h[None], c[None])
        x, (h_n, c_n) = layer(x, hx)
        x = x.to(dtype)
        outputs.append(x)
        finals.append((h_n[0].to(dtype), c_n[0].to(dtype)))
    return outputs, finals


# --- like nn.LSTM ----------------------------------------------------------------------------------------------------


class LstmLike(SwappedLayer):
    """``layer(x, (h_0, c_0)) -> output, (h_n, c_n)`` with nn.LSTM's names and shapes, and PackedSequence:
    kamo-naoyuki."""

    kind = "layer(x, (h_0, c_0)) -> output, (h_n, c_n), as nn.LSTM"

    def __init__(self, original: Any, plans: Sequence[Sequence[CellPlan]]) -> None:
        super().__init__(original, plans)
        self.batch_first = bool(original.batch_first)
        self.dropout = float(original.dropout)

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = ("num_layers", "batch_first", "bidirectional", "dropout", "weight_ih_l0", "weight_hh_l0")
        return all(hasattr(module, name) for name in names) and not isinstance(module, (nn.RNNBase, ConvLSTM2d))

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        x = frames.transpose(0, 1) if module.batch_first else frames
        hx = (torch.stack([h for h, _ in states]), torch.stack([c for _, c in states]))
        packed = pack_sequence([frames[: len(frames) - b, b] for b in range(frames.size(1))])
        return [Call((x,)), Call((x, hx)), Call((packed,), optional=True), Call((packed, hx), optional=True)]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
        x, hx = self._arguments(args, kwargs)
        packed = isinstance(x, PackedSequence)
        transposed = self.batch_first and not packed
        output = x.transpose(0, 1) if transposed else x
        h_n, c_n = [], []
        for k, layer in enumerate(self.layers):
            directions = 2 if layer.bidirectional else 1
            part = slice(k * directions, (k + 1) * directions)
            values = output.data if packed else output
            output, (h, c) = layer(output, None if hx is None else _state(values, hx[0][part], hx[1][part]))
            h_n.append(h.to(values.dtype))
            c_n.append(c.to(values.dtype))
            if k < len(self.layers) - 1 and self.dropout:
                output = self._drop(output)
        output = output.transpose(0, 1) if transposed else output
        return output, (torch.cat(h_n), torch.cat(c_n))

    def _drop(self, output: Any) -> Any:
        """Dropout of every element on its own, as in the module that is replaced."""
        if isinstance(output, PackedSequence):
            return output._replace(data=F.dropout(output.data, self.dropout, self.training))
        return F.dropout(output, self.dropout, self.training)


# --- with spikes -----------------------------------------------------------------------------------------------------


class SpikingCell(CellAdapter):
    """``cell(x, syn, mem) -> spikes, syn, mem`` with the states kept in attributes of these names: snntorch.

    A spiking neuron is more than its cell: thresholds, surrogate gradients, resets and poolings, and functions of its
    library that look for neurons by their type. So the adapter is of that type too: everything but the state function
    is the replaced module's own.
    """

    kind = "cell(x, syn, mem) -> spikes, syn, mem"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        names = ("syn", "mem", "fire", "state_function", "_base_state_function", "init_hidden", "threshold")
        return all(hasattr(module, name) for name in names)

    @classmethod
    def calls(cls, module: Any, frames: Tensor, states: list[tuple[Tensor, Tensor]]) -> list[Call]:
        if module.init_hidden:
            return [Call((frames[0],)), Call((frames[1],))]
        h, c = states[0]
        return [Call((frames[0], c, h)), Call((frames[1],))]

    @classmethod
    def observe(cls, module: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        module.syn, module.mem = c, h
        result: Tensor = module._base_state_function(x)[1]
        return result

    @classmethod
    def make(cls, original: nn.Module, plans: Sequence[Sequence[CellPlan]], **variant: Any) -> SwappedLayer:
        neuron: SwappedLayer = _spiking_class(cast(Any, type(original)))(original, plans)
        return neuron


class _SpikingState:
    """What an adapter of the replaced neuron's type overrides."""

    def __init__(self, original: Any, plans: Sequence[Sequence[CellPlan]]) -> None:
        super().__init__(original, plans)  # type: ignore[call-arg]
        for name, value in vars(original).items():
            if name not in self.__dict__:
                # The state function is a method of the replaced module.
                bound = isinstance(value, MethodType) and value.__self__ is original
                self.__dict__[name] = MethodType(value.__func__, self) if bound else value
        self._buffers = dict(original._buffers)
        self._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
        self._parameters = dict(original._parameters)
        instances = getattr(type(original), "instances", [])  # where the library looks for states to reset
        if any(one is original for one in instances):  # which copies made to be tried out are not
            instances.append(self)

    def restore(self) -> nn.Module:
        """The neuron that this one replaces, with the present weights, settings and state."""
        module: nn.Module = super().restore()  # type: ignore[misc]
        for before, now in (
            (module._buffers, self._buffers),
            (module._parameters, self._parameters),
            (vars(module), vars(self)),
        ):
            before |= {k: now[k] for k in before if k in now and k[0] != "_" and not isinstance(now[k], MethodType)}
        return module

    def _base_state_function(self, input_: Tensor) -> tuple[Tensor, Tensor]:
        state = _state(input_, self.mem, self.syn)  # type: ignore[attr-defined]
        mem, syn = self.layers[0](input_, state)  # type: ignore[attr-defined]
        return syn.to(input_.dtype), mem.to(input_.dtype)

    def _base_state_reset_zero(self, input_: Tensor) -> tuple[int, Tensor]:
        return 0, self._base_state_function(input_)[1]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank_spiking, (type(self)._neuron,), self.__dict__  # type: ignore[attr-defined]


@cache
def _spiking_class(neuron: Any) -> Any:
    return type(f"Swapped{neuron.__name__}", (_SpikingState, SpikingCell, neuron), {"_neuron": neuron})


def _blank_spiking(neuron: type[nn.Module]) -> Any:
    cls = _spiking_class(cast(Any, neuron))
    return cls.__new__(cls)
