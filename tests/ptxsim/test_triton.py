"""The Triton kernels as Triton compiles them for GPUs, through their own launchers, on the PTX interpreter."""

import dataclasses

import pytest
import torch

from llmkernels.ops.activation import cases as activation
from llmkernels.ops.cross_entropy import cases as cross_entropy
from llmkernels.ops.gated import cases as gated
from llmkernels.ops.norm import cases
from llmkernels.ops.rope import cases as rope
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

# Every dtype, both layouts of pairs, positions and not, with a rest that is copied and in place.
ROPE = [
    rope.RopeCase("rope", (2, 5, 3, 48), torch.float64, rotary=20, seq_dim=-3, positions="2d"),
    rope.RopeCase("rope", (2, 3, 5, 64), torch.bfloat16, table="fp32"),
    rope.RopeCase("rope", (5, 40), torch.float16, kv_heads=None, rotary=32, interleaved=True),
    rope.RopeCase("rope_", (2, 3, 5, 10), torch.float32, interleaved=True, positions="int32"),
    rope.RopeCase("rope_", (2, 3, 5, 48), torch.bfloat16, rotary=16, seq_dim=-3),
    rope.RopeCase("rope", (2, 2, 5000), torch.float32),
]


# Every dtype and kind of target, every option, one block and several.
CROSS_ENTROPY = [
    cross_entropy.CrossEntropyCase("cross_entropy", (5, 33), torch.float64, label_smoothing=0.1, softcap=2.0),
    cross_entropy.CrossEntropyCase("cross_entropy", (5, 100), torch.float32, weight=True, ignored=True, z_loss=1e-2),
    cross_entropy.CrossEntropyCase("cross_entropy", (3, 5000), torch.bfloat16, softcap=5.0),
    cross_entropy.CrossEntropyCase("cross_entropy", (3, 72), torch.float16, target="wide", weight=True),
    cross_entropy.CrossEntropyCase("cross_entropy", (4, 40), torch.float32, target="probabilities", softcap=2.0),
    cross_entropy.CrossEntropyCase("linear_cross_entropy", (5, 33), torch.float32, hidden=16, bias=True),
]


# Every dtype and activation, with a bias and without, more rows than a sum takes.
ACTIVATION = [
    activation.ActivationCase("silu", (5, 33), torch.float64),
    activation.ActivationCase("gelu", (35, 40), torch.bfloat16),
    activation.ActivationCase("gelu", (3, 1025), torch.float16, approximate="tanh"),
    activation.ActivationCase("silu", (3, 4, 40), torch.float32, bias=False),
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


@pytest.mark.parametrize("case", CROSS_ENTROPY, ids=str)
def test_cross_entropy_matches_fp64_truth(case, backend):
    assert failures(judge(cross_entropy, case, backend)) == []


@pytest.mark.parametrize("case", ACTIVATION, ids=str)
def test_activation_matches_fp64_truth(case, backend):
    assert failures(judge(activation, case, backend)) == []


@pytest.mark.parametrize("case", ROPE, ids=str)
def test_rope_matches_fp64_truth(case, backend):
    assert failures(judge(rope, case, backend)) == []


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
