"""The CUDA kernels of whole sequences beyond the battery of tests/ops: which way runs, grids of several blocks,
schedules, what is behind a sequence's end."""

import dataclasses
import re
from typing import NamedTuple

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


class Launched(NamedTuple):
    kernel: str
    units: int  # of a group, where the weights stay
    alone: bool  # whether a block has a multiprocessor to itself, and weights in registers
    blocks: int


def launched(case: cases.LSTMCase, backend: str) -> list[Launched]:
    """Every launch of forward and backward."""
    with sim.device(record=True) as launches:
        evaluate(cases, case, cases.make_inputs(case), backend)
    found = []
    for launch in launches.all:
        name, arguments = re.fullmatch(r".*::(\w+)_kernel<(.*)>\(.*", launch["kernel"]).groups()
        arguments = re.findall(r"\d+|true|false", arguments.rpartition("float")[2].rpartition("double")[2])
        units, alone = (int(arguments[-2]), arguments[-1] in ("true", "1")) if name in RESIDENT else (0, False)
        found.append(Launched(name, units, alone, launch["grid"][0]))
    return found


class Grid(NamedTuple):
    """What is planned for H 70 on so many multiprocessors; 9 groups of 8 units, or 5 of 16."""

    multiprocessors: int
    directions: int
    units: int
    alone: bool
    blocks: int  # of all directions


GRIDS = [
    Grid(1, 1, 8, False, 2), Grid(2, 1, 8, False, 3), Grid(4, 1, 8, False, 5), Grid(5, 1, 16, True, 5),
    Grid(9, 1, 8, True, 9), Grid(4, 2, 8, False, 6), Grid(8, 2, 8, False, 10), Grid(10, 2, 16, True, 10),
    Grid(18, 2, 8, True, 18),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(map(str, grid[:2])))
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@on_both
def test_grids_of_several_blocks(dtype, grid, backend):
    case = make(B=5, H=70, dtype=dtype, lengths=(4, 1, 3, 4, 2), bidirectional=grid.directions == 2)
    with sim.device(multiprocessors=grid.multiprocessors):
        assert failures(judge(cases, case, backend)) == []
        assert launched(case, backend) == [Launched(name, *grid[2:]) for name in RESIDENT]


@on_both
def test_grids_of_fp64(backend):
    """Which has one block on a multiprocessor, and no weights in registers."""
    case = make(B=5, H=70, dtype=torch.float64, lengths=(4, 1, 3, 4, 2), bidirectional=True)
    with sim.device(multiprocessors=10):
        assert failures(judge(cases, case, backend)) == []
        assert launched(case, backend) == [Launched(name, 8, False, 10) for name in RESIDENT]


# --- registers and shared memory ------------------------------------------------------------------------------------

# A GPU with fewer registers, so that they hold a part of small weights: 16 of a thread, or 32. Elements of depth that are
# in them, of 288 forward and 1056 backward at H 264: in bf16 256 (a round of all warps) and 1024, in fp32 128 and 512.
PARTS = [
    (make(B=3, H=264, T=2, dtype=torch.bfloat16), 16, 33, 8),
    (make(B=18, H=264, T=2, dtype=torch.float16, lengths=(2,) * 3 + (1,) * 15), 32, 17, 16),
    (make(B=3, H=264, T=2, dtype=torch.float32), 16, 33, 8),
    (make(B=1, H=264, T=2, dtype=torch.float32), 32, 17, 16),
    (make(B=2, H=264, T=2, dtype=torch.bfloat16, lengths=(1, 2), bidirectional=True), 32, 34, 16),
]


@pytest.mark.parametrize("case, registers, multiprocessors, units", PARTS, ids=lambda value: str(value))
def test_a_part_in_registers(case, registers, multiprocessors, units):
    backend = "cuda-sim-sm80"
    with sim.device(multiprocessors=multiprocessors, registers=256 * (96 + registers)):
        assert failures(judge(cases, case, backend)) == []
        assert launched(case, backend) == [Launched(name, units, True, multiprocessors) for name in RESIDENT]
        assert way(case, backend).count("weights stay in registers and shared memory") == 2


