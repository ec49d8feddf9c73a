"""Replaces the ConvLSTMs of a model by fused layers that compute the same, and gives them back."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import Call, SwappedLayer
from .recognise import call_arguments, is_fused, largest_error, recognise, run
from .structure import convolution_count
from .values import map_tensors, same_structure, tensors_in

# Largest relative error that rounding may make between two orders of summation; anything more is a defect.
_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# They keep hold of the parameters of what they wrap.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")
_VERIFY_STEPS, _VERIFY_BATCH, _VERIFY_SIZE = 8, 2, (32, 32)


@dataclass(frozen=True)
class Replaced:
    """A module that was replaced, or in a dry run would be."""

    name: str  # in the model; empty for the model itself
    type: str  # class name
    how: str


@dataclass(frozen=True)
class Kept:
    """A module that looks like a ConvLSTM and was not replaced."""

    name: str
    type: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """Both forms of the model, run on the same input, in evaluation mode.

    Errors are the largest difference in a tensor relative to the largest magnitude in it.
    """

    input: str
    output_error: float
    gradient_error: float  # of the gradients with respect to the input
    forward_seconds: tuple[float, float]  # before, after
    training_seconds: tuple[float, float]  # forward and backward; before, after

    def __str__(self) -> str:
        lines = [
            f"verified on {self.input}: largest error {self.output_error:.1e} in the output, "
            f"{self.gradient_error:.1e} in the gradient of the input"
        ]
        for what, (before, after) in (("forward", self.forward_seconds), ("training step", self.training_seconds)):
            times = f"{1e3 * before:8.2f} ms before, {1e3 * after:8.2f} ms after"
            lines.append(f"  {what:13} {times}: {before / after:.2f} times as fast")
        return "\n".join(lines)


@dataclass(frozen=True)
class SwapReport:
    """What :func:`swap` did. ``model`` is the swapped model: the one given, unless that itself was replaced."""

    model: nn.Module
    replaced: list[Replaced] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    dry_run: bool = False
    verification: Verification | None = None

    def __str__(self) -> str:
        verb = "would replace" if self.dry_run else "replaced"
        lines = [f"{verb} {len(self.replaced)}, kept {len(self.kept)}"]
        lines += [f"  {verb} {one.name or '(model)'} ({one.type}): {one.how}" for one in self.replaced]
        lines += [f"  kept {one.name or '(model)'} ({one.type}): {one.reason}" for one in self.kept]
        return "\n".join(lines if self.verification is None else [*lines, str(self.verification)])


def swap(model: nn.Module, verify: bool = False, dry_run: bool = False, example_input: Any = None) -> SwapReport:
    """Replaces every ConvLSTM in ``model`` that computes what a fused layer computes, in place.

    ConvLSTMs are recognised by the shapes and names of their parameters and by running copies of them on random input:
    a module is replaced only if the fused layer then gives its results and its gradients. The replacement is called as
    the replaced module was, returns what that returned, and starts from its weights. Parameters are new objects, so
    make the optimiser afterwards; a state dict from before the swap can be loaded.

    Args:
        model: any module; may be a ConvLSTM itself, then take ``report.model``.
        verify: run the model before and after, and report the largest error and the times. Without ``example_input``
            each replaced module is run on random frames.
        dry_run: only report.
        example_input: for ``verify``: the model's input, or a tuple of its arguments.

    Returns:
        a report that can be printed.

    Raises:
        ValueError: ``model`` is no module, or in DistributedDataParallel or FSDP already; ``verify`` or
            ``example_input`` are given where nothing is to be verified; the results on ``example_input`` hold no
            floating-point tensors.
        RuntimeError: ``verify`` found a difference beyond rounding.

    The model is as it was after any error, also one that it raises itself on ``example_input``.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a Module, got {type(model).__name__}")
    if verify and dry_run:
        raise ValueError("verify: expected False with dry_run=True, which replaces nothing")
    if example_input is not None and not verify:
        raise ValueError("example_input: expected None without verify=True, which is what it is for")
    for module in model.modules():
        if type(module).__name__ in _WRAPPERS:
            raise ValueError(
                f"model: expected one that is not in {type(module).__name__} yet, which would go on working with the "
                "parameters of before"
            )
    adapters: dict[nn.Module, SwappedLayer] = {}
    replaced: list[Replaced] = []
    kept: list[Kept] = []
    # Parameters made in inference mode could never be trained.
    with _one_thread(), _rng_kept(model), torch.inference_mode(False):
        _walk(model, "", _owners(model), adapters, replaced, kept)
    if dry_run:
        return SwapReport(model, replaced, kept, dry_run=True)
    swapped = _exchange(model, adapters)
    verification = None
    if verify and adapters:
        verification = _verify(swapped, adapters, example_input)
    return SwapReport(swapped, replaced, kept, verification=verification)


