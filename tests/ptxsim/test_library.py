"""The library's CUDA kernels on the interpreter, beyond tests/ops: other schedules, other GPUs, the report, goldens."""

import re
import subprocess
import sys

import pytest
import torch

from llmkernels.ops.norm import cases
from llmkernels.testing.battery import evaluate, failures, judge
from tests.ptxsim import backend as simulated
from tests.ptxsim import golden_cases, goldens, sim

pytestmark = pytest.mark.skipif(sim.absent() is not None, reason=f"ptxsim: {sim.absent()}")
on_both = pytest.mark.parametrize("backend", tuple(simulated.CUDA))

# One for each kind of kernel: a warp per row, a block per row, rows read again; with and without vectors.
KINDS = [
    cases.NormCase("layer_norm", (9, 72), (72,), torch.bfloat16),
    cases.NormCase("add_layer_norm", (5, 33), (33,), torch.float32),
    cases.NormCase("add_rms_norm", (3, 4096), (4096,), torch.float16),
    cases.NormCase("dropout_add_layer_norm", (3, 4096), (4096,), torch.bfloat16),
    cases.NormCase("dropout_add_rms_norm", (5, 33), (33,), torch.float64),
    cases.NormCase("rms_norm", (3, 1025), (1025,), torch.float32),
    cases.NormCase("add_layer_norm", (2, 24_576), (24_576,), torch.float32),
]


@pytest.mark.parametrize("async_mode", ("eager", "lazy", "random"))
@pytest.mark.parametrize("case", KINDS, ids=str)
@on_both
def test_schedules_do_not_change_a_bit(case, backend, async_mode):
    simulated.assert_same_in_any_schedule(cases, case, backend, async_mode)


@pytest.mark.parametrize("multiprocessors", (4, 132))
@on_both
def test_grids_of_other_gpus(backend, multiprocessors):
    """One multiprocessor: every block takes many rows. A real GPU's number: more blocks than rows."""
    case = cases.NormCase("add_layer_norm", (70, 40), (40,))
    with sim.device(multiprocessors=multiprocessors):
        assert failures(judge(cases, case, backend)) == []


def test_counters_are_those_of_paper_and_pencil():
    """32 blocks of 8 warps read 16 partial rows of 1,024 floats, and the first of each stores a line."""
    case = cases.NormCase("rms_norm", (16, 1024), (1024,))
    with sim.device(record=True, multiprocessors=4) as launches:
        evaluate(cases, case, cases.make_inputs(case), "cuda-sim-sm80")
    reduce = launches.all[-1]
    assert "norm_bwd_reduce_kernel" in reduce["kernel"] and reduce["grid"] == [32, 1, 1]
    assert reduce["global_requests"] == 32 * (16 + 1) and reduce["global_sectors"] == 4 * reduce["global_requests"]
    assert reduce["shared_wavefronts"] == reduce["shared_requests"]


# No benchmark has the first; the second merges parts, of which a cache as short as here has one; the others are for
# weights that do not fit, and here they do.
NOT_REPORTED = {"sample_kernel", "attention_kvcache_merge_kernel", "lstm_step_fwd_kernel", "lstm_step_bwd_kernel"}


def test_report_counts_every_kernel():
    command = [sys.executable, "-m", "tests.ptxsim.report"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=sim.ROOT, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    sources = (path.read_text() for path in sim.ROOT.glob("csrc/ops/*/*.cu*"))
    kernels = {name for source in sources for name in re.findall(r"__global__[^{]* (\w+_kernel)\(", source)}
    assert len(kernels) > 20 and set(re.findall(r"^(\w+_kernel)\b", run.stdout, re.M)) == kernels - NOT_REPORTED
    assert "norm_bwd_kernel<__nv_bfloat16, 1, 8, 1, false, false>" in run.stdout and "::" not in run.stdout
    assert "gru: backend 'cuda-sim-sm80' cannot run this call" in run.stdout


# Conformance with a GPU. What the instructions should give is tested in test_conformance*.py; here, that every case of
# the goldens runs, and gives what a GPU gave where that is known.


@pytest.mark.parametrize("part", golden_cases.PARTS)
def test_goldens(part):
    wrong = goldens.compare(golden_cases.PARTS[part](), goldens.stored())
    assert not wrong, "\n".join(wrong)


def test_a_difference_is_one_sentence():
    case = next(golden_cases.cases())
    ours, theirs = torch.tensor([1, 2, -1], dtype=torch.int32), torch.tensor([1, 3, 7], dtype=torch.int32)
    assert goldens.difference(case, ours, ours.clone()) is None
    expected = f"{case.name}: 2 of 3 words differ: [1] 0x00000002 for 0x00000003, [2] 0xffffffff for 0x00000007"
    assert goldens.difference(case, ours, theirs) == expected
