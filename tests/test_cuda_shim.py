"""The shim that runs CUDA kernels on the CPU: it computes what a GPU would, and finds mistakes."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import NamedTuple

import cuda_shim
import numpy as np
import pytest
import sanitizers
from numpy.typing import NDArray

SELF_TEST = [cuda_shim.SHIM / "self_test.cpp"]
SEEDS = range(12)


class Outcome(NamedTuple):
    error: str
    out: NDArray[np.float32]


@cache
def kernels() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(cuda_shim.build("self_test", SELF_TEST)))
    except cuda_shim.CannotTellError as reason:
        pytest.skip(str(reason))


def run(
    kernel: str,
    *,
    seed: int = 0,
    count: int = 0,
    mode: int = 0,
    blocks: int = 1,
    threads: int = 64,
    shared: int = 1024,
    values: NDArray[np.float32] | None = None,
) -> Outcome:
    """Launches a kernel of self_test.cpp."""
    library = kernels()
    library.hakd_shim_set_seed(ctypes.c_uint64(seed))
    given = np.zeros(1, np.float32) if values is None else values
    # as many as the host has for it: a launch that is refused writes none
    out = np.full(min(blocks * threads, 1 << 16), np.nan, np.float32)
    message = ctypes.create_string_buffer(4096)
    library.run_kernel(
        kernel.encode(),
        given.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        *(count, mode, blocks, threads, ctypes.c_size_t(shared)),
        *(message, ctypes.c_size_t(len(message))),
    )
    return Outcome(message.value.decode(), out)


def block_sums(seed: int, mode: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the kernel says, and what is right."""
    values = np.arange(2560, dtype=np.float32) % 17
    done = run("block_sum", seed=seed, mode=mode, count=2500, blocks=10, threads=256, values=values)
    assert done.error == ""
    values[2500:] = 0
    return done.out[:10], values.reshape(10, 256).sum(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_reduction_is_right_in_every_order(seed: int) -> None:
    got, expected = block_sums(seed, mode=0)
    np.testing.assert_array_equal(got, expected)


def test_a_missing_barrier_shows_in_some_order() -> None:
    wrong = 0
    for seed in SEEDS:
        got, expected = block_sums(seed, mode=1)
        wrong += not np.array_equal(got, expected)
    assert wrong > len(SEEDS) // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_and_block_operations(seed: int) -> None:
    done = run("warp_operations", seed=seed, blocks=3, threads=96)
    assert done.error == ""
    assert done.out[0] == 0, f"{done.out[0]} lanes got a wrong answer"


def test_the_seed_is_the_order() -> None:
    natural = run("order", blocks=7, threads=64).out
    np.testing.assert_array_equal(natural, np.arange(7 * 64))
    shuffled = run("order", seed=1, blocks=7, threads=64).out
    assert sorted(shuffled) == sorted(natural)
    first_of_block = shuffled.reshape(7, 64).min(1)
    assert np.any(np.diff(first_of_block) < 0), "blocks run in their order"
    assert np.any(np.diff(shuffled[:64]) < 0), "threads run in their order"
    np.testing.assert_array_equal(run("order", seed=1, blocks=7, threads=64).out, shuffled)
    assert np.any(run("order", seed=2, blocks=7, threads=64).out != shuffled)


#: What a kernel does wrong, and words of the message.
MISTAKES = {
    0: ["deadlock", "threads 0-39 in __syncthreads", "40-63 in __syncwarp", "mask 0xffffffff"],
    1: ["divergent barrier: in __syncthreads", "while others are in __syncthreads"],
    2: ["waits for it in __syncwarp|mask names lanes that returned or do not exist"],
    3: ["deadlock", "0-2 in __syncwarp", "3 in __syncthreads"],
    4: ["thread 3: ", "mask does not name lane 3, which calls it"],
    5: ["__shfl_sync", "in __syncwarp"],
    6: ["wrote at byte 1024 of 1024 bytes of shared memory"],
    7: ["wrote at byte -4 of 1024 bytes of shared memory"],
    8: ["thread 3: __trap()"],
    9: ["mask 0x0000ffff", "mask 0xffffffff"],
}


@pytest.mark.parametrize("mode", MISTAKES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_mistake_is_named(mode: int, seed: int) -> None:
    # 64 threads, so that the second half of the fourth mistake's warps is right
    threads = 64 if mode in (0, 1, 6, 7, 8) else 32
    done = run("mistake", seed=seed, mode=mode, count=256, threads=threads)
    expected = ["mistake", "block (0, 0, 0)", f"seed {seed}: "]
    if mode == 3 and "deadlock" not in done.error:
        expected += ["returned"]
    else:
        expected += MISTAKES[mode]
    for words in expected:
        assert any(part in done.error for part in words.split("|")), done.error
    # and the next launch knows nothing of it
    test_a_block_reduction_is_right_in_every_order(seed)


def test_limits_of_a_launch() -> None:
    library = kernels()
    invalid_value, invalid_configuration = 1, 9
    nothing = 99

    def refused(code: int, shared: int = 0, blocks: int = 1, threads: int = 32) -> str:
        launch = run("mistake", mode=nothing, shared=shared, blocks=blocks, threads=threads)
        assert library.take_last_error() == code
        assert library.take_last_error() == 0
        return launch.error

    assert library.allow_shared_memory(49152) == 0
    assert run("mistake", mode=nothing, shared=49152).error == ""
    assert refused(invalid_value, shared=49153) == "invalid argument"
    assert library.allow_shared_memory(60000) == 0
    assert run("mistake", mode=nothing, shared=60000).error == ""
    assert "wrote at byte 60000" in run("mistake", mode=6, count=15000, shared=60000).error
    assert refused(invalid_value, shared=60001) == "invalid argument"
    assert library.allow_shared_memory(227 * 1024) == 0
    assert run("mistake", mode=nothing, shared=227 * 1024).error == ""
    assert library.allow_shared_memory(227 * 1024 + 1) == invalid_value
    assert library.take_last_error() == invalid_value
    for blocks, threads in ((0, 32), (1, 0), (1, 1025)):
        message = refused(invalid_configuration, blocks=blocks, threads=threads)
        assert message == "invalid configuration argument"
    assert run("mistake", mode=nothing, threads=1024).error == ""


@pytest.mark.parametrize(
    ("mode", "mistake"),
    [(10, "heap-buffer-overflow"), (11, "use-after-poison"), (6, "use-after-poison")],
    ids=["global", "shared", "shared write"],
)
def test_the_address_sanitizer_names_an_access(mode: int, mistake: str) -> None:
    try:
        path = cuda_shim.build("self_test", SELF_TEST, sanitize=True)
        done = sanitizers.run_python("address", "-c", SANITIZED, str(path), str(mode))
    except cuda_shim.CannotTellError as reason:
        pytest.skip(str(reason))
    assert "the right kernel: ''" in done.stdout, done.stdout
    assert done.returncode != 0, done.stdout
    assert f"AddressSanitizer: {mistake}" in done.stdout
    assert "in mistake" in done.stdout, done.stdout
    assert "self_test.cpp:" in done.stdout
    assert "shim: mistake, block (" in done.stdout


# A program of its own, without torch: arrays are the C library's, so that the sanitizer knows them.
SANITIZED = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
given = ctypes.c_void_p(libc.malloc(1024 * 4))
out = ctypes.c_void_p(libc.malloc(1024 * 4))
def run(kernel, count, mode):
    message = ctypes.create_string_buffer(4096)
    library.hakd_shim_set_seed(ctypes.c_uint64(3))
    library.run_kernel(kernel, given, out, count, mode, 4, 256, ctypes.c_size_t(1024), message,
                       ctypes.c_size_t(4096))
    return message.value.decode()
print("the wrong mask:", repr(run(b"mistake", 1024, 4)), flush=True)
ctypes.memset(given, 0, 1024 * 4)
print("the right kernel:", repr(run(b"block_sum", 1024, 0)), flush=True)
mode = int(sys.argv[2])
print("not caught:", repr(run(b"mistake", 1024 if mode == 10 else 256, mode)), flush=True)
"""
