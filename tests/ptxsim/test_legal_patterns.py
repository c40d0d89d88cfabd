"""What looks like a mistake and is none raises nothing, and computes what it should, under every schedule."""

import pytest
import torch

from tests.ptxsim import sim
from tests.ptxsim.launching import KERNELS, micro

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=str(sim.absent()))

SCHEDULES = [(seed, mode) for seed in range(3) for mode in ("eager", "lazy", "random")]


def words(count: int) -> torch.Tensor:
    return torch.randint(0, 1000, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.int32)


@pytest.fixture(params=SCHEDULES, ids=lambda schedule: f"seed{schedule[0]}-{schedule[1]}")
def schedule(request) -> dict:
    return {"seed": request.param[0], "async_mode": request.param[1]}


def run(kernel: str, given: torch.Tensor, size: int | None = None, **settings) -> torch.Tensor:
    return micro(kernel, given, torch.zeros(size or len(given), dtype=torch.int32), **settings)


def exchanged(given: torch.Tensor) -> torch.Tensor:
    return given.view(-1, 2).flip(1).flatten()


def test_early_exit_before_barrier(schedule):
    given = words(40)
    assert run("early_exit_before_barrier", given, threads=64, **schedule).equal(given.flip(0))


def test_arrive_and_sync(schedule):
    given = words(64)
    assert run("arrive_and_sync", given, threads=64, **schedule).equal(exchanged(given))


def test_half_warp_masks(schedule):
    given, lanes = words(32), torch.arange(32)
    expected = torch.where(lanes < 16, given[lanes ^ 1], given[lanes ^ 3] + 1)
    assert run("half_warp_masks", given, **schedule).equal(expected)


def test_exchange_with_syncwarp(schedule):
    given = words(32)
    assert run("exchange_with_syncwarp", given, **schedule).equal(exchanged(given))


def test_several_named_barriers(schedule):
    given = words(128)
    pairs = given.view(2, 64)
    expected = torch.cat([pairs[0].roll(-33), pairs[1].roll(-66)])
    assert run("several_named_barriers", given, threads=128, **schedule).equal(expected)


def test_same_value_stores(schedule):
    given = words(32)
    assert run("same_value_stores", given, **schedule).equal(given[0].expand(32))


def test_atomics(schedule):
    given = words(6 * 64)
    expected = torch.bincount(given % 4, minlength=4).int()
    assert run("atomics", given, 4, blocks=6, threads=64, **schedule).equal(expected)


def test_last_block_sums(schedule):
    given = words(7)
    expected = torch.cat([given.sum(0, keepdim=True).int(), given])
    assert run("last_block_sums", given, 8, blocks=7, **schedule).equal(expected)


def test_grid_barrier(schedule):
    given = words(6)
    expected = torch.cat([torch.tensor([12], dtype=torch.int32), given.roll(-1)])
    assert run("grid_barrier", given, 7, blocks=6, cooperative=True, **schedule).equal(expected)


def test_wgmma_with_fence(schedule):
    a, b = (torch.randint(-8, 8, (rows, 16), generator=torch.Generator().manual_seed(rows)) for rows in (64, 8))
    given = torch.cat([a, b]).bfloat16().view(torch.int32).flatten()
    out = run("wgmma_with_fence", given, 64 * 8, threads=128, arch="sm_90a", **schedule)
    assert out.view(torch.float32).view(64, 8).equal((a @ b.T).float())


@pytest.mark.parametrize("kernel", ["cluster_exchange", "cluster_push"])
def test_cluster_exchange(kernel, schedule):
    given = words(4 * 32)
    # Clusters are blocks 0, 1 and 2, 3; each thread gets what its neighbour in the other block has.
    expected = exchanged(given.view(2, 2, 32).flip(1).flatten())
    assert run(kernel, given, blocks=4, cluster=2, arch="sm_90a", **schedule).equal(expected)


def test_tma_load_ring(schedule):
    rows, out = words(32 * 32).view(32, 32), torch.zeros(8, 32, dtype=torch.int32)
    source = KERNELS / "micro_sm90.cu"
    args = (sim.TensorMap(rows, (4, 32)), None, out)
    sim.launch("tma_load_ring", 1, 64, 0, *args, source=source, arch="sm_90a", **schedule)
    assert out.equal(rows.view(8, 4, 32).sum(1).int())


def test_tma_store_twice(schedule):
    given, rows = words(64).view(2, 32), torch.zeros(2, 32, dtype=torch.int32)
    source = KERNELS / "micro_sm90.cu"
    args = (sim.TensorMap(rows, (1, 32)), given, None)
    sim.launch("tma_store_twice", 1, 32, 0, *args, source=source, arch="sm_90a", **schedule)
    assert rows.equal(given)