# --- both directions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend, backwards", [("cuda-sim-sm80", 2), ("cuda-sim-sm90a", 1)])
def test_one_direction_after_the_other_where_both_do_not_fit(backend, backwards):
    case = make(B=5, H=70, dtype=torch.float32, lengths=(4, 1, 3, 4, 2), bidirectional=True)
    assert failures(judge(cases, case, backend)) == []
    names = [launch.kernel for launch in launched(case, backend)]
    assert names == [RESIDENT[0]] * 2 + [RESIDENT[1]] * backwards
    assert "forward: one direction after the other, weights stay in shared memory, 2 blocks" in way(case, backend)


@pytest.mark.parametrize("multiprocessors", (1, 3, 8))
@on_both
def test_both_directions_are_two_calls_as_one(multiprocessors, backend):
    """The raw ops against the reference, gradients of cells and gradients that are not wanted included."""
    generator = torch.Generator().manual_seed(5)
    normal = lambda *shape: torch.randn(shape, generator=generator) * 0.5
    B, H, counts = 5, 20, torch.tensor([5, 3, 3, 1])
    ops = getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}")
    for sizes, rows in ((None, 4 * B), (counts, 12), (counts, 4 * B)):
        ahead, back = ((normal(rows, 4 * H), normal(B, H), normal(B, H), normal(4 * H, H)) for _ in range(2))
        one = [reference.lstm_recurrence_fwd(*of, None, sizes, of is back, True) for of in (ahead, back)]
        arriving = [(None, normal(B, H), None, normal(rows, H)), (normal(rows, H), None, normal(B, H), None)]
        given, grads = [], []
        for of, d, (y, _, _, gates, cells) in zip((ahead, back), arriving, one, strict=True):
            given += [*d, *of[1:], y, gates, cells]
            call = (*d, *of[1:], None, sizes, of is back, y, gates, cells, [True] * 4 + [False])
            grads += reference.lstm_recurrence_bwd(*call)[:4]
        with sim.device(multiprocessors=multiprocessors):
            found = ops.lstm_both_fwd(*ahead, *back, sizes, True)
            torch.testing.assert_close(found, (*one[0], *one[1]))
            for wanted in ([True] * 8, [True, False] * 4):
                found = ops.lstm_both_bwd(*given, sizes, wanted)
                for got, expected, want in zip(found, grads, wanted, strict=True):
                    torch.testing.assert_close(got, expected if want else got.new_empty(0), rtol=1e-5, atol=1e-5)
            tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
            torch.library.opcheck(ops.lstm_both_fwd.default, (*ahead, *back, sizes, False), test_utils=tests)
            torch.library.opcheck(ops.lstm_both_bwd.default, (*given, sizes, [False] + [True] * 7), test_utils=tests)


def test_both_directions_of_other_shapes_are_refused():
    ops = torch.ops.llmkernels_cuda_sim_sm80
    of = lambda B, H, **options: tuple(
        torch.zeros(shape, **options) for shape in ((2 * B, 4 * H), (B, H), (B, H), (4 * H, H))
    )
    with pytest.raises(ValueError, match=r"lstm_both_fwd: gates_x_reverse has shape \[6, 32\], expected \[4, 32\]"):
        ops.lstm_both_fwd(*of(2, 8), *of(3, 8), None, True)
    with pytest.raises(TypeError, match="lstm_both_fwd: gates_x_reverse"):
        ops.lstm_both_fwd(*of(2, 8), *of(2, 8, dtype=torch.bfloat16), None, True)
    results = ops.lstm_both_fwd(*of(0, 8), *of(0, 8), None, True)
    assert [tuple(result.shape) for result in results] == [(0, 8), (0, 8), (0, 8), (0, 32), (0, 8)] * 2


