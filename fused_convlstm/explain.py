"""Which backend runs a call, and why each other one does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .backends import registry
from .backends.call import Call
from .backends.registry import Choice


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found: one :class:`Choice` for every layer and direction that ran, in order."""

    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()  # what ran outside the operators, each said once

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that ran, in order."""
        return tuple(choice.backend for choice in self.choices)

    def __str__(self) -> str:
        if not self.choices and not self.notes:
            return "no fused_convlstm layer ran"
        lines, first = [], 0
        # A layer that goes step by step makes the same call many times.
        for choice, same in itertools.groupby(self.choices):
            last = first + len(list(same)) - 1
            lines.append(_describe(f"call {first}" if first == last else f"calls {first} to {last}", choice))
            first = last + 1
        return "\n".join([*lines, *self.notes])


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Runs ``function(*args, **kwargs)`` once and tells which backend served each fused layer in it.

    Args:
        function: a module, of this package or with such modules in it, or any function that calls them.

    Returns:
        An :class:`Explanation`; printed, it names for every call the backend that ran and the reason for each other.
    """
    with registry.record_choices() as record:
        function(*args, **kwargs)
    choices = tuple(entry for entry in record if isinstance(entry, Choice))
    return Explanation(choices, tuple(dict.fromkeys(entry for entry in record if isinstance(entry, str))))


def why_not(name: str, choice: Choice) -> str:
    """Why backend ``name`` did not serve the call of ``choice``."""
    if name in choice.passed_over:
        return choice.passed_over[name]
    reason = None if name == registry.REFERENCE else registry.cannot_serve(registry.get(name), choice.call)
    if reason is not None:
        return reason
    return f"could serve it, but {choice.backend!r} " + (
        "was asked for" if choice.requested != registry.AUTO else "comes first"
    )


def describe_call(call: Call) -> str:
    """The properties of a call in one line."""
    size, state = call.input_size, call.state_size
    kernel = f"{call.kernel_size[0]}x{call.kernel_size[1]}"
    if call.recurrent_kernel_size != call.kernel_size:
        kernel += f" and {call.recurrent_kernel_size[0]}x{call.recurrent_kernel_size[1]}"
    text = (
        f"{call.cell}, {str(call.dtype).removeprefix('torch.')} on {call.device}, {call.steps} steps, "
        f"batch {call.batch}, {call.in_channels} -> {call.hidden_channels} channels, {size[0]}x{size[1]}"
    )
    text += "" if size == state else f" -> {state[0]}x{state[1]}"
    text += f", kernel {kernel}, " + {"nothing": "inference", "cells": "training, gates recomputed"}.get(
        call.save, "training"
    )
    return text


def _describe(which: str, choice: Choice) -> str:
    how = "chosen automatically" if choice.requested == registry.AUTO else "asked for"
    lines = [f"{which}: {describe_call(choice.call)}", f"  {choice.backend}: ran ({how})"]
    others = (name for name in registry.names() if name != choice.backend)
    return "\n".join([*lines, *(f"  {name}: {why_not(name, choice)}" for name in others)])