def unswap(model: nn.Module) -> nn.Module:
    """Puts the modules that :func:`swap` replaced back, with the present weights in their own layout, in place.

    Biases that only ever added up have become one: the first comes back with the sum, the others with zero.

    Returns:
        ``model``, or, if that is a replaced module itself, the one that it replaced.

    Raises:
        ValueError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a Module, got {type(model).__name__}")
    originals: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, SwappedLayer):
            originals[module] = module.restore()
    return _exchange(model, originals)


def _walk(
    module: nn.Module,
    name: str,
    owners: dict[int, set[nn.Module]],
    adapters: dict[nn.Module, SwappedLayer],
    replaced: list[Replaced],
    kept: list[Kept],
) -> None:
    if module in adapters:  # a module in several places is replaced in all of them
        return
    found = recognise(module)
    if isinstance(found, SwappedLayer):
        reason = found.frozen_in_part() or _obstacle(module, name, owners)
        if reason is None:
            adapters[module] = found
            replaced.append(Replaced(name, type(module).__name__, found.describe()))
            return
        found = reason
    if found is not None:
        kept.append(Kept(name, type(module).__name__, found))
    if isinstance(module, SwappedLayer):
        return
    known = len(replaced) + len(kept)
    for child_name, child in module.named_children():
        _walk(child, f"{name}.{child_name}" if name else child_name, owners, adapters, replaced, kept)
    if known == len(replaced) + len(kept) and found is None and _is_called_a_conv_lstm(module):
        kept.append(Kept(name, type(module).__name__, "its convolutions are in no arrangement that is known here"))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors of a probe are so small that threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _rng_kept(model: nn.Module) -> Iterator[None]:
    """Random numbers that foreign code draws are not taken from those of the caller."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        yield