@pytest.mark.parametrize("compiled", (False, True))
def test_second_derivatives_and_compilers_with_both_directions(compiled):
    case = make(B=2, H=4, T=2, I=3, dtype=torch.float64 if not compiled else torch.float32, bidirectional=True)

    def run(backend: str):
        leaves = [t.clone().requires_grad_() for t in inputs.tensors.values()]
        call = lambda *given: cases.call(case, inputs.replace(**dict(zip(inputs.tensors, given, strict=True))), backend)
        if compiled:
            call = torch.compile(call, fullgraph=True, backend="aot_eager")
        loss = sum((result * result).sum() for result in call(*leaves))
        wanted = leaves[:7]  # the input, the states and the first weights
        grads = torch.autograd.grad(loss, wanted, create_graph=not compiled)
        return grads if compiled else torch.autograd.grad(sum((g * g).sum() for g in grads), wanted)

    inputs = cases.make_inputs(case)
    torch.testing.assert_close(run("cuda-sim-sm80"), run("torch"))


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
@pytest.mark.parametrize("multiprocessors", (1, 6))
@on_both
def test_tiles(case, dtype, multiprocessors, backend):
    """On one multiprocessor groups of units in shared memory; on six, weights in registers."""
    with sim.device(multiprocessors=multiprocessors):
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
    names = [launch.kernel for launch in launched(case, backend)]
    count = case.T * case.directions
    assert names == [STEPS[0]] * count + [STEPS[1]] * count


# Two blocks on a multiprocessor; blocks alone, one direction after the other; both at once.
@pytest.mark.parametrize("multiprocessors", (3, 6))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@on_both
def test_schedules_do_not_change_a_bit(dtype, multiprocessors, backend):
    case = make(B=18, H=40, dtype=dtype, lengths=tuple(1 + b % 4 for b in range(18)), bidirectional=True)
    inputs = cases.make_inputs(case)
    with sim.device(multiprocessors=multiprocessors):
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


# --- explain --------------------------------------------------------------------------------------------------------


def way(case: cases.LSTMCase, backend: str) -> str:
    """What `explain` says of a call on this backend."""
    inputs = cases.make_inputs(case)
    hx, options = (inputs.h0, inputs.c0), (True, 1, 0.0, False, case.bidirectional, False)
    explanation = llmkernels.explain("lstm", inputs.input, hx, inputs.parameters(), *options, backend=backend)
    return explanation.ways[backend]


STEP = "a product and a small kernel at each step"


@pytest.mark.parametrize(
    "case, multiprocessors, expected",
    [
        (make(B=5, H=70), 8, "weights stay in registers, 5 blocks"),
        (make(B=5, H=70), 4, "weights stay in shared memory, 5 blocks"),
        (make(B=5, H=70, bidirectional=True), 18, "both directions at once, weights stay in registers, 18 blocks"),
        (make(B=2, H=1100, T=1), 16, STEP),
        (make(B=2, H=1100, T=1, bidirectional=True), 16, f"one direction after the other, {STEP}"),
    ],
    ids=str,
)
def test_explain_says_which_way(case, multiprocessors, expected):
    with sim.device(multiprocessors=multiprocessors):
        assert way(case, "cuda-sim-sm80") == f"forward: {expected}; backward: {expected}"


BOTH_PLACES = "weights stay in registers and shared memory"


@pytest.mark.parametrize(
    "arch, multiprocessors, dtype, H, batch, both, expected",
    [
        ("sm_90a", 132, torch.bfloat16, 1024, 16, False, "weights stay in registers, 128 blocks"),
        ("sm_90a", 132, torch.bfloat16, 2048, 256, False, f"{BOTH_PLACES}, 128 blocks"),
        ("sm_90a", 132, torch.bfloat16, 1024, 64, True, f"both directions at once, {BOTH_PLACES}, 128 blocks"),
        ("sm_80", 108, torch.float16, 1536, 128, False, f"{BOTH_PLACES}, 96 blocks"),
        ("sm_80", 108, torch.float16, 2048, 16, False, STEP),
    ],
)
def test_large_weights_stay_on_large_gpus(arch, multiprocessors, dtype, H, batch, both, expected):
    """The multiprocessors of an H100 and of an A100."""
    gates_x, state = torch.empty(batch, 4 * H, dtype=dtype), torch.empty(batch, H, dtype=dtype)
    with sim.device(arch=arch, multiprocessors=multiprocessors):
        found = torch.ops.llmkernels_cuda.lstm_recurrence_way(gates_x, state, state, state, None, both)
    assert found == f"forward: {expected}; backward: {expected}"
