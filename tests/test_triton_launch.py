"""What the launcher hands to Triton, seen through a driver that records launches: no GPU is needed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_interpreter import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter has no launcher", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fused_convlstm.backends.triton.launch import StepLauncher, rounded
from fused_convlstm.backends.triton.tile import Tile

DEVICE, STREAM = 3, 0x5EED  # no defaults


@triton.jit(do_not_specialize=["t"])
def copy_kernel(
    in_ptr, out_ptr, absent_ptr, t, size, stride_t, one, scale, HAS_ABSENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(in_ptr + t.to(tl.int64) * stride_t + offsets * one, mask=offsets < size, other=0.0) * scale
    if HAS_ABSENT:
        x += tl.load(absent_ptr + offsets)
    tl.store(out_ptr + offsets, x, mask=offsets < size)


class RecordingDriver:
    """Stands for a GPU of compute capability 9.0. Launches are recorded as (grid, stream, arguments)."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], int, tuple[Any, ...]]] = []
        self.sources: list[Any] = []  # of every launcher made, which is one for each compiled variant
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
        )

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        assert device == DEVICE
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.sources.append(source)

        def launch(x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any) -> None:
            assert function == 2
            assert packed[0] == 2  # warps
            assert metadata.num_stages == 3
            self.launches.append(((x, y, z), stream, rest[3:]))  # after launch metadata and two hooks

        return launch


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingDriver]:
    recording = RecordingDriver()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))
    before = dict(vars(driver))
    driver.set_active(recording)
    yield recording
    copy_kernel.device_caches.clear()
    gc.collect()  # kernels are unloaded by the driver that loaded them
    vars(driver).update(before)  # not reset_active(): it looks for a GPU


def launcher(source: Tensor, out: Tensor) -> StepLauncher:
    arguments = {
        "in_ptr": source, "out_ptr": out, "absent_ptr": None, "size": 48, "stride_t": 64, "one": 1, "scale": 0.5,
        "HAS_ABSENT": False, "BLOCK": 32,
    }  # fmt: skip
    return StepLauncher(copy_kernel, 2, arguments, ("t",), Tile(0, 0, 0, num_warps=2, num_stages=3))


def addresses(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)


def test_launches_after_the_first_differ_in_the_step_alone(recorder: RecordingDriver) -> None:
    source, out = torch.zeros(20, 64), torch.zeros(64)
    launch = launcher(source, out)
    for t in (1, 16, 2):  # what Triton would specialise on
        launch(t)
    assert len(recorder.sources) == 1
    signature = recorder.sources[0].signature
    assert signature["t"] == "i32"
    assert signature["one"] == "constexpr"
    expected = [source.data_ptr(), out.data_ptr(), None, 0, 48, 64, 1, 0.5, False, 32]
    for t, (grid, stream, arguments) in zip((1, 16, 2), recorder.launches, strict=True):
        assert grid == (2, 1, 1)
        assert stream == STREAM
        assert addresses(arguments) == (*expected[:3], t, *expected[4:])
    assert all(isinstance(a, Tensor) for a in recorder.launches[0][2][:2])
    assert all(type(a) is int for _, _, arguments in recorder.launches[1:] for a in arguments[:2])


def test_bound_tensors_may_lie_otherwise(recorder: RecordingDriver) -> None:
    """A variant for addresses that are multiples of 16 is not launched with others."""
    memory = torch.zeros(300)
    aligned, also_aligned, askew = memory[:128], memory[128:256], memory[129:257]
    launch = launcher(aligned, torch.zeros(64))
    launch(0)
    for tensor in (also_aligned, askew, aligned):
        launch.bind("in_ptr", tensor)
        for t in (1, 0):
            launch(t)
            assert addresses(recorder.launches[-1][2])[:4:3] == (tensor.data_ptr(), t)
    attributes = [source.attrs.get((0,)) == [["tt.divisibility", 16]] for source in recorder.sources]
    assert attributes == [True, False]


def test_weights_are_rounded_to_tf32() -> None:
    weight = torch.randn(512, 512)  # enough of them for a mean error of 4e-7
    assert rounded(weight, "ieee") is weight
    result = rounded(weight.t(), "tf32").t()
    assert not (result.contiguous().view(torch.int32) & 0x1FFF).any()  # nothing is left to cut off
    assert ((result - weight).abs() <= weight.abs() * 2.0**-11).all()
    assert abs((result - weight).mul(weight.sign()).mean()) < 1e-5  # cutting off: -2.3e-4
    exact = torch.tensor([0.0, -0.0, 1.0, -(1 + 2**-10), torch.inf, -torch.inf, torch.nan])
    torch.testing.assert_close(rounded(exact, "tf32"), exact, rtol=0, atol=0, equal_nan=True)
    nan_of_a_gpu = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    assert rounded(nan_of_a_gpu, "tf32").isnan().all()
