"""Finds out whether a module is a ConvLSTM, and makes the adapter that replaces it.

Structure proposes, a run decides: names and shapes say which adapters are possible, then the module and each candidate
run on random input, with random weights, and must give the same results, of the same types, and the same gradients.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.layouts import Layout
from ..modules import ConvLSTM2d, ConvLSTM2dCell, PooledGateConvLSTM2d, PooledGateConvLSTM2dCell
from . import adapters
from .adapters import Call, CellPlan, LstmLike, OneCell, StackAdapter, SwappedLayer
from .probe import TOLERANCE, Maths, ProbeError, first_line, identify, probe_copy, random_frames, replace_norms
from .structure import Gates, find_gates, frame_size, named_tensors, with_prefix
from .values import map_tensors, same_structure, tensors_in

STACKS: tuple[type[StackAdapter], ...] = (
    adapters.CellListStack,
    adapters.LastOutputStack,
    adapters.RepeatedFrameStack,
    adapters.ChannelsBeforeTime,
)
ONE_CELL: tuple[type[OneCell], ...] = (
    adapters.SpikingCell,
    adapters.TimeMajorSequence,
    adapters.StatePairCell,
    adapters.SeparateStateCell,
    adapters.BatchFirstSequence,
)
_OURS = (ConvLSTM2d, ConvLSTM2dCell, PooledGateConvLSTM2d, PooledGateConvLSTM2dCell, SwappedLayer)
STEPS, BATCH, DEFAULT_SIZE = 3, 2, (7, 6)


def recognise(module: nn.Module) -> SwappedLayer | str | None:
    """The adapter that replaces ``module``, or why it is not replaced, or None if it is no ConvLSTM at all.

    ``module`` itself is not changed.
    """
    if is_fused(module) or isinstance(module, torch.jit.ScriptModule):
        return None
    named = "lstm" in type(module).__name__.lower()
    try:
        if LstmLike.matches(module):
            return _lstm_like(module)
        for stack in STACKS:
            cells = stack.cells(module) if stack.matches(module) else None
            if cells and all(find_gates(cell) is not None and _takes_state(cell) for cell in cells.values()):
                return _stack(stack, module, cells)
        gates = find_gates(module)
        if gates is None or not (named or _takes_state(module)):
            return None
        return _one_cell(module, gates)
    except NotRecognisedError as reason:
        # What neither is called a ConvLSTM nor computes anything like one is of no interest.
        return str(reason) if named or reason.like_an_lstm else None
    except ProbeError as reason:
        return str(reason) if named else None


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of this package, or stands for one."""
    return isinstance(module, _OURS)


class NotRecognisedError(ProbeError):
    """``like_an_lstm``: the module computes something close to a ConvLSTM, or consists of such cells."""

    def __init__(self, reason: str, like_an_lstm: bool) -> None:
        super().__init__(reason)
        self.like_an_lstm = like_an_lstm


def _takes_state(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) >= 2


def _one_cell(module: nn.Module, gates: Gates) -> SwappedLayer:
    reasons: list[str] = []
    like_an_lstm = False
    for kind in ONE_CELL:
        if not kind.matches(module):
            continue
        try:
            found = _maths(kind, module, gates)
        except ProbeError as error:
            reasons.append(str(error))
            continue
        like_an_lstm = like_an_lstm or bool(found)
        reason = _refusal(gates, found)
        if reason is not None:
            reasons.append(reason)
            if found:
                break  # run as this kind it is a cell, but not ours
            continue
        candidates = [[[_plan(gates, maths)]] for maths in found if maths.refusal() is None]
        adapter = _first_equal(kind, module, candidates, gates.size)
        if adapter is not None:
            return adapter
        reasons.append(f"as {kind.kind} its results differ from a ConvLSTM's after the first step")
    raise NotRecognisedError(_join(reasons) or "it has gate convolutions, but no known signature", like_an_lstm)


