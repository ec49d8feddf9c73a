"""The CPU in the place of the GPU, for the programs that measure: in this process, and in those that they start."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import gpu
import torch
from shapes import Shape

# What is the matter with FAULTY: "wrong", "unusable" (and every later call of CUDA fails), "dies", "hangs".
FAULT = "STAND_IN_FAULT"
FAULTY = ("conv_lstm2d inference bf16 small", "cpu, channels last")


class Event:
    """Every call takes a millisecond."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1.0


def nothing(*args: object) -> None:
    pass


def rate(*args: object) -> float:
    return 1e12


def faulty(function: Callable[[], Any]) -> Callable[[], object]:
    """What FAULTY runs as."""

    def unusable() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def run() -> object:
        fault = os.environ.get(FAULT)
        if fault == "dies":
            os._exit(1)
        if fault == "hangs":
            time.sleep(600)
        if fault == "unusable":
            torch.cuda.synchronize = unusable
            unusable()
        return function() * (1.5 if fault == "wrong" else 1)

    return run


def install(patch: Callable[[Any, str, object], None] = setattr) -> None:
    """The stand-in, and a plan of four small problems."""
    if patch is setattr:
        torch.set_num_threads(1)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        patch(torch.cuda, name, nothing)
    patch(torch.cuda, "is_available", lambda: True)
    patch(torch.cuda, "memory_allocated", lambda: 0)
    patch(torch.cuda, "max_memory_allocated", lambda: 2**20)
    patch(torch.cuda, "get_device_name", lambda: "Stand-in 1")
    patch(torch.cuda, "Event", Event)
    patch(torch.Tensor, "cuda", lambda tensor: tensor)
    patch(torch.nn.Module, "cuda", lambda module: module)
    for name in ("matmul_rate", "copy_bandwidth", "launch_cost"):
        patch(gpu, name, rate)
    patch(gpu, "graphed", lambda function: function)
    patch(gpu, "allow_everything", install)  # what a process that is started runs first
    patch(gpu, "BACKENDS", ("cpu",))
    patch(gpu, "PEERS", ("eager", "channels_last"))
    shape = Shape("small", 2, 3, 8, 16, 6, 6, 3)
    problems = [gpu.Problem(cell, shape, "bf16", training) for cell in gpu.CELLS for training in (True, False)]
    patch(gpu, "plan", lambda: problems)
    prepare = gpu.prepare

    def prepared(problem: gpu.Problem, name: str) -> Callable[[], object]:
        name = name.replace("cuda", "cpu")
        function = prepare(problem, name)
        return faulty(function) if (str(problem), name) == FAULTY else function

    patch(gpu, "prepare", prepared)
