"""The interface of a backend: one forward and one backward per cell, over a whole sequence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .call import Call, ConvLSTMOptions


class Backend(ABC):
    """Kernels for whole sequences.

    Inputs may have any strides. Outputs have the memory layout that :mod:`fused_convlstm.ops.layout` derives from the
    input, gradients that of ``ops._sequence.empty_gradient``. ``gates``, ``cells`` and ``candidate`` are read by the
    same backend's backward alone, so only their shapes and types are fixed, not the meaning of their elements.
    """

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run on this machine at all; None if it can."""
        return None

    @abstractmethod
    def refuse(self, call: Call) -> str | None:
        """The property of ``call`` that this backend cannot serve; None if it can."""

    def decline(self, call: Call) -> str | None:
        """Why another backend is the better choice for ``call``, by measurement; None if this one is.

        Only the automatic choice asks."""
        return None

    def info(self) -> dict[str, str]:
        """Facts for ``python -m fused_convlstm info``."""
        return {}

    @abstractmethod
    def conv_lstm2d(
        self,
        input: Tensor,  # (T, B, Cin, H, W)
        h_0: Tensor | None,  # (B, C, Ho, Wo); None: zeros
        c_0: Tensor | None,  # (B, C, Ho, Wo), state_dtype; None: zeros
        weight_ih: Tensor,  # (4 * C, Cin / groups, kh, kw)
        weight_hh: Tensor,  # (4 * C, C / groups, rh, rw)
        bias: Tensor | None,  # (4 * C,)
        peephole: Tensor | None,  # (3, C) or (3, C, Ho, Wo)
        step_flags: Tensor | None,  # (T, B) uint8
        options: ConvLSTMOptions,
        save: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns output (T, B, C, Ho, Wo), h_n, c_n (B, C, Ho, Wo),
        gates (T, B, Ho, Wo, 4 * C) if ``save`` is SAVE_GATES else (0,),
        cells (T, B, Ho, Wo, C) in kept_cells_dtype unless ``save`` is SAVE_NOTHING, then (0,); the state itself goes
        from step to step in state_dtype."""

    @abstractmethod
    def conv_lstm2d_backward(
        self,
        grad_output: Tensor | None,  # (T, B, C, Ho, Wo)
        grad_h_n: Tensor | None,  # (B, C, Ho, Wo)
        grad_c_n: Tensor | None,  # (B, C, Ho, Wo)
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias: Tensor | None,
        peephole: Tensor | None,
        step_flags: Tensor | None,
        output: Tensor,  # what the forward returned
        gates: Tensor,
        cells: Tensor,
        options: ConvLSTMOptions,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of (input, h_0, c_0, weight_ih, weight_hh, bias, peephole); where ``needs`` is False
        or the tensor is absent, None. None of the arguments may be written to (``retain_graph``)."""

    @abstractmethod
    def pooled_gate_conv_lstm2d(
        self,
        input: Tensor,  # (T, B, Cin, H, W)
        h_0: Tensor | None,  # (B, C, Ho, Wo); None: zeros
        c_0: Tensor | None,  # (B, C, Ho, Wo), state_dtype; None: zeros
        gate_weight_ih: Tensor,  # (3 * C, Cin)
        gate_weight_hh: Tensor,  # (3 * C, C)
        gate_bias: Tensor | None,  # (3 * C,)
        depthwise_ih: Tensor,  # (Cin, 1, kh, kw)
        depthwise_hh: Tensor,  # (C, 1, rh, rw)
        pointwise_ih: Tensor,  # (C, Cin)
        pointwise_hh: Tensor,  # (C, C)
        bias: Tensor | None,  # (C,)
        step_flags: Tensor | None,  # (T, B) uint8
        options: ConvLSTMOptions,
        save: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns output (T, B, C, Ho, Wo), h_n, c_n (B, C, Ho, Wo),
        gates (T, B, 3 * C) in state_dtype unless ``save`` is SAVE_NOTHING, then (0,),
        candidate (T, B, Ho, Wo, C) if ``save`` is SAVE_GATES else (0,),
        cells (T, B, Ho, Wo, C) in the type of the input unless ``save`` is SAVE_NOTHING, then (0,); the state itself
        goes from step to step in state_dtype."""

    @abstractmethod
    def pooled_gate_conv_lstm2d_backward(
        self,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        input: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        gate_weight_ih: Tensor,
        gate_weight_hh: Tensor,
        gate_bias: Tensor | None,
        depthwise_ih: Tensor,
        depthwise_hh: Tensor,
        pointwise_ih: Tensor,
        pointwise_hh: Tensor,
        bias: Tensor | None,
        step_flags: Tensor | None,
        output: Tensor,  # what the forward returned
        gates: Tensor,
        candidate: Tensor,
        cells: Tensor,
        options: ConvLSTMOptions,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Gradients of (input, h_0, c_0, gate_weight_ih, gate_weight_hh, gate_bias, depthwise_ih,
        depthwise_hh, pointwise_ih, pointwise_hh, bias); where ``needs`` is False or the tensor is absent, None."""


class AbsentBackend(Backend):
    """Stands for kernels that cannot be imported here: known by name, never run."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason

    def unavailable(self) -> str | None:
        return self.reason

    def refuse(self, call: Call) -> str | None:
        return self.reason

    def _run(self, *args: Any) -> Any:
        raise RuntimeError(f"backend {self.name!r}: {self.reason}")

    conv_lstm2d = conv_lstm2d_backward = _run  # type: ignore[assignment]
    pooled_gate_conv_lstm2d = pooled_gate_conv_lstm2d_backward = _run  # type: ignore[assignment]
