"""The barrier of all blocks of a grid (csrc/common/cuda/grid_barrier.cuh), right and with every bug that can be planted."""

import pytest
import torch

from tests.ptxsim import sim
from tests.ptxsim.launching import KERNELS, guarded, marked_lines, named_lines

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=str(sim.absent()))
on_both = pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
BLOCKS, THREADS, STEPS = 5, 64, 4

BUGS = {
    40: "an arrival that does not release",
    41: "an arrival before the whole block is there",
    42: "threads that do not wait for the one that waits",
    43: "every round waits for the first one",
    44: "a wait that does not acquire",
    45: "no barrier",
    46: "one buffer instead of two",
}


def run(bug: int = 0, arch: str = "sm_80", seed: int = 0, blocks: int = BLOCKS) -> torch.Tensor:
    words = blocks * THREADS
    exchange, out = (guarded(torch.full((count,), -1, dtype=torch.int32)) for count in (2 * words, words))
    arrived = guarded(torch.zeros(1, dtype=torch.int32))
    sim.launch("grid_steps", blocks, THREADS, 0, exchange, arrived, out, STEPS, source=KERNELS / "grid_steps.cu",
               arch=arch, defines=(f"BUG={bug}",), cooperative=True, seed=seed, max_instructions=1 << 24)  # fmt: skip
    assert arrived.item() == blocks * (STEPS + 1)
    return out


def expected(blocks: int = BLOCKS) -> torch.Tensor:
    words = list(range(blocks * THREADS))
    for step in range(STEPS):
        total = step
        for word in words:
            total = (3 * total + word) % (1 << 32)
        words = [total ^ own for own in range(blocks * THREADS)]
    return torch.tensor(words).to(torch.int32)


@pytest.mark.parametrize("seed", range(4))
@on_both
def test_right_on_every_schedule(arch, seed):
    assert run(arch=arch, seed=seed).equal(expected())


def test_one_block_and_many():
    for blocks in (1, 2, 17):
        assert run(blocks=blocks).equal(expected(blocks)), blocks


@pytest.mark.parametrize("bug", BUGS)
@on_both
def test_caught(arch, bug):
    with pytest.raises(sim.Fault) as raised:
        run(bug, arch)
    assert raised.value.kind == "race", f"{BUGS[bug]}: {raised.value}"
    assert named_lines(str(raised.value), "grid_steps.cu") & marked_lines("grid_steps.cu", str(bug)), raised.value
