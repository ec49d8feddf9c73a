"""Builds the compiled parts. Everything else about the package is in pyproject.toml.

Environment variables:

* ``FUSED_CONVLSTM_SANITIZE``: for instance ``address,undefined``; builds a slow variant that checks itself.
* ``FUSED_CONVLSTM_INSTRUCTION_SETS``: which of avx2, avx512 and avx512_bf16 the CPU kernels are compiled for, besides
  the portable code, separated by commas; all that the compiler knows by default.
* ``MAX_JOBS``: how many compilers run at once; the number of cores by default.
* ``FUSED_CONVLSTM_CUDA``: ``1`` demands the CUDA kernels, ``0`` leaves them out; else they are built if nvcc is found.
* ``TORCH_CUDA_ARCH_LIST``: for which GPUs, in PyTorch's notation, for instance ``8.0 9.0+PTX``.
* ``CUDA_HOME``: where to look for nvcc first.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CPU_SOURCES = ROOT / "csrc" / "cpu"
CUDA_SOURCES = ROOT / "csrc" / "cuda"

# The package itself cannot be imported here: it needs PyTorch, building does not.
digest = runpy.run_path(str(ROOT / "fused_convlstm" / "backends" / "sources.py"))["digest"]

NO_COMPILER = (
    "fused_convlstm: the C++ compiler {compiler!r} was not found or does not work. Install one with OpenMP: "
    "'apt install g++' on Debian and Ubuntu, 'dnf install gcc-c++' on Fedora and RHEL, 'conda install gxx' in a conda "
    "environment; or name one in the environment variable CXX.\n{details}"
)

AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# Every csrc/cpu/*_kernels.cpp is compiled once for each of these, in a namespace of that name; see csrc/cpu/isa.h.
X86_INSTRUCTION_SETS = {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}


def compiler() -> list[str]:
    """The C++ compiler as the beginning of a command line."""
    return (os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "c++").split()


def common_flags() -> list[str]:
    # No -ffast-math, and no contraction: a fused multiply-add stands in the source where one is meant, so that a sum
    # does not depend on how a loop was unrolled.
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fopenmp", "-Wall",
             "-Wextra", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # fmt: skip
    sanitizers = os.environ.get("FUSED_CONVLSTM_SANITIZE")
    if sanitizers:
        return [
            *flags,
            "-O1",
            "-g1",
            f"-fsanitize={sanitizers}",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
        ]
    return [*flags, "-O3", "-DNDEBUG"]


def run(command: list[str], capture: bool = False) -> None:
    try:
        subprocess.run(command, check=True, capture_output=capture, text=True)
    except OSError as error:
        raise CompileError(NO_COMPILER.format(compiler=command[0], details=error)) from error
    except subprocess.CalledProcessError as error:
        raise CompileError(f"command failed: {' '.join(command)}\n{error.stderr or ''}") from error


def compiles(flags: list[str], build: Path) -> bool:
    """Whether the compiler works with these flags."""
    probe = build / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    try:
        run([*compiler(), *flags, "-c", str(probe), "-o", str(probe.with_suffix(".o"))], capture=True)
    except CompileError:
        return False
    return True


def check_compiler(build: Path) -> None:
    """Raises with advice if there is no working C++ compiler."""
    probe = build / "probe.cpp"
    probe.write_text("#include <omp.h>\n#include <vector>\nint main() { return omp_get_max_threads() < 1; }\n")
    try:
        run([*compiler(), "-std=c++17", "-fopenmp", str(probe), "-o", str(build / "probe")], capture=True)
    except CompileError as error:
        raise CompileError(NO_COMPILER.format(compiler=" ".join(compiler()), details=error)) from error


def build_cpu(target: Path, build: Path) -> None:
    """Compiles ``fused_convlstm._cpu`` to ``target``: one object a source and instruction set, all in parallel."""
    check_compiler(build)
    sets: dict[str, list[str]] = {"portable": []}
    if platform.machine() in ("x86_64", "AMD64"):
        wanted = os.environ.get("FUSED_CONVLSTM_INSTRUCTION_SETS")
        names = X86_INSTRUCTION_SETS if wanted is None else [name for name in wanted.split(",") if name]
        sets |= {name: X86_INSTRUCTION_SETS[name] for name in names if compiles(X86_INSTRUCTION_SETS[name], build)}
    build = build / "-".join(sets)  # the dispatcher's object knows which sets there are
    build.mkdir(exist_ok=True)
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}", f"-I{CPU_SOURCES}"]
    defines = [f'-DFC_SOURCES="{digest(CPU_SOURCES)}"', *(f"-DFC_HAVE_{name.upper()}=1" for name in sets)]
    newest_header = max(path.stat().st_mtime for path in (*CPU_SOURCES.glob("*.h"), Path(__file__)))

    objects: list[Path] = []
    commands: list[list[str]] = []
    # Kernels first: they take longest.
    for source in sorted(CPU_SOURCES.glob("*.cpp"), key=lambda path: (not path.stem.endswith("_kernels"), path.name)):
        variants = sets if source.stem.endswith("_kernels") else {"": []}
        for name, flags in variants.items():
            target_object = build / f"{source.stem}{'.' + name if name else ''}.o"
            objects.append(target_object)
            reusable = target_object.exists() and source.stem != "module"  # which holds the hash of all sources
            if reusable and target_object.stat().st_mtime > max(source.stat().st_mtime, newest_header):
                continue
            isa = [f"-DFC_ISA={name}", f"-DFC_ISA_{name.upper()}=1"] if name else []
            command = [*compiler(), *common_flags(), *includes, *defines, *isa, *flags, "-c", str(source)]
            commands.append([*command, "-o", str(target_object)])
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(run, commands))
    # libgomp stays outside: with torch imported first, its copy is the one in the process.
    exports = f"-Wl,--version-script={CPU_SOURCES.parent / 'exports.map'}"
    run([*compiler(), *common_flags(), "-shared", exports, *map(str, objects), "-o", str(target)])


# Number formats of csrc/cuda/math.cuh: each kernel source is compiled once for each.
CUDA_MATHS = ("MathHalf", "MathBfloat16", "MathTf32", "MathFloat")
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # by default, as far as nvcc knows them
MINIMUM_CUDA_ARCHITECTURE = 80


def find_nvcc() -> str | None:
    """The CUDA compiler, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc", path=f"{home}/bin") for home in homes[:2] if home]
    candidates += [shutil.which("nvcc"), shutil.which("nvcc", path=f"{homes[2]}/bin")]
    return next((candidate for candidate in candidates if candidate), None)


