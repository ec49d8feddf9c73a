"""How the CUDA extension is built: what decides it, and every kernel through nvcc where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "csrc" / "cuda"
FAKE_NVCC = """#!/bin/sh
echo compute_75; echo compute_80; echo compute_90; echo compute_100
"""


def setup_function(call: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Evaluates an expression over the functions of setup.py, in a process of its own."""
    script = (
        "import setuptools; setuptools.setup = lambda **_: None\n"
        "namespace = {'__file__': 'setup.py', '__name__': 'setup'}\n"
        f"exec(open('setup.py').read(), namespace)\nprint(eval({call!r}, namespace))"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("TORCH_CUDA_ARCH_LIST", "FUSED_CONVLSTM_CUDA")}
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True
    )


@pytest.fixture
def toolkit(tmp_path: Path) -> str:
    """A folder that looks like CUDA, with an nvcc that knows four architectures."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(FAKE_NVCC)
    nvcc.chmod(0o755)
    return str(tmp_path)


def test_found_nvcc_is_used(toolkit: str) -> None:
    result = setup_function("list(BUILDERS)", CUDA_HOME=toolkit)
    assert "fused_convlstm._cuda" in result.stdout
    assert f"CUDA kernels will be built by {toolkit}/bin/nvcc for sm_80 sm_90 sm_100 PTX 100; " in result.stderr


def test_forbidden(toolkit: str) -> None:
    result = setup_function("list(BUILDERS)", CUDA_HOME=toolkit, FUSED_CONVLSTM_CUDA="0")
    assert "fused_convlstm._cuda" not in result.stdout
    assert "left out (FUSED_CONVLSTM_CUDA=0)" in result.stderr


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="there is an nvcc in a place that is looked at")
def test_forced_without_nvcc(tmp_path: Path) -> None:
    environment = {"CUDA_HOME": str(tmp_path), "PATH": str(tmp_path), "FUSED_CONVLSTM_CUDA": "1"}
    result = setup_function("list(BUILDERS)", **environment)
    assert result.returncode != 0
    assert "FUSED_CONVLSTM_CUDA=1, but nvcc was not found" in result.stderr


def test_forced_without_a_gpu_to_build_for(toolkit: str) -> None:
    result = setup_function("1", CUDA_HOME=toolkit, FUSED_CONVLSTM_CUDA="1", TORCH_CUDA_ARCH_LIST="7.5")
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST names no GPU from 8.0 on" in result.stderr


@pytest.mark.parametrize(
    ("wanted", "names"),
    [("8.0", "sm_80"), ("7.5;9.0a+PTX", "sm_90a PTX 90a"), ("8.0 10.0+PTX", "sm_80 sm_100 PTX 100")],
)
def test_architecture_list(toolkit: str, wanted: str, names: str) -> None:
    result = setup_function("cuda_architectures(find_nvcc())[1]", CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST=wanted)
    assert result.stdout.strip() == names, result.stderr


@pytest.mark.parametrize(("wanted", "message"), [("Volta", "expected entries like"), ("12.0", "does not know '12.0'")])
def test_bad_architecture_list(toolkit: str, wanted: str, message: str) -> None:
    result = setup_function("1", CUDA_HOME=toolkit, TORCH_CUDA_ARCH_LIST=wanted)
    assert result.returncode != 0
    assert message in result.stderr


def test_the_package_imports_without_the_extension() -> None:
    script = (
        "import sys; sys.modules['fused_convlstm._cuda'] = None\n"
        "from fused_convlstm.backends import registry\n"
        "print(registry.get('cuda').unavailable())"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fused_convlstm._cuda is not built" in result.stdout


def nvcc() -> str | None:
    path = setup_function("find_nvcc()").stdout.strip()
    return path if path not in ("", "None") else None


# Registers a thread may use: what lets the blocks that are meant to share a multiprocessor run at once.
MOST_REGISTERS = {
    "conv_lstm_forward_step": 128,
    "conv_lstm_backward_step": 128,
    "conv_lstm_forward_sequence": 255,
    "conv_lstm_backward_sequence": 255,
    "pooled_gate_forward": 168,
    "pooled_gate_backward": 255,
}
KERNELS = {"conv_lstm_kernels": 6, "pooled_gate_kernels": 2}  # of a source, tiles counted


@pytest.mark.parametrize("math", ["MathHalf", "MathBfloat16", "MathTf32", "MathFloat"])
@pytest.mark.parametrize("source", sorted(SOURCES.glob("*_kernels.cu")), ids=lambda path: path.stem)
def test_nvcc_compiles_every_kernel(source: Path, math: str, tmp_path: Path) -> None:
    """For every architecture of the default list, without a warning or a spilled register."""
    compiler = nvcc()
    if compiler is None:
        pytest.skip("nvcc was not found")
    flags = setup_function("cuda_architectures(find_nvcc())[0]").stdout
    architectures = re.findall(r"'(-gencode[^']*)'", flags)
    command = [
        compiler, "-std=c++17", "-O3", "-Werror", "all-warnings", "-Xptxas", "-v", f"-DFCL_MATH={math}",
        *architectures, "-c", str(source), "-o", str(tmp_path / "kernels.o"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    used = [int(number) for number in re.findall(r"Used (\d+) registers", result.stderr)]
    assert len(used) >= KERNELS[source.stem] * len([a for a in architectures if "code=sm_" in a])
    limits = re.findall(r"Compiling entry function '\w*?(conv_lstm_\w+?|pooled_gate_\w+?)I", result.stderr)
    assert len(limits) == len(used)
    for kernel, registers in zip(limits, used, strict=True):
        # Without tensor cores half as many blocks share a multiprocessor.
        most = min(255, 2 * MOST_REGISTERS[kernel]) if math == "MathFloat" else MOST_REGISTERS[kernel]
        assert registers <= most, kernel
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(spills) >= len(used)
    assert all(numbers == ("0", "0", "0") for numbers in spills), result.stderr


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*_kernels.cu")), ids=lambda path: path.stem)
def test_reads_see_what_other_blocks_wrote(source: Path, tmp_path: Path) -> None:
    """Blocks exchange states within a launch. Of L1 a barrier's acquire gets rid, but not of what went through the
    read-only path; asynchronous copies pass L1 by, and nothing moves across the barriers that the compiler sees."""
    compiler = nvcc()
    if compiler is None:
        pytest.skip("nvcc was not found")
    ptx = tmp_path / "kernels.ptx"
    command = [
        compiler, "-std=c++17", "-O3", "-DFCL_MATH=MathFloat", "-gencode=arch=compute_90,code=compute_90", "-ptx",
        str(source), "-o", str(ptx),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    instructions = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*(?:\.[\w:]+)+)", ptx.read_text(), re.MULTILINE))
    reads = {name for name in instructions if name.startswith(("ld.", "ldu.", "cp.")) and "global" in name}
    assert any(name.startswith("ld.global") for name in reads)
    assert not {name for name in reads if name.startswith("ldu.") or ".nc" in name}
    assert {name for name in reads if name.startswith("cp.")} == {"cp.async.cg.shared.global"}
    assert {
        "barrier.cluster.arrive.release.aligned",
        "barrier.cluster.wait.acquire.aligned",
        "ld.acquire.gpu.global.u32",
    } <= instructions
