"""The shim that executes CUDA kernels on the host: it computes what a GPU would, and notices what a GPU might not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_host import build, load
from torch import Tensor

HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def defaults() -> Iterator[None]:
    yield
    load().set_schedule()
    load().set_device()


def exchange(kernel: str, with_barrier: bool, order: str, eager: bool = False, seed: int = 0) -> Tensor:
    count = 64 if kernel == "exchange" else 256
    data = torch.arange(count, dtype=torch.float32)
    load().set_schedule(order, seed, eager)
    load().test_kernel(kernel, data.data_ptr(), count, with_barrier, 0)
    return data


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("kernel", ["exchange", "exchange_async"])
def test_right_kernels_are_right_in_every_order(kernel: str, order: str) -> None:
    data = exchange(kernel, True, order)
    torch.testing.assert_close(data, torch.arange(len(data), dtype=torch.float32).roll(len(data) // 2))


def test_a_missing_barrier_shows() -> None:
    results = [exchange("exchange", False, order) for order in ("forward", "reverse", "random")]
    expected = torch.arange(64, dtype=torch.float32).roll(32)
    assert all(not torch.equal(result, expected) for result in results)
    assert not torch.equal(results[0], results[1])


def test_a_missing_wait_shows() -> None:
    expected = torch.arange(256, dtype=torch.float32).roll(128)
    torch.testing.assert_close(exchange("exchange_async", False, "forward", eager=True), expected)
    assert not torch.equal(exchange("exchange_async", False, "forward"), expected)


def test_a_barrier_that_some_do_not_reach_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="divergent: deadlock"):
        load().test_kernel("divergent", 0, 0, True, 0)
    assert not torch.equal(exchange("exchange", True, "forward"), torch.zeros(64))  # and the next launch works


@pytest.mark.parametrize(
    ("number", "dtype", "depth"), [(0, torch.float16, 16), (1, torch.bfloat16, 16), (2, torch.float32, 8)]
)
def test_fragments_multiply_like_matrices(number: int, dtype: torch.dtype, depth: int) -> None:
    """ldmatrix and mma together give c + a @ b.T, whatever the layout between them."""
    g = torch.Generator().manual_seed(number)
    a, b = (torch.randint(-8, 9, (16, depth), generator=g).to(dtype) for _ in range(2))
    c = torch.randint(-8, 9, (16, 16), generator=g).float()
    expected = c + a.float() @ b.float().T  # small integers: exact
    load().test_fragments(number, a.data_ptr(), b.data_ptr(), c.data_ptr())
    torch.testing.assert_close(c, expected, rtol=0, atol=0)


def test_tf32_drops_the_lower_mantissa() -> None:
    a, b, c = torch.zeros(16, 8), torch.zeros(16, 8), torch.zeros(16, 16)
    a[0, 0], b[0, 0] = 1 + 2**-10 + 2**-12, 1.0
    load().test_fragments(2, a.data_ptr(), b.data_ptr(), c.data_ptr())
    assert c[0, 0] == 1 + 2**-10


def test_fragment_layout() -> None:
    """The layout itself, as in the PTX manual: an element of a in one register of one lane lands in one row."""
    a, b, c = torch.zeros(16, 16).half(), torch.zeros(16, 16).half(), torch.zeros(16, 16)
    a[9, 5], b[3, 5], b[12, 5] = 2.0, 3.0, 5.0
    load().test_fragments(0, a.data_ptr(), b.data_ptr(), c.data_ptr())
    expected = torch.zeros(16, 16)
    expected[9, 3], expected[9, 12] = 6.0, 10.0
    torch.testing.assert_close(c, expected, rtol=0, atol=0)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize("clusters", [False, True])
def test_blocks_of_a_group_meet(order: str, clusters: bool) -> None:
    """Three groups of four blocks add up over rounds; a block that went ahead would miss what others add."""
    rounds, groups, group = 5, 3, 4
    load().set_device(compute_capability=90, resident_blocks=12)
    load().set_schedule(order, 3)
    sums, seen = torch.zeros(groups, rounds, dtype=torch.int32), torch.zeros(groups * group, dtype=torch.int32)
    counters = torch.zeros(groups, dtype=torch.int32)
    load().test_group(sums.data_ptr(), seen.data_ptr(), 0 if clusters else counters.data_ptr(), rounds, groups, group)
    expected = [4]
    for _ in range(rounds - 1):
        expected.append(4 + 4 * expected[-1])
    assert sums.tolist() == [expected] * groups
    assert seen.tolist() == [expected[-1]] * (groups * group)


def test_launches_that_a_device_cannot_hold_fail() -> None:
    words = torch.zeros(64, dtype=torch.int32)
    load().set_device(compute_capability=90, resident_blocks=4)
    with pytest.raises(RuntimeError, match="group_sum: launch failed: too many blocks"):
        load().test_group(words.data_ptr(), words.data_ptr(), words.data_ptr(), 1, 2, 4)
    load().set_device(compute_capability=80)
    with pytest.raises(RuntimeError, match="group_sum: launch failed: invalid cluster"):
        load().test_group(words.data_ptr(), words.data_ptr(), 0, 1, 2, 4)


def test_half_precision_conversions() -> None:
    bits = torch.arange(65536, dtype=torch.int32)
    halves = bits.to(torch.int16).view(torch.float16)
    finite = halves.isfinite()
    ours = torch.tensor([load().half_to_float(int(b)) for b in bits[finite]])
    torch.testing.assert_close(ours, halves[finite].float(), rtol=0, atol=0)
    g = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(2000, generator=g) * 10.0**e for e in range(-9, 6)])
    for function, dtype in ((load().float_to_half, torch.float16), (load().float_to_bfloat16, torch.bfloat16)):
        ours = torch.tensor([function(float(x)) for x in values], dtype=torch.int32).to(torch.int16).view(dtype)
        torch.testing.assert_close(ours, values.to(dtype), rtol=0, atol=0)


# --- AddressSanitizer ----------------------------------------------------------------------------------------------


def run_sanitized(script: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own with the host build that checks every access."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    library = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "FUSED_CONVLSTM_CUDA_HOST": str(build(sanitized=True)),
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("memory", ["global", "shared"])
@pytest.mark.parametrize("shift", [0, 1, -1])
def test_out_of_bounds_is_caught(memory: str, shift: int) -> None:
    script = f"""
