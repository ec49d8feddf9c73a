"""The source distribution is complete, and a missing compiler is explained."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

from fused_convlstm import _cpu
from fused_convlstm.backends.sources import check_sources, digest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fused_convlstm", "csrc", "tests", "benchmarks", "docs")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree without anything built."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.o", ".*")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


def test_sdist_is_complete(source: Path) -> None:
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", "dist"]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {
        str(path.relative_to(source))
        for folder in FOLDERS
        for path in (source / folder).rglob("*")
        if path.is_file() and "dist" not in path.parts
    } | {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py", "Makefile"}
    assert not wanted - packed


def test_without_a_compiler_the_error_says_what_to_install(source: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    environment = {**os.environ, "CXX": "/nowhere/g++"}
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "'/nowhere/g++' was not found or does not work" in result.stderr
    assert "apt install g++" in result.stderr


def test_without_the_compiled_kernels_the_import_warns(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['fused_convlstm._cpu'] = None\n"
        "import torch; from fused_convlstm import ConvLSTM2d, explain\n"
        "print(explain(ConvLSTM2d(1, 1, 3), torch.ones(1, 1, 1, 2, 2)))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "RuntimeWarning: fused_convlstm: on the CPU everything will run on the slow reference" in result.stderr
    assert "fused_convlstm._cpu is not usable" in result.stdout


def test_a_module_older_than_its_sources_is_refused(tmp_path: Path) -> None:
    sources = tmp_path / "csrc" / "cpu"
    sources.mkdir(parents=True)
    (sources / "kernel.cpp").write_text("int one = 1;\n")
    (tmp_path / "setup.py").touch()
    module = ModuleType("fused_convlstm._cpu")
    module.SOURCES = digest(sources)  # type: ignore[attr-defined]
    check_sources(module, "cpu", tmp_path)
    (sources / "kernel.cpp").write_text("int two = 2;\n")
    with pytest.raises(ImportError, match=r"built from other sources than .*csrc.cpu holds; build it again"):
        check_sources(module, "cpu", tmp_path)
    del module.SOURCES  # as in modules built before there was a hash
    with pytest.raises(ImportError, match="build it again"):
        check_sources(module, "cpu", tmp_path)
    (tmp_path / "setup.py").unlink()  # a folder that happens to lie beside the installed package
    check_sources(module, "cpu", tmp_path)


def test_the_compiled_module_carries_the_hash_of_its_sources() -> None:
    assert digest(ROOT / "csrc" / "cpu") == _cpu.SOURCES


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("sys.modules['triton'] = None", "Triton is not installed"),
        ("import triton; triton.__version__ = '3.2.0'", "Triton 3.2.0 is installed, at least"),
    ],
)
def test_without_a_triton_that_serves(setting: str, reason: str, tmp_path: Path) -> None:
    if setting.startswith("import"):
        pytest.importorskip("triton")
    script = (
        f"import sys; {setting}\n"
        "import torch; from fused_convlstm import ConvLSTM2d, explain\n"
        "layer, frames = ConvLSTM2d(1, 1, 3), torch.ones(1, 1, 1, 2, 2)\n"
        "print(explain(layer, frames)); layer.backend = 'triton'; layer(frames)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert f"triton: {reason}" in result.stdout
    assert "BackendError: backend 'triton' cannot serve this conv_lstm2d call" in result.stderr