def _owners(model: nn.Module) -> dict[int, set[nn.Module]]:
    """The modules that have a parameter, by the parameter's id."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    return owners


def _is_called_a_conv_lstm(module: nn.Module) -> bool:
    """Whether a module with convolutions has such a name, so that its user expects to read of it."""
    name = type(module).__name__.lower().replace("_", "")
    return re.search(r"conv(\dd)?lstm", name) is not None and not is_fused(module) and convolution_count(module) > 0


def _obstacle(module: nn.Module, name: str, owners: dict[int, set[nn.Module]]) -> str | None:
    """Why ``module`` must stay although a fused layer computes the same."""
    if name.rpartition(".")[2] == "_orig_mod":
        return "torch.compile has compiled it by itself: swap first, then compile"
    inside = set(module.modules())
    for child in inside:
        if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
            return "it has hooks, which a fused layer would not call"
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"its parameter {name} has hooks, which that of a fused layer would not call"
        if not owners[id(parameter)] <= inside:
            return f"its parameter {name} is shared with another module"
    return None


def _exchange(model: nn.Module, exchange: dict[Any, Any]) -> nn.Module:
    """Puts the values of ``exchange`` where its keys are, in place; returns the model."""
    if model in exchange:
        result: nn.Module = exchange[model]
        return result
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in exchange:
                module._modules[name] = exchange[child]
    return model


# --- verification ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """Results, gradients and times of a few modules, one after the other."""

    results: list[Any]
    gradients: list[Tensor]
    forward_seconds: float
    training_seconds: float


def _verify(swapped: nn.Module, adapters: dict[nn.Module, SwappedLayer], example_input: Any) -> Verification:
    """Runs both forms. Puts the replaced modules back if that raises, or the results differ beyond rounding."""
    originals: dict[nn.Module, nn.Module] = {adapter: module for module, adapter in adapters.items()}
    try:
        with _evaluation([swapped, *adapters]), _rng_kept(swapped):
            if example_input is None:
                jobs = []
                for module, adapter in adapters.items():
                    size = adapter.frame_size() or _VERIFY_SIZE
                    calls = call_arguments(adapter, module, size, _VERIFY_STEPS, _VERIFY_BATCH)
                    jobs.append((module, adapter, calls[0]))
                before = _measure([(module, call) for module, _, call in jobs])
                after = _measure([(adapter, call) for _, adapter, call in jobs])
                shapes = dict.fromkeys(str(tuple(tensors_in(call.args)[0].shape)) for _, _, call in jobs)
                text = f"random frames {', '.join(shapes)}"
            else:
                call = Call(example_input if isinstance(example_input, tuple) else (example_input,))
                model = _exchange(swapped, originals)
                before = _measure([(model, call)])
                swapped = _exchange(model, adapters)
                after = _measure([(swapped, call)])
                text = "the example input"
        return _compare(text, before, after)
    except BaseException:
        _exchange(swapped, originals)
        raise


def _compare(text: str, before: _Measured, after: _Measured) -> Verification:
    """Raises RuntimeError if results or gradients differ beyond rounding. ``text`` says what they are results of."""
    if not same_structure(before.results, after.results):
        raise RuntimeError("swap: the results differ in type or shape; the model is as it was")
    outputs = list(zip(tensors_in(before.results), tensors_in(after.results), strict=True))
    if not outputs:
        raise ValueError("example_input: expected one for which the model returns floating-point tensors")
    gradients = list(zip(before.gradients, after.gradients, strict=True))
    verification = Verification(
        text,
        max(largest_error(*pair) for pair in outputs),
        max((largest_error(*pair) for pair in gradients), default=0.0),
        (before.forward_seconds, after.forward_seconds),
        (before.training_seconds, after.training_seconds),
    )
    limit = max(_LIMIT[x.dtype] for x, _ in outputs)
    if not max(verification.output_error, verification.gradient_error) <= limit:
        raise RuntimeError(f"swap: the results differ by more than {limit:g}, the model is as it was; {verification}")
    return verification


@contextmanager
def _evaluation(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for module, _ in modes:
        module.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _state_kept(root: nn.Module) -> Iterator[None]:
    """What ``root`` keeps in attributes and buffers from one call to the next has no history, and is put back."""
    members = ("_parameters", "_buffers", "_modules")
    places = [place for module in root.modules() for place in (vars(module), module._buffers)]
    saved = [dict(place) for place in places]
    for place in places:
        place |= {k: map_tensors(_without_history, value) for k, value in place.items() if k not in members}
    try:
        yield
    finally:
        for place, before in zip(places, saved, strict=True):
            place.clear()
            place |= before


def _without_history(x: Tensor) -> Tensor:
    return x if x.is_leaf else x.detach()


def _measure(jobs: Sequence[tuple[nn.Module, Call]]) -> _Measured:
    results, gradients, forward, training = [], [], 0.0, 0.0
    for module, call in jobs:
        with _state_kept(module):
            one, grads = run(module, call)
        results.append(one)
        gradients += grads
        forward += _seconds(_forward, module, call)
        training += _seconds(_train, module, call)
    return _Measured(results, gradients, forward, training)


@torch.no_grad()
def _forward(module: nn.Module, call: Call) -> None:
    module(*call.args)


def _train(module: nn.Module, call: Call) -> None:
    outputs = [tensor for tensor in tensors_in(module(*call.args)) if tensor.requires_grad]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if outputs and parameters:
        torch.autograd.grad(outputs, parameters, [torch.ones_like(x) for x in outputs], allow_unused=True)


def _seconds(
    function: Callable[[nn.Module, Call], None], module: nn.Module, call: Call, runs: int = 5, budget: float = 3.0
) -> float:
    """Median time of ``function``."""
    times: list[float] = []
    while len(times) < runs and (not times or sum(times) < budget):
        with _state_kept(module):
            _synchronize()
            start = time.perf_counter()
            function(module, call)
            _synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
