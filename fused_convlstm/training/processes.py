"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; ``device`` is its own."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str | None = None) -> Processes:
        """Takes part in the process group that torchrun's environment variables describe, if there are any.

        Args:
            device: "cuda" is the GPU of this process's number on its machine; None: that, if there is one, else "cpu".

        Raises:
            ValueError: there is no such device.
        """
        rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            here = torch.device(device)
            if here.type == "cuda" and here.index is None:
                here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.empty(0, device=here)
        except (RuntimeError, AssertionError) as error:  # PyTorch's without CUDA, with less GPUs, of an unknown name
            raise ValueError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if here.type == "cuda":
            torch.cuda.set_device(here)
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
        return cls(rank, count, here)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: list[Any]) -> list[Any]:
        """This process's part of ``items``."""
        return items[self.rank :: self.count]

    def sum(self, number: int | bool) -> int:
        """The sum over all processes."""
        if self.count == 1:
            return int(number)
        total = torch.tensor(int(number), device=self.device)
        dist.all_reduce(total)
        return int(total)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the values of the first."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def leave(self) -> None:
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()
