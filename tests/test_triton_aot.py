"""Every block size and flag of the Triton kernels compiles for sm_80, sm_90 and sm_100 within their limits."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from llmkernels.ops.norm import cases
from llmkernels.testing.battery import failures, judge
from tests.conftest import absent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton: not installed")


@pytest.fixture(scope="module")
def compiled():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "llmkernels.testing.triton_aot"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_all_kernels_and_architectures_compiled(compiled):
    kernels = {"_norm_fwd_kernel", "_norm_bwd_kernel", "_norm_reduce_kernel", "_gated_fwd_kernel", "_gated_bwd_kernel"}
    kernels |= {f"_attention_{name}_kernel" for name in ("fwd", "delta", "dq", "dkv", "dmask", "kvcache", "merge")}
    kernels |= {"_rope_kernel", "_softmax_fwd_kernel", "_softmax_bwd_kernel", "_sample_kernel"}
    kernels |= {"_activation_fwd_kernel", "_activation_bwd_kernel"}
    kernels |= {"_cross_entropy_fwd_kernel", "_cross_entropy_bwd_kernel"}
    kernels |= {"_lstm_cell_fwd_kernel", "_lstm_cell_bwd_kernel"}
    kernels |= {f"_quantized_linear_{name}_kernel" for name in ("fwd", "bwd", "rows", "sum")}
    assert {(row["kernel"], row["capability"]) for row in compiled} == {(k, c) for k in kernels for c in (80, 90, 100)}


def test_no_spills_and_shared_memory_within_limits(compiled):
    from llmkernels.testing.triton_aot import SHARED_LIMIT

    for row in compiled:
        assert row["STACK"] == 0 and row["LOCAL"] == 0, row
        assert row["shared"] <= SHARED_LIMIT[row["capability"]], row


def test_products_in_fp32_are_not_rounded_to_tf32(compiled):
    assert [row for row in compiled if row["tf32"]] == []


def test_quantized_linear_multiplies_by_wgmma_on_hopper(compiled):
    """Of types below fp32, which has other tiles: the forward for any number of rows of x, the backward from 64 on."""
    side = {"_quantized_linear_fwd_kernel": "BLOCK_N", "_quantized_linear_bwd_kernel": "BLOCK_M"}
    rows = [row for row in compiled if row["kernel"] in side and row["capability"] == 90]
    rows = [row for row in rows if int(row["constants"][side[row["kernel"]]]) >= 64]
    assert len(rows) > 30 and [row for row in rows if not row["wgmma"]] == []


def test_attention_on_hopper_copies_by_descriptor_and_multiplies_by_wgmma(compiled):
    rows = [row for row in compiled if row["kernel"].startswith("_attention_") and row["capability"] >= 90]
    absent = {"_attention_dkv_kernel": "q_desc"} | dict.fromkeys(
        ("_attention_fwd_kernel", "_attention_dq_kernel"), "k_desc"
    )
    described = [row for row in rows if row["kernel"] in absent and absent[row["kernel"]] not in row["constants"]]
    assert [(row["tma"], row["wgmma"]) for row in described if row["capability"] == 90] == [(True, True)] * 12
    assert [row["tma"] for row in described if row["capability"] == 100] == [True] * 12
    assert not any(row["tma"] for row in rows if row not in described)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="triton: test_long_rows covers this on a GPU")
@pytest.mark.parametrize("data", ("normal", "offset", "outlier"))
@pytest.mark.parametrize("op", cases.OPS)
def test_chunked_rows(op, data, monkeypatch):
    """Rows longer than a block, which is made small here: the interpreter is slow."""
    if absent("triton"):
        pytest.skip(f"triton: {absent('triton')}")
    from llmkernels.ops.norm import triton_kernels

    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", 32)
    case = cases.NormCase(op, (5, 100), (100,), data=data)
    assert failures(judge(cases, case, "triton")) == []