import torch
from cuda_host import load
data = torch.zeros(64)
load().test_kernel("out_of_bounds_{memory}", data.data_ptr(), 64, True, {shift})
"""
    result = run_sanitized(script)
    if shift == 0:
        assert result.returncode == 0, result.stderr
    else:
        assert result.returncode != 0
        assert "heap-buffer-overflow" in result.stderr


SANITIZED_CASES = """
from dataclasses import replace

import torch
from cases import Case, make_tensors, run
from cuda_host import host_backend, load

def shifted(x):  # the same numbers, not at a multiple of anything
    flat = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
    return flat.view(*x.shape[:-3], x.size(-2), x.size(-1), x.size(-3)).movedim(-1, -3).copy_(x)

def unaligned(t):
    return replace(t, input=shifted(t.input), hx=tuple(map(shifted, t.hx)), grads=tuple(map(shifted, t.grads)))

cases = [
    Case(hidden_channels=7, size=(5, 6), kernel_size=(2, 3), recurrent_kernel_size=(3, 4), lengths=True, reset=True),
    Case(hidden_channels=17, in_channels=9, size=(9, 8), stride=(2, 2), recompute_gates=True, reverse=True),
    Case(hidden_channels=8, size=(3, 3), recurrent_dilation=(2, 1), peephole="channel", layout="channels_last"),
]
for cell in ("conv_lstm2d", "pooled_gate_conv_lstm2d"):
    for case in cases:
        case = replace(case, cell=cell, peephole=case.peephole if cell == "conv_lstm2d" else "none")
        for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.float16, False)):
            for tile in (1, 2, 3) if cell == "conv_lstm2d" else (0,):
                load().set_schedule("random", tile, tile == 2)
                load().set_device(90 if tf32 else 80, 16, 16)
                tensors = make_tensors(case).to(dtype)
                with host_backend(tf32, tile) as backend:
                    run(case, tensors, backend, training=False)
                    for given in (tensors, unaligned(tensors)):
                        run(case, given, backend)
print("clean")
"""


def test_kernels_stay_within_bounds() -> None:
    result = run_sanitized(SANITIZED_CASES)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "clean"
