"""The CUDA kernels of whole sequences beyond the battery of tests/ops: which way runs, grids of several blocks,
schedules, what is behind a sequence's end."""

import dataclasses

import pytest
import torch

import llmkernels
from llmkernels.ops.lstm import cases, reference
from llmkernels.testing.battery import evaluate, failures, judge
from tests.ptxsim import backend as simulated
from tests.ptxsim import sim

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=f"ptxsim: {sim.absent()}")
on_both = pytest.mark.parametrize("backend", tuple(simulated.CUDA))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
RESIDENT, STEPS = ("lstm_recurrence_fwd", "lstm_recurrence_bwd"), ("lstm_step_fwd", "lstm_step_bwd")


def make(**options) -> cases.LSTMCase:
    return cases.LSTMCase("lstm", **{"T": 4, "I": 8} | options)


def launched(case: cases.LSTMCase, backend: str, **device) -> list[tuple[str, tuple]]:
    """(kernel, grid) of every launch of forward and backward."""
    with sim.device(record=True, **device) as launches:
        evaluate(cases, case, cases.make_inputs(case), backend)
    return [(launch["kernel"].split("_kernel<")[0].rpartition("::")[2], launch["grid"]) for launch in launches.all]


# Blocks by the number of multiprocessors, of which each takes two if shared memory allows: 9 groups of units at H 70.
@pytest.mark.parametrize("multiprocessors, blocks", [(1, 2), (2, 3), (4, 5), (16, 9)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_both
def test_grids_of_several_blocks(dtype, multiprocessors, blocks, backend):
    if dtype == torch.float64 and multiprocessors == 1:
        multiprocessors = 3  # one does not hold the weights
    case = make(B=5, H=70, dtype=dtype, lengths=(4, 1, 3, 4, 2), bidirectional=True)
    with sim.device(multiprocessors=multiprocessors):
        assert failures(judge(cases, case, backend)) == []
        kernels = launched(case, backend)
    assert [name for name, _ in kernels] == [RESIDENT[0]] * 2 + [RESIDENT[1]] * 2
    # fp64 has weights twice as large.
    assert dtype == torch.float64 or {grid[0] for _, grid in kernels} == {blocks}


# Several tiles of rows (16, or 8 in fp32), several groups of a block, sequences that end within a tile and at its edge.
TILES = [
    make(B=35, H=20, lengths=tuple(1 + b * 7 % 4 for b in range(35)), bidirectional=True),
    make(B=16, H=33, lengths=(4,) * 8 + (2,) * 8),
    make(B=17, H=8, T=3),
    make(B=1, H=40, T=6),
    make(B=3, H=1, T=3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", TILES, ids=str)
@on_both
def test_tiles(case, dtype, backend):
    assert failures(judge(cases, dataclasses.replace(case, dtype=dtype), backend)) == []


# The weights do not fit: at H 400 a group's forward slice is 53248 bytes in fp32, and one multiprocessor has 50 groups.
BY_STEPS = [
    make(B=3, H=400, T=2, dtype=torch.float32),
    make(B=3, H=400, T=2, dtype=torch.bfloat16, lengths=(1, 2, 1), bidirectional=True),
    make(B=300, H=4, T=2, dtype=torch.bfloat16),
    make(B=4, H=24, dtype=torch.float16, proj=8, lengths=(1, 4, 2, 2), bidirectional=True),
    make(B=4, H=20, dtype=torch.float64, proj=7),
]


@pytest.mark.parametrize("case", BY_STEPS, ids=str)
@on_both
def test_a_product_a_step_where_the_weights_do_not_stay(case, backend):
    assert failures(judge(cases, case, backend)) == []
    names = [name for name, _ in launched(case, backend)]
    count = case.T * case.directions
    assert names == [STEPS[0]] * count + [STEPS[1]] * count


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on_both
def test_schedules_do_not_change_a_bit(dtype, backend):
    case = make(B=18, H=40, dtype=dtype, lengths=tuple(1 + b % 4 for b in range(18)), bidirectional=True)
    inputs = cases.make_inputs(case)
    with sim.device(multiprocessors=3):
        expected = evaluate(cases, case, inputs, backend)
        for seed in range(1, 7):
            with sim.device(seed=seed, check=seed < 4):
                for name, result in evaluate(cases, case, inputs, backend).items():
                    assert torch.equal(result, expected[name]), (name, seed)


@on_both
def test_cells_and_their_gradients(backend):
    """What the battery does not ask for: every c, and gradients that arrive at them."""
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, generator=generator) * 0.5
    T, B, H = 4, 5, 12
    ops = getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}")
    x, h0, c0, w = normal(T * B, 4 * H), normal(B, H), normal(B, H), normal(4 * H, H)
    dcells, dh_n = normal(T * B, H), normal(B, H)
    for reverse in (False, True):
        call = (h0, c0, w, None, None, reverse)
        ours = ops.lstm_recurrence_fwd(x, *call, True)
        theirs = reference.lstm_recurrence_fwd(x, *call, True)
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected)
        y, _, _, gates, cells = theirs
        arriving = (None, dh_n, None, dcells)
        wanted = [True] * 4 + [False]
        ours = ops.lstm_recurrence_bwd(*arriving, *call, y, gates, cells, wanted)
        theirs = reference.lstm_recurrence_bwd(*arriving, *call, y, gates, cells, wanted)
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_explain_says_which_way():
    def line(backend: str, case: cases.LSTMCase) -> str:
        inputs = cases.make_inputs(case)
        arguments = (inputs.input, (inputs.h0, inputs.c0), inputs.parameters(), True, 1, 0.0, False, False, False)
        lines = str(llmkernels.explain("lstm", *arguments, backend=backend)).splitlines()
        return next(line for line in lines if line.split()[0] == backend)

    stay, step = "weights stay in shared memory, {} blocks", "a product and a small kernel at each step"
    with sim.device(multiprocessors=16):
        small = line("cuda-sim-sm80", make(B=5, H=70))
        large = line("cuda-sim-sm80", make(B=2, H=1100, T=1))
    assert f"runs (forward: {stay.format(9)}; backward: {stay.format(9)})" in small
    assert f"runs (forward: {step}; backward: {step})" in large
