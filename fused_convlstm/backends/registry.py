"""Which backend serves a call: by name, or automatically with a reason for each one passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from .base import Backend
from .call import Call
from .settings import Settings

AUTO = "auto"
REFERENCE = "reference"
ENVIRONMENT_VARIABLE = "FUSED_CONVLSTM_BACKEND"

_TRANSFORMED = "torch.func.grad, vjp and jvp, and forward-mode derivatives: the reference serves them"

_backends: dict[str, Backend] = {}  # in order of preference; the reference is no kernel and not among them
_requested: Settings[str] = Settings()  # by use_backend
_recorders: list[_Recorder] = []


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call."""


@dataclass(frozen=True)
class Choice:
    """What :func:`choose` decided for one call."""

    call: Call
    backend: str
    requested: str
    passed_over: dict[str, str] = field(default_factory=dict)  # backend -> reason


@dataclass(eq=False)  # found again by identity, whatever it holds
class _Recorder:
    record: list[Choice | str] = field(default_factory=list)


def register(backend: Backend) -> None:
    _backends[backend.name] = backend


def get(name: str) -> Backend:
    return _backends[name]


def names() -> tuple[str, ...]:
    return (*_backends, REFERENCE)


def check_name(name: str, where: str) -> None:
    if name != AUTO and name not in names():
        choices = ", ".join(repr(n) for n in (AUTO, *names()))
        raise ValueError(f"{where}: unknown backend {name!r}; choose one of {choices}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls without a ``backend`` argument use this one. Holds for the whole process."""
    check_name(name, "use_backend")
    with _requested.set(name):
        yield


@contextmanager
def record_choices() -> Iterator[list[Choice | str]]:
    """Collects every choice made and every note taken within the block, by any thread."""
    recorder = _Recorder()
    _recorders.append(recorder)
    try:
        yield recorder.record
    finally:
        _recorders.remove(recorder)


def note(text: str) -> None:
    """Lets ``explain`` say what ran outside the operators."""
    for recorder in _recorders:
        recorder.record.append(text)


def requested_backend(argument: str | None) -> str:
    """The argument, else the innermost ``use_backend``, else the environment variable, else ``"auto"``."""
    if argument is not None:
        check_name(argument, "backend")
        return argument
    requested = _requested.current()
    if requested is not None:
        return requested
    name = os.environ.get(ENVIRONMENT_VARIABLE, AUTO)
    check_name(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    return name


def cannot_serve(backend: Backend, call: Call) -> str | None:
    return backend.unavailable() or (_TRANSFORMED if call.transformed else backend.refuse(call))


def choose(call: Call, argument: str | None) -> str:
    """The name of the backend for this call; raises BackendError if one asked for by name cannot serve it."""
    requested = requested_backend(argument)
    passed_over: dict[str, str] = {}
    chosen = REFERENCE
    if requested == AUTO:
        for name, backend in _backends.items():
            reason = cannot_serve(backend, call) or backend.decline(call)
            if reason is None:
                chosen = name
                break
            passed_over[name] = reason
    elif requested != REFERENCE:
        reason = cannot_serve(_backends[requested], call)
        if reason is not None:
            raise BackendError(f"backend {requested!r} cannot serve this {call.cell} call: {reason}")
        chosen = requested
    for recorder in _recorders:
        recorder.record.append(Choice(call, chosen, requested, passed_over))
    return chosen
