"""The Triton kernels as Triton compiles them for GPUs, through their own launchers, on the PTX interpreter."""

import dataclasses

import pytest
import torch

from llmkernels import functional
from llmkernels.ops.activation import cases as activation
from llmkernels.ops.attention import cases as attention
from llmkernels.ops.attention import reference
from llmkernels.ops.cross_entropy import cases as cross_entropy
from llmkernels.ops.gated import cases as gated
from llmkernels.ops.lstm import cases as lstm
from llmkernels.ops.norm import cases
from llmkernels.ops.quantized_linear import cases as quantized_linear
from llmkernels.ops.rope import cases as rope
from llmkernels.ops.softmax import cases as softmax
from llmkernels.quantization.tensor import QuantizedTensor
from llmkernels.testing.battery import evaluate, failures, judge
from tests.ptxsim import backend as simulated
from tests.ptxsim import sim

NAMES = tuple(simulated.TRITON)
pytestmark = pytest.mark.skipif(simulated.absent(NAMES[0]) is not None, reason=f"ptxsim: {simulated.absent(NAMES[0])}")

# A case costs the compilation of three kernels: every dtype and every flag once, with one block and with several warps.
CASES = [
    cases.NormCase("layer_norm", (5, 33), (33,), torch.float64),
    cases.NormCase("add_layer_norm", (7, 40), (40,), torch.float32, weight=False, bias=False),
    cases.NormCase("dropout_add_layer_norm", (5, 33), (33,), torch.float64),
    cases.NormCase("dropout_add_rms_norm", (7, 40), (40,), torch.bfloat16),
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

# Every dtype, both ops, each kind of mask, within a block and beyond.
SOFTMAX = [
    softmax.SoftmaxCase("softmax", (5, 33), torch.float64, 0.5, "add"),
    softmax.SoftmaxCase("softmax", (2, 3, 4, 40), torch.bfloat16, 0.5, "bool", (2, 1, 4, 40)),
    softmax.SoftmaxCase("log_softmax", (6, 100), torch.float16, mask="add_fp32"),
    softmax.SoftmaxCase("log_softmax", (2, 5000), torch.float32, data="offset"),
]


# Every dtype, with blocks that are whole, cut by the window and cut by the end.
ATTENTION = [
    attention.AttentionCase("scaled_dot_product_attention", 1, 2, 70, 90, 64, torch.bfloat16, causal="bottom_right"),
    attention.AttentionCase("scaled_dot_product_attention", 1, 2, 33, 70, 64, torch.float16, Hk=1, window=(20, 4),
                            sinks=True),
    attention.AttentionCase("scaled_dot_product_attention", 1, 1, 20, 37, 64, torch.float32, dropout=0.3),
    attention.AttentionCase("attention_varlen", 3, 2, D=64, dtype=torch.bfloat16, Hk=1, causal="bottom_right",
                            lengths=((5, 33, 0), (9, 40, 3))),
]  # fmt: skip


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


# Every dtype, within a block and beyond.
LSTM = [
    lstm.LSTMCase("lstm_cell", B=3, H=33, dtype=torch.float64),
    lstm.LSTMCase("lstm_cell", B=2, H=600, dtype=torch.bfloat16),
    lstm.LSTMCase("lstm_cell", B=5, H=72, dtype=torch.float16),
    lstm.LSTMCase("lstm_cell", B=5, H=20, data="large"),
]


# Every format, dtype and kind of activations, each tile of x, columns in one part and in two. Not groups of 128: their
# scales in the backward are fewer than the block has threads, and several store the same, which counts as a race here.
QUANTIZED_LINEAR = [
    quantized_linear.QuantizedLinearCase(variant, M, N, K, dtype)
    for variant, M, N, K, dtype in (
        ("int4", 3, 40, 200, torch.bfloat16),
        ("int4_zeros", 70, 33, 257, torch.float16),
        ("int8", 2, 24, 1040, torch.bfloat16),
        ("int8", 4, 33, 65, torch.float32),
        ("nf4_double", 17, 40, 130, torch.bfloat16),
        ("nf4", 3, 20, 64, torch.float32),
        ("fp8_block", 33, 40, 200, torch.bfloat16),
        ("fp8", 3, 24, 129, torch.float16),
        ("w8a8", 5, 40, 1040, torch.bfloat16),
        ("w8a8", 70, 40, 136, torch.float32),
        ("w4a8", 70, 40, 130, torch.bfloat16),
        ("w4a8_zeros", 3, 40, 63, torch.float16),
        ("w4a8_row", 3, 24, 1024, torch.float32),
        ("fp8_dynamic", 3, 24, 129, torch.float32),
        ("fp8_dynamic_block", 3, 24, 130, torch.bfloat16),
    )
]
# The norm before activations are rounded, in one pass of a block and in two, and before others are multiplied.
QUANTIZED_LINEAR += [
    quantized_linear.QuantizedLinearCase(variant, M, N, K, dtype, op="rms_norm_quantized_linear")
    for variant, M, N, K, dtype in (
        ("w8a8", 3, 40, 200, torch.bfloat16),
        ("w8a8", 2, 20, 2100, torch.float32),
        ("w4a8", 3, 40, 130, torch.float16),
        ("fp8_dynamic", 2, 33, 65, torch.bfloat16),
        ("nf4", 2, 33, 65, torch.bfloat16),
    )
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


# Where a tile has fewer values than the block has threads, Triton lets several warps store the same ones, which counts
# as a race here. So larger tiles of keys, no mask, and no merge, whose kernel has a few numbers of a row.
@pytest.fixture
def whole_tiles(monkeypatch):
    from llmkernels.ops.attention import triton_kvcache, triton_launch

    monkeypatch.setitem(triton_launch._TILES, ("dkv", 2), {64: (64, 128, 8, 2)})
    monkeypatch.setattr(triton_kvcache, "KEYS_PER_SPLIT", 10**6)


@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_attention_matches_fp64_truth(case, backend, whole_tiles):
    assert failures(judge(attention, case, backend)) == []


@pytest.mark.parametrize("page", (None, 16), ids=("contiguous", "paged"))
def test_attention_to_a_cache(page, backend, whole_tiles):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator).to(torch.bfloat16)
    q, table = normal(2, 4, 1, 64), None
    shape = (2, 1, 144, 64)
    if page is not None:
        table = torch.randperm(18, generator=generator).view(2, 9).to(torch.int32)
        shape = (18, 1, page, 64)
    arguments = (q, normal(*shape), normal(*shape), None, torch.linspace(-1.0, 1.0, 4))
    arguments += (torch.tensor([144, 50], dtype=torch.int32), table, 0.125, -1, 0, False, 0.0)
    namespace = getattr(torch.ops, f"llmkernels_{backend.replace('-', '_')}")
    results = namespace.attention_kvcache_fwd(*arguments)
    for got, want in zip(results, reference.attention_kvcache_fwd(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", SOFTMAX, ids=str)
def test_softmax_matches_fp64_truth(case, backend):
    assert failures(judge(softmax, case, backend)) == []


@pytest.mark.parametrize("options", ({"temperature": 0.0}, {"top_k": 9, "top_p": 0.8, "min_p": 0.02}), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_sample_agrees_with_sorting(dtype, options, backend):
    logits = (torch.randn(3, 100, generator=torch.Generator().manual_seed(1)) * 2.0).to(dtype)
    ours, theirs = (
        functional.sample(logits, **options, generator=torch.Generator().manual_seed(2), backend=name)
        for name in (backend, "torch")
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", LSTM, ids=str)
def test_lstm_cell_matches_fp64_truth(case, backend):
    assert failures(judge(lstm, case, backend)) == []


@pytest.mark.parametrize("case", QUANTIZED_LINEAR, ids=str)
def test_quantized_linear_matches_fp64_truth(case, backend):
    assert failures(judge(quantized_linear, case, backend)) == []


@pytest.mark.parametrize("M", (3, 70))
@pytest.mark.parametrize("variant", ("fp8", "fp8_block", "fp8_dynamic", "fp8_dynamic_block"))
def test_quantized_linear_with_instructions_for_fp8(variant, M, monkeypatch):
    from llmkernels.ops.quantized_linear import triton_kernels

    monkeypatch.setattr(triton_kernels, "has_fp8", lambda _: True)
    case = quantized_linear.QuantizedLinearCase(variant, M, 40, 200, torch.bfloat16)
    assert failures(judge(quantized_linear, case, "triton-sim-sm90")) == []


@pytest.mark.parametrize("variant", ("int8", "int4_128_zeros", "nf4_double"))
def test_quantized_linear_with_wide_tiles(variant, monkeypatch):
    from llmkernels.ops.quantized_linear import triton_kernels

    monkeypatch.setattr(triton_kernels, "takes_wide_tiles", lambda x, N: x.dtype != torch.float32)
    case = quantized_linear.QuantizedLinearCase(variant, 260, 33, 200, torch.bfloat16)
    assert failures(judge(quantized_linear, case, "triton-sim-sm90")) == []


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_code_of_fp8_by_instructions(dtype, monkeypatch):
    from llmkernels.ops.quantized_linear import triton_kernels

    monkeypatch.setattr(triton_kernels, "has_fp8", lambda _: True)
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64)
    codes[codes & 0x7F == 0x7F] = 0  # NaN, which is never written
    data = codes.view(torch.float8_e4m3fn)
    weight = QuantizedTensor("fp8", (4, 64), data, torch.ones(4))
    y = functional.quantized_linear(torch.eye(64, dtype=dtype), weight, backend="triton-sim-sm90")
    assert torch.equal(y, data.to(dtype).t())


@pytest.mark.parametrize("op", ("layer_norm", "add_rms_norm", "dropout_add_layer_norm"))
def test_rows_longer_than_a_block(op, backend, monkeypatch):
    from llmkernels.ops.norm import triton_kernels

    # With dropout the backward has half of it: the least that gives each of 32 threads a vector of its own.
    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", 256)
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
