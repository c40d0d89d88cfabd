"""The Triton kernels as Triton compiles them for GPUs, through their own launchers, on the PTX interpreter."""

import dataclasses

import pytest
import torch

from llmkernels.ops.gated import cases as gated
from llmkernels.ops.lstm import cases as lstm
from llmkernels.ops.norm import cases
from llmkernels.testing.battery import evaluate, failures, judge
from tests.ptxsim import backend as simulated
from tests.ptxsim import sim

NAMES = tuple(simulated.TRITON)
pytestmark = pytest.mark.skipif(simulated.absent(NAMES[0]) is not None, reason=f"ptxsim: {simulated.absent(NAMES[0])}")

# A case costs the compilation of three kernels: every dtype and every flag once, with one block and with several warps.
CASES = [
    cases.NormCase("layer_norm", (5, 33), (33,), torch.float64),
    cases.NormCase("add_layer_norm", (7, 40), (40,), torch.float32, weight=False, bias=False),
    cases.NormCase("add_layer_norm", (6, 100), (100,), torch.bfloat16, data="offset"),
    cases.NormCase("layer_norm", (3, 72), (72,), torch.float16, weight_dtype=torch.float32, bias=False),
    cases.NormCase("rms_norm", (5, 40), (40,), torch.float16, weight_offset=1.0),
    cases.NormCase("add_rms_norm", (3, 1025), (1025,), torch.bfloat16, weight_dtype=torch.float32),
    cases.NormCase("rms_norm", (2, 3, 6, 8), (6, 8), torch.float64),
    cases.NormCase("layer_norm", (2, 5000), (5000,), torch.float32),
    cases.NormCase("rms_norm", (3, 1), (1,), torch.float32),
]


# Every dtype, every activation, packed and not, within a block and beyond.
GATED = [
    gated.GatedCase("swiglu", (5, 33), torch.float64),
    gated.GatedCase("swiglu", (3, 1025), torch.bfloat16, packed=True),
    gated.GatedCase("geglu", (3, 72), torch.float16),
    gated.GatedCase("geglu", (3, 4, 40), torch.float32, approximate="tanh", packed=True),
    gated.GatedCase("geglu", (5, 33), torch.float64, approximate="tanh"),
    gated.GatedCase("reglu", (6, 100), torch.float32),
]


# Every dtype, within a block and beyond.
LSTM = [
    lstm.LSTMCase("lstm_cell", B=3, H=33, dtype=torch.float64),
    lstm.LSTMCase("lstm_cell", B=2, H=600, dtype=torch.bfloat16),
    lstm.LSTMCase("lstm_cell", B=5, H=72, dtype=torch.float16),
    lstm.LSTMCase("lstm_cell", B=5, H=20, data="large"),
]


@pytest.fixture(params=NAMES)
def backend(request) -> str:
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64_truth(case, backend):
    assert failures(judge(cases, case, backend)) == []


@pytest.mark.parametrize("case", GATED, ids=str)
def test_gated_matches_fp64_truth(case, backend):
    assert failures(judge(gated, case, backend)) == []


@pytest.mark.parametrize("case", LSTM, ids=str)
def test_lstm_cell_matches_fp64_truth(case, backend):
    assert failures(judge(lstm, case, backend)) == []


@pytest.mark.parametrize("op", ("layer_norm", "add_rms_norm"))
def test_rows_longer_than_a_block(op, backend, monkeypatch):
    from llmkernels.ops.norm import triton_kernels

    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", 128)
    assert failures(judge(cases, cases.NormCase(op, (5, 300), (300,)), backend)) == []


def test_misaligned_pointers_are_specialised_as_such(backend):
    case = cases.NormCase("rms_norm", (4, 48), (48,))
    inputs = cases.make_inputs(case)
    expected = cases.call(case, inputs, backend)[0]
    offset = torch.zeros(4 * 48 + 1)
    offset[1:] = inputs.x.flatten()
    got = cases.call(case, dataclasses.replace(inputs, x=offset[1:].view(4, 48)), backend)[0]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_seeds_do_not_change_a_bit(backend):
    case = cases.NormCase("add_layer_norm", (6, 100), (100,), torch.bfloat16, data="offset")
    inputs, first = cases.make_inputs(case), None
    for seed in range(3):
        with sim.device(seed=seed):
            results = evaluate(cases, case, inputs, backend)
        first = first or results
        assert all(torch.equal(results[name], first[name]) for name in first)
