"""Every bug that can be planted into a test kernel (-DBUG=n) is caught, by its name and at its line.

Without a bug the kernels are right, whatever the schedule and whenever asynchronous copies land.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.ptxsim import sim
from tests.ptxsim.launching import (
    KERNELS,
    SHAPES,
    attention,
    first_wrong,
    hopper_gemm,
    int8_gemm,
    layernorm,
    marked_lines,
    micro,
    named_lines,
)

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=str(sim.absent()))

NUMBERS = "wrong numbers"  # no structural check can see it

ASYNC_MODES = ("eager", "lazy", "random")

ATOMIC = {"dweight", "dbias"}  # outputs that depend on the order of the blocks


@dataclass(frozen=True)
class Planted:
    number: int
    kernel: Callable
    what: str
    kinds: tuple[str, ...]  # what the check may call it: which comes first depends on the schedule
    harmless: tuple[str, ...] = ()  # shapes where the bug changes nothing

    def cases(self):
        for shape in SHAPES[self.kernel]:
            yield pytest.param(self, shape, id=f"{self.number}-{self.kernel.__name__}-{shape}")


# Attention: tiles are 64 keys. "Whole" shapes have no tail, "single" ones need one tile only.
WHOLE = ("d64-causal-b1-h2/2-sq256-sk256", "d128-causal-b1-h1/1-sq128-sk128")
SINGLE = ("d64-causal-b1-h1/1-sq1-sk1",)

PLANTED = (
    Planted(1, attention, "missing clamp: reads past the tensor", ("out of bounds",), WHOLE),
    Planted(2, attention, "cp.async wait too weak", ("async in flight",)),
    Planted(3, attention, "missing __syncthreads after the wait", ("race", "async in flight", "uninitialized")),
    Planted(4, attention, "wrong B fragment order", (NUMBERS,)),
    Planted(5, attention, "next V tile overwrites the buffer in use", ("async in flight", "race"), SINGLE),
    Planted(6, attention, "missing .trans on ldmatrix", (NUMBERS,)),
    Planted(7, attention, "barrier reached by one warp only",
            ("barrier", "divergence", "race", "async in flight", "uninitialized")),
    Planted(8, attention, "shuffle under if (lane < 16)", ("divergence",)),
    Planted(11, layernorm, "reduction: barrier missing after the partial sums", ("uninitialized", "race")),
    Planted(12, layernorm, "reduction: barrier missing before the buffer is reused", ("race",)),
    Planted(13, layernorm, "one vector too many (global)", ("out of bounds",)),
    Planted(14, layernorm, "plain += across blocks instead of atomicAdd", ("race",)),
    Planted(21, int8_gemm, "barrier missing before the stage is overwritten", ("race",), ("64x64x64-stages3",)),
    Planted(31, hopper_gemm, "producer does not wait for a free slot", ("barrier", "race", "deadlock"),
            ("64x64x64-stages4", "100x72x200-stages4")),
    Planted(32, hopper_gemm, "wrong tx count", ("deadlock",)),
    Planted(33, hopper_gemm, "consumer does not wait for the data",
            ("uninitialized", "async in flight", "race")),
    Planted(34, hopper_gemm, "wgmma k step of 16 bytes instead of 32", (NUMBERS,)),
    Planted(35, hopper_gemm, "missing wgmma.wait_group", (NUMBERS,)),
    Planted(36, attention, "lo/hi swapped in the cvt.rn.bf16x2 wrapper", (NUMBERS,)),
)  # fmt: skip


def assert_named(fault: sim.Fault, source: str, mark: str) -> None:
    """The message says where: at one of the marked lines, if there are any."""
    named, marked = named_lines(str(fault), source), marked_lines(source, mark)
    assert named, f"no line of {source} in: {fault}"
    assert not marked or named & marked, f"expected {source}, lines {sorted(marked)}, in: {fault}"


ALL_SHAPES = pytest.mark.parametrize(
    "kernel, shape", [pytest.param(k, s, id=f"{k.__name__}-{s}") for k, shapes in SHAPES.items() for s in shapes]
)


@pytest.mark.parametrize("async_mode", ASYNC_MODES)
@pytest.mark.parametrize("seed", [0, 1])
@ALL_SHAPES
def test_right_without_a_bug(kernel, shape, seed, async_mode):
    assert first_wrong(kernel(shape, seed=seed, async_mode=async_mode)) is None


@ALL_SHAPES
def test_bitwise_the_same_under_every_schedule(kernel, shape):
    first, second = (kernel(shape, seed=seed, check=False) for seed in (2, 3))
    assert first_wrong(first) is None
    for name in first.keys() - ATOMIC:
        assert first[name][0].equal(second[name][0]), name


@pytest.mark.parametrize("async_mode", ASYNC_MODES)
@pytest.mark.parametrize("planted, shape", [case for planted in PLANTED for case in planted.cases()])
def test_caught(planted, shape, async_mode):
    try:
        wrong = first_wrong(planted.kernel(shape, bug=planted.number, async_mode=async_mode))
        seen = NUMBERS if wrong else None
    except sim.Fault as fault:
        assert_named(fault, f"{planted.kernel.__name__}.cu", str(planted.number))
        seen, wrong = fault.kind, str(fault)
    if str(shape) in planted.harmless:
        assert seen is None, wrong
    else:
        assert seen in planted.kinds, f"bug {planted.number}, {planted.what}: {wrong}"


# --- micro-kernels ---------------------------------------------------------------------------------------------------


def words(count: int, **first: int) -> torch.Tensor:
    """0, 1, 2, ..., but for the first ones if given."""
    data = torch.arange(count, dtype=torch.int32)
    for i, value in enumerate(first.values()):
        data[i] = value
    return data


# kernel: (what it is called, settings of `micro`)
ADDRESSES = {
    "shared_over_read": ("out of bounds", {"words": words(32, offset=1)}),
    "shared_under_read": ("out of bounds", {"words": words(32, offset=1)}),
    "global_over_read": ("out of bounds", {}),
    "global_under_read": ("out of bounds", {}),
    "misaligned_vector_load": ("misaligned", {}),
    "misaligned_ldmatrix_row": ("misaligned", {}),
    "misaligned_cp_async_source": ("misaligned", {}),
    "local_array_overflow": ("out of bounds", {"words": words(32, index=4)}),
    "stack_overflow": ("out of bounds", {"words": words(32, depth=1_000_000)}),
}
ORDER = {
    "uninitialised_shared": ("uninitialized", {}),
    "unwaited_cp_async": ("async in flight", {}),
    "cp_async_read_in_flight": ("async in flight", {}),
    "missing_syncwarp": ("race", {}),
    "cross_block_sum": ("race", {"blocks": 4, "out": 1}),
    "cross_block_read": ("race", {"blocks": 2, "out": 2}),
    "grid_barrier_without_fence": ("race", {"blocks": 6, "out": 7, "cooperative": True}),
}
PARTICIPANTS = {
    "exited_lane_in_mask": ("divergence", {}),
    "barrier_short_of_threads": ("barrier|deadlock", {"threads": 64}),
    "barrier_under_divergence": ("divergence|barrier", {}),
    "two_barriers_deadlock": ("deadlock", {"threads": 64}),
    "endless_loop": ("limit", {"words": words(32, never=0), "max_instructions": 100_000}),
    "trap": ("trap", {}),
    "failed_assert": ("trap", {}),
}
HOPPER = {
    "wgmma_without_fence": ("proxy", {"threads": 128, "words": torch.zeros(64 * 8 + 8 * 8, dtype=torch.int32),
                                      "out": 64 * 8}),
    "cluster_without_wait": ("race|uninitialized", {"blocks": 2, "cluster": 2}),
    "mbarrier_over_arrival": ("barrier", {}),
    "mbarrier_uninitialised": ("barrier|uninitialized", {}),
}  # fmt: skip


@pytest.mark.parametrize("arch, kernel", [
    *(("sm_80", name) for name in (*ADDRESSES, *ORDER, *PARTICIPANTS)), *(("sm_90a", name) for name in HOPPER)
])  # fmt: skip
def test_micro_reported(arch, kernel):
    kinds, settings = (ADDRESSES | ORDER | PARTICIPANTS | HOPPER)[kernel]
    settings = {"arch": arch, **settings}
    count = settings.get("blocks", 1) * settings.get("threads", 32)
    given, size = settings.pop("words", words(count)), settings.pop("out", count)
    with pytest.raises(sim.Fault) as raised:
        micro(kernel, given, torch.zeros(size, dtype=torch.int32), **settings)
    assert raised.value.kind in kinds.split("|"), raised.value
    assert_named(raised.value, "micro_sm90.cu" if arch == "sm_90a" else "micro.cu", kernel)


def test_host_pointer_reported():
    host = torch.arange(32, dtype=torch.int32)
    with pytest.raises(sim.Fault) as raised:
        micro("host_pointer", host.data_ptr(), torch.zeros(32, dtype=torch.int32))
    assert raised.value.kind == "out of bounds"
    assert_named(raised.value, "micro.cu", "host_pointer")


@pytest.mark.parametrize(
    "kernel, kinds",
    [
        ("tma_load_without_wait", ("uninitialized", "async in flight", "race")),
        ("tma_store_without_fence", ("proxy",)),
        ("tma_store_without_wait", ("async in flight", "race")),
    ],
)
@pytest.mark.parametrize("async_mode", ASYNC_MODES)
def test_micro_with_tma_reported(kernel, kinds, async_mode):
    rows = torch.zeros(32, 32, dtype=torch.int32)
    box = sim.TensorMap(rows, (1 if "store" in kernel else 4, 32))
    args = (box, torch.zeros(64, dtype=torch.int32), torch.zeros(8, 32, dtype=torch.int32))
    threads = 32 if "store" in kernel else 64
    with pytest.raises(sim.Fault) as raised:
        source = KERNELS / "micro_sm90.cu"
        sim.launch(kernel, 1, threads, 0, *args, source=source, arch="sm_90a", async_mode=async_mode)
    assert raised.value.kind in kinds, raised.value
    assert_named(raised.value, "micro_sm90.cu", kernel)