def _stack(kind: type[StackAdapter], module: nn.Module, cells: dict[str, nn.Module]) -> SwappedLayer:
    plans: list[list[CellPlan]] = []
    size = frame_size(module)
    for name, cell in cells.items():
        gates = find_gates(cell)
        assert gates is not None
        found: list[Maths] = []
        reasons = []
        for cell_kind in (adapters.StatePairCell, adapters.SeparateStateCell):
            if cell_kind.matches(cell):
                try:
                    found = _maths(cell_kind, cell, gates)
                    break
                except ProbeError as error:
                    reasons.append(str(error))
        if not found and gates.order_known and gates.refusal() is None:
            # Such a cell may run inside its stack only, and its names tell its gates: the stack as a whole decides.
            found = [Maths(layout) for layout in gates.layouts]
        reason = _refusal(gates, found)
        if reason is not None:
            raise NotRecognisedError(f"{name}: {_join(reasons) if reasons and not found else reason}", True)
        size = size or gates.size
        plans.append([_plan(gates, found[0], f"{name}.")])  # from a state that is not zero there is only one
    adapter = _first_equal(kind, module, [plans], size)
    if adapter is None:
        raise NotRecognisedError(f"its cells are ConvLSTMs, but called as {kind.kind} its results differ", True)
    return adapter


def _lstm_like(module: Any) -> SwappedLayer:
    names = dict(module.named_parameters(recurse=False))
    weight = names.get("weight_ih_l0")
    if weight is None or weight.dim() < 3:
        raise NotRecognisedError("its weights are not of a convolution", False)
    if weight.dim() != 4:
        raise NotRecognisedError(f"its convolutions are {weight.dim() - 2}-dimensional, ConvLSTM2d's are 2", True)
    if getattr(module, "groups", 1) != 1:
        raise NotRecognisedError(f"its convolution has {module.groups} groups over all gates together", True)
    if weight.size(0) != 4 * names["weight_hh_l0"].size(1):
        raise NotRecognisedError("it does not have four gates", False)
    if "weight_pi_l0" in names:
        raise NotRecognisedError("its peepholes are convolutions, not products", True)
    if any(stride != 1 for stride in module.stride):
        raise NotRecognisedError("its strided convolution gives a state as large as the input", True)
    options = {"dilation": module.dilation}
    plans = []
    for layer in range(module.num_layers):
        directions = []
        for direction in ("", "_reverse") if module.bidirectional else ("",):
            end = f"_l{layer}{direction}"
            layout = Layout("ifgo", (f"weight_ih{end}", f"weight_hh{end}"), biases=(f"bias_ih{end}", f"bias_hh{end}"))
            kernel = tuple(names[f"weight_ih{end}"].shape[2:])
            directions.append(CellPlan(layout, options | {"kernel_size": kernel}, None, Maths(layout).describe()))
        plans.append(directions)
    adapter = _first_equal(LstmLike, module, [plans], None)
    if adapter is None:
        raise NotRecognisedError("its parameters have nn.LSTM's names, but its results differ from a ConvLSTM's", True)
    return adapter


def _plan(gates: Gates, maths: Maths, prefix: str = "") -> CellPlan:
    options = gates.options() | {"gate_activation": maths.gate_activation}
    return CellPlan(with_prefix(maths.layout, prefix), options, gates.size, maths.describe())


def _refusal(gates: Gates, found: Sequence[Maths]) -> str | None:
    reasons = []
    if gates.norms:
        reasons.append(f"{' and '.join(gates.norms)} on the pre-activations: not a function of the weights alone")
    usable = [maths for maths in found if maths.refusal() is None]
    if found and not usable:
        reasons.append(found[0].refusal() or "")
    if not found and not gates.norms:
        reasons.append("no order of the gates, activation or bias reproduces its output")
    return _join(reasons) or None


