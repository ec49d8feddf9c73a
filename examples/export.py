"""Takes a trained model out of Python: torch.export, ONNX, AOTInductor.

    python examples/export.py program model.pt2
    python examples/export.py onnx model.onnx          # pip install fused-convlstm[onnx]
    python examples/export.py aotinductor model.pt2    # needs a C++ compiler

Each writes a file, loads it again and compares it with the model on another batch size.

With the reference backend a layer is traced into standard operators, so the file needs nothing of this package. An
exported program may also keep the fused operators (``backend="auto"``): then it is as fast as the model, and whoever
loads it imports fused_convlstm first. The number of steps is fixed, as the graph is unrolled over them, unless the
fused operators are kept; the batch size is free.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fused_convlstm

STEPS, SIZE = 4, (16, 16)


class Classifier(nn.Module):
    """A small video classifier: (B, T, 3, H, W) to (B, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = fused_convlstm.ConvLSTM2d(3, 8, kernel_size=3, stride=2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, frames: Tensor) -> Tensor:
        _, (h_n, _) = self.lstm(frames)
        return self.head(h_n[-1].mean(dim=(2, 3)))


def example(batch: int) -> Tensor:
    return torch.randn(batch, STEPS, 3, *SIZE)


def dynamic_batch() -> dict[str, dict[int, object]]:
    return {"frames": {0: torch.export.Dim("batch", min=1, max=1024)}}


def export_program(model: nn.Module, path: Path, backend: str = "reference") -> Callable[[Tensor], Tensor]:
    """Writes an ExportedProgram; returns what the file computes."""
    with fused_convlstm.use_backend(backend):
        program = torch.export.export(model, (example(2),), dynamic_shapes=dynamic_batch())
    torch.export.save(program, path)
    return torch.export.load(path).module()


def export_onnx(model: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    """Writes a graph of standard ONNX operators; returns what onnxruntime computes with the file."""
    import onnxruntime

    with fused_convlstm.use_backend("reference"):
        program = torch.onnx.export(
            model, (example(2),), dynamo=True, dynamic_shapes=dynamic_batch(), input_names=["frames"], verbose=False
        )
    program.save(path)
    session = onnxruntime.InferenceSession(path)
    return lambda frames: torch.from_numpy(session.run(None, {"frames": frames.numpy()})[0])


def export_aot_inductor(model: nn.Module, path: Path) -> Callable[[Tensor], Tensor]:
    """Compiles to a package that runs without Python (libtorch's AOTIModelPackageLoader); returns what it computes."""
    with fused_convlstm.use_backend("reference"):
        program = torch.export.export(model, (example(2),), dynamic_shapes=dynamic_batch())
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


EXPORTS = {"program": export_program, "onnx": export_onnx, "aotinductor": export_aot_inductor}


def main(arguments: list[str] | None = None) -> float:
    """Returns the largest difference between the model and the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=EXPORTS)
    parser.add_argument("path", type=Path)
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Classifier().eval()
    with torch.no_grad():
        loaded = EXPORTS[chosen.format](model, chosen.path)
        frames = example(5)
        error = float((loaded(frames) - model(frames)).abs().max())
    print(f"{chosen.path}: {chosen.path.stat().st_size / 1e3:.0f} kB, largest difference {error:.1e}")
    return error


if __name__ == "__main__":
    main()