def cuda_architectures(nvcc: str) -> tuple[list[str], str]:
    """nvcc's flags for the GPUs to compile for, and the same in words."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", listed)}
    binaries: list[str] = []
    intermediates: list[str] = []
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    for entry in re.split(r"[\s;,]+", wanted.strip()) if wanted.strip() else []:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 9.0+PTX, got {entry!r}")
        number = int(match[1] + match[2])
        if number < MINIMUM_CUDA_ARCHITECTURE:
            continue  # the list is shared with other packages; these kernels need sm_80
        if number not in known:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not know {entry!r}; it knows {sorted(known)}")
        binaries.append(f"{number}{match[3]}")
        intermediates += [binaries[-1]] if match[4] else []
    if not wanted.strip():
        binaries = [str(number) for number in CUDA_ARCHITECTURES if number in known]
        intermediates = binaries[-1:]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in binaries]
    flags += [f"-gencode=arch=compute_{name},code=compute_{name}" for name in intermediates]
    return flags, " ".join([*(f"sm_{name}" for name in binaries), *(f"PTX {name}" for name in intermediates)])


def decide_on_cuda() -> bool:
    """Whether to build the CUDA kernels; says what was decided and why."""
    wish = os.environ.get("FUSED_CONVLSTM_CUDA", "")
    if wish not in ("", "0", "1"):
        raise CompileError(f"FUSED_CONVLSTM_CUDA: expected 0, 1 or nothing, got {wish!r}")
    if wish == "0":
        print("fused_convlstm: CUDA kernels left out (FUSED_CONVLSTM_CUDA=0)", file=sys.stderr)
        return False
    nvcc = find_nvcc()
    flags, names = cuda_architectures(nvcc) if nvcc else ([], "")
    if flags:
        print(
            f"fused_convlstm: CUDA kernels will be built by {nvcc} for {names}; FUSED_CONVLSTM_CUDA=0 would skip that",
            file=sys.stderr,
        )
        return True
    why = (
        "TORCH_CUDA_ARCH_LIST names no GPU from 8.0 on" if nvcc else "nvcc was not found; CUDA_HOME can name its place"
    )
    if wish == "1":
        raise CompileError(f"FUSED_CONVLSTM_CUDA=1, but {why}")
    print(f"fused_convlstm: CUDA kernels left out: {why}", file=sys.stderr)
    return False


def build_cuda(target: Path, build: Path) -> None:
    """Compiles ``fused_convlstm._cuda`` to ``target``: one object a source and number format, cudart inside."""
    check_compiler(build)
    nvcc = find_nvcc()
    assert nvcc is not None  # decide_on_cuda
    architectures, names = cuda_architectures(nvcc)
    newest_header = max(path.stat().st_mtime for path in (*CUDA_SOURCES.glob("*.*h"), Path(__file__)))
    host = [f"-ccbin={os.environ['CXX'].split()[0]}"] if os.environ.get("CXX") else []
    key = re.sub(r"\W+", "-", names)
    objects: list[Path] = []
    commands: list[list[str]] = []
    for source in sorted(CUDA_SOURCES.glob("*_kernels.cu")):
        for math in CUDA_MATHS:
            objects.append(build / f"{source.stem}.{math}.{key}.o")
            if objects[-1].exists() and objects[-1].stat().st_mtime > max(source.stat().st_mtime, newest_header):
                continue
            flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", f"-DFCL_MATH={math}"]
            commands.append([nvcc, *host, *flags, *architectures, "-c", str(source), "-o", str(objects[-1])])
    binding = build / "module.o"
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    defines = [
        "-DFCL_MODULE_NAME=_cuda",
        f'-DFCL_ARCHITECTURES="{names}"',
        f'-DFCL_SOURCES="{digest(CUDA_SOURCES)}"',
    ]
    commands.append(
        [*compiler(), *common_flags(), *includes, *defines, "-c", str(CUDA_SOURCES / "module.cpp"), "-o", str(binding)]
    )
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(run, commands))
    run([nvcc, *host, "-shared", "-cudart=static", *map(str, objects), str(binding), "-o", str(target)])


# The compiled modules and what builds each.
BUILDERS = {"fused_convlstm._cpu": build_cpu}
if decide_on_cuda():
    BUILDERS["fused_convlstm._cuda"] = build_cuda


class BuildExtensions(build_ext):
    """Hands each extension to its builder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        suffix = "-sanitized" if os.environ.get("FUSED_CONVLSTM_SANITIZE") else ""
        build = Path(self.build_temp).absolute() / f"{ext.name}{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        build.mkdir(parents=True, exist_ok=True)
        BUILDERS[ext.name](target, build)


setup(
    ext_modules=[Extension(name, sources=[]) for name in BUILDERS],
    cmdclass={"build_ext": BuildExtensions},
)