def _join(reasons: Sequence[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


# --- running ---------------------------------------------------------------------------------------------------------


def _maths(kind: type[OneCell], module: nn.Module, gates: Gates) -> list[Maths]:
    """What one step of ``module`` computes; several possibilities where that alone does not tell."""
    refused = gates.refusal()
    if refused is not None:
        raise ProbeError(refused)
    error: Exception | None = None
    for dtype in TOLERANCE:
        probe = probe_copy(module, dtype)
        if gates.norms:
            replace_norms(probe)
        size = gates.size or DEFAULT_SIZE
        states = [(gates.channels, gates.state_size(size))]
        frames, [(h, c)] = _random_input(next(probe.parameters()), gates.in_channels, size, states)
        if kind.from_zeros:
            h, c = torch.zeros_like(h), torch.zeros_like(c)
        try:
            with torch.no_grad():
                observed = kind.observe(probe, frames[0], h, c)
            if not isinstance(observed, Tensor) or observed.shape != h.shape:
                raise ValueError("it returns no state of the expected shape")
        except Exception as caught:  # foreign code: whatever it raises, it cannot be called this way
            error = caught
            continue
        found = identify(gates, named_tensors(probe), frames[0], h, c, observed.to(frames.dtype))
        return list(itertools.islice(found, 8 if kind.from_zeros else 1))
    assert error is not None
    raise ProbeError(f"it cannot be run as {kind.kind}: {first_line(error)}")


def _first_equal(
    kind: type[SwappedLayer],
    module: nn.Module,
    candidates: Sequence[list[list[CellPlan]]],
    size: tuple[int, int] | None,
) -> SwappedLayer | None:
    """The adapter of the first candidate that gives the results of ``module``; None if none does.

    In float64 where the module can, otherwise in float32.

    Raises:
        NotRecognisedError: it does so for small states in evaluation mode alone.
        ProbeError: ``module`` cannot be run this way.
    """
    error: Exception | None = None
    for dtype in TOLERANCE:
        error = None
        for plans in candidates:
            for variant in kind.variants:
                probe = probe_copy(module, dtype)
                adapter = kind.make(probe, plans, **variant)
                frame = size or DEFAULT_SIZE
                try:
                    if not _equal(probe, adapter, call_arguments(adapter, probe, frame)):
                        continue
                    if not _equal(probe, adapter, _large_arguments(adapter, probe, frame), gradients=False):
                        raise NotRecognisedError("its results differ where states are large: it may clip them", True)
                    if not _trains_alike(probe, adapter, call_arguments(adapter, probe, frame)[:1]):
                        raise NotRecognisedError(
                            "it computes something else in training mode (dropout, zoneout, ...)", True
                        )
                    return kind.make(module, plans, **variant)
                except ForeignError as caught:
                    error = caught
        if error is None:
            return None
    raise ProbeError(f"it cannot be run as {kind.kind}: {error}")


class ForeignError(RuntimeError):
    """The module to be replaced raised."""


def call_arguments(
    adapter: SwappedLayer, module: nn.Module, size: tuple[int, int], steps: int = STEPS, batch: int = BATCH
) -> list[Call]:
    """Calls of ``module``, and of ``adapter`` in its place, with random frames of ``size``."""
    return type(adapter).calls(module, *_input_of(adapter, module, size, steps, batch))


def _large_arguments(adapter: SwappedLayer, module: nn.Module, size: tuple[int, int]) -> list[Call]:
    """Calls with large states, and with one large frame at every step, from which a state of zeros grows large."""
    frames, states = _input_of(adapter, module, size, steps=10, batch=1)
    frames = 10 * frames[:1].expand_as(frames)
    return type(adapter).calls(module, frames, [(100 * h, 100 * c) for h, c in states])


def _input_of(
    adapter: SwappedLayer, module: nn.Module, size: tuple[int, int], steps: int, batch: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Random frames of ``size`` and states that fit ``adapter``, of the type of ``module``."""
    states, frame = [], size
    layers: list[Any] = list(adapter.layers)
    for layer in layers:
        frame = layer.convolution.state_size(frame)
        channels = layer.hidden_channels
        directions = 2 if getattr(layer, "bidirectional", False) else 1
        states += [(channels if isinstance(channels, int) else channels[0], frame)] * directions
    like = next(module.parameters())
    return _random_input(like, layers[0].in_channels, size, states, steps, batch)


def _random_input(
    like: Tensor,
    in_channels: int,
    size: tuple[int, int],
    states: Sequence[tuple[int, tuple[int, int]]],  # channels and size
    steps: int = STEPS,
    batch: int = BATCH,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Frames (T, B, Cin, H, W), and states (h, c) inside (-1, 1), of the type and on the device of ``like``."""
    frames = random_frames(steps, batch, in_channels, *size, like=like)
    hidden = []
    for k, (channels, state_size) in enumerate(states):
        shape = (batch, channels, *state_size)
        h, c = (0.8 * torch.tanh(random_frames(*shape, like=like, seed=2 + 2 * k + j)) for j in (0, 1))
        hidden.append((h, c))
    return frames, hidden


def _trains_alike(module: nn.Module, adapter: SwappedLayer, calls: Sequence[Call]) -> bool:
    """Whether both give the same in training mode, too, and ``module`` draws no random numbers only there: a few
    numbers may miss what is rare."""
    if isinstance(adapter, LstmLike) and adapter.dropout and len(adapter.layers) > 1:
        return True  # dropout that the adapter has, too
    before = _rng_state(module)
    if not _equal(module.train(), adapter.train(), calls):
        return False
    drawn = _rng_state(module)
    if drawn == before:
        return True
    return _equal(module.eval(), adapter.eval(), calls) and _rng_state(module) != drawn


def _rng_state(module: nn.Module) -> list[bytes]:
    """The states of the generators that ``module`` may draw from."""
    device = next(module.parameters()).device
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [state.numpy().tobytes() for state in states]


def _equal(module: nn.Module, adapter: nn.Module, calls: Sequence[Call], gradients: bool = True) -> bool:
    """Whether both give the same results and gradients, of the same types and shapes."""
    for call in calls:
        try:
            expected, expected_grads = run(module, call)
        except Exception as error:  # foreign code
            if call.optional:
                continue
            raise ForeignError(first_line(error)) from error
        try:
            actual, actual_grads = run(adapter, call)
        except (ValueError, TypeError):
            return False
        if not same_structure(expected, actual):
            return False
        if not gradients:
            expected_grads = actual_grads = []
        for pair in zip([*tensors_in(expected), *expected_grads], [*tensors_in(actual), *actual_grads], strict=True):
            if largest_error(*pair) > TOLERANCE[pair[0].dtype]:
                return False
    return True


def run(module: nn.Module, call: Call) -> tuple[Any, list[Tensor]]:
    """The results of a call, and the gradients of a weighted sum of them with respect to the arguments."""
    arguments = [map_tensors(_with_gradient, argument) for argument in call.args]
    with torch.enable_grad():
        results = module(*arguments)
        outputs = [tensor for tensor in tensors_in(results) if tensor.requires_grad]
        inputs = tensors_in(arguments)
        if not outputs or not inputs:
            return results, []
        weights = [random_frames(*output.shape, like=output, seed=100 + k) for k, output in enumerate(outputs)]
        grads = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return results, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]


def largest_error(expected: Tensor, actual: Tensor) -> float:
    """Largest difference in terms of the largest finite magnitude; as it is, if everything expected is zero.

    Infinite for a NaN on either side, and where one side alone is infinite.
    """
    if expected.numel() == 0:
        return 0.0
    expected, actual = expected.detach(), actual.detach()
    difference = torch.where(expected == actual, 0.0, (expected - actual).abs()).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )
    scale = float(expected.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    return float(difference.max()) / (scale or 1.0)


def _with_gradient(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.dtype.is_floating_point)
