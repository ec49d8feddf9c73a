"""The export example in each of its formats, and what stands in the files."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

import fused_convlstm

_spec = importlib.util.spec_from_file_location("export_example", Path(__file__).parents[1] / "examples" / "export.py")
example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


def test_program(tmp_path: Path) -> None:
    assert example.main(["program", str(tmp_path / "model.pt2")]) < 1e-6
    program = torch.export.load(tmp_path / "model.pt2")
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("fused_convlstm" in name for name in operators), operators


def test_program_with_fused_operators(tmp_path: Path) -> None:
    """The fused operator stays one operator, whatever the number of steps."""
    if fused_convlstm.backends.registry.get("cpu").unavailable():
        pytest.skip("the CPU extension is not built")
    torch.manual_seed(0)
    model = example.Classifier().eval()
    with torch.no_grad():
        loaded = example.export_program(model, tmp_path / "model.pt2", backend="cpu")
        frames = example.example(3)
        torch.testing.assert_close(loaded(frames), model(frames))
    program = torch.export.load(tmp_path / "model.pt2")
    operators = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum(name.startswith("fused_convlstm.conv_lstm2d") for name in operators) == 1


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert example.main(["onnx", str(tmp_path / "model.onnx")]) < 1e-6
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} == {""}  # standard operators
    assert not model.functions
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # any batch size


def test_aot_inductor(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    assert example.main(["aotinductor", str(tmp_path / "model.pt2")]) < 1e-6


def test_states_of_a_stack_under_a_free_batch_size() -> None:
    """Shapes are compared, not hashed: a symbolic size cannot be."""
    lstm = fused_convlstm.ConvLSTM2d(2, 3, 3, num_layers=2, backend="reference")
    dynamic = {"input": {1: torch.export.Dim("batch", min=1, max=16)}}
    program = torch.export.export(lstm, (torch.randn(2, 3, 2, 4, 4),), dynamic_shapes=dynamic)
    x = torch.randn(2, 5, 2, 4, 4)
    torch.testing.assert_close(program.module()(x)[1][0], lstm(x)[1][0])
