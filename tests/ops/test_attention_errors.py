"""Every mistake in a call of attention is one error: the op, the argument, what it got and what it expected."""

import contextlib
import math

import pytest
import torch

import llmkernels
from llmkernels import functional
from tests.ops.attention_support import SDPA, VARLEN


def sdpa(q=(2, 4, 5, 8), k=(2, 4, 7, 8), v=(2, 4, 7, 6), dtypes=(torch.float32,) * 3, key_device="cpu", **options):
    """A call on tensors of these shapes."""

    def call():
        tensors = [torch.ones(shape, dtype=dtype) for shape, dtype in zip((q, k, v), dtypes, strict=True)]
        tensors[1] = tensors[1].to(key_device)
        return functional.scaled_dot_product_attention(*tensors, **({"backend": "torch"} | options))

    return call


def varlen(q=(9, 4, 8), k=(12, 2, 8), v=(12, 2, 6), ends_q=(0, 5, 9), ends_k=(0, 4, 12), longest=(5, 8),
           dtype=torch.int32, **options):  # fmt: skip
    def call():
        ends = (torch.tensor(ends_q, dtype=dtype), torch.tensor(ends_k, dtype=torch.int32))
        tensors = [torch.ones(shape) for shape in (q, k, v)]
        return functional.attention_varlen(*tensors, *ends, *longest, backend="torch", **options)

    return call


HALF, GROUPED = torch.float16, {"enable_gqa": True}
SDPA_ERRORS = [
    (ValueError, r"query has shape \(8,\), expected \(..., heads, length, head_dim\)", sdpa(q=(8,))),
    (ValueError, r"key has shape \(2, 4, 7, 9\), expected a last dimension of 8", sdpa(k=(2, 4, 7, 9))),
    (ValueError, r"value has shape \(2, 4, 3, 6\), expected 7 rows, the number of keys", sdpa(v=(2, 4, 3, 6))),
    (ValueError, r"the batch dimensions are query \(2,\), key \(3,\), value \(2,\), expected", sdpa(k=(3, 4, 7, 8))),
    (ValueError, r"query has 4 heads, key 2 and value 2, expected as many or 1 \(enable_gqa=True allows a multiple\)",
     sdpa(k=(2, 2, 7, 8), v=(2, 2, 7, 6))),
    (ValueError, "query has 4 heads, expected a multiple of 3", sdpa(k=(2, 3, 7, 8), v=(2, 3, 7, 6), **GROUPED)),
    (ValueError, "value has 3 heads, expected 2, as many as key", sdpa(k=(2, 2, 7, 8), v=(2, 3, 7, 6), **GROUPED)),
    (ValueError, "query has 4 heads, expected a multiple of 0", sdpa(k=(2, 0, 7, 8), v=(2, 0, 7, 6), **GROUPED)),
    (ValueError, r"key has shape \(7, 8\), expected \(..., heads, length, head_dim\)", sdpa(k=(7, 8), **GROUPED)),
    (TypeError, "query has dtype torch.int64, expected one of float32", sdpa(dtypes=(torch.int64,) * 3)),
    (TypeError, "value has dtype torch.float16, expected torch.float32, the dtype of query",
     sdpa(dtypes=(torch.float32, torch.float32, HALF))),
    (ValueError, "key is on meta, expected cpu, the device of query", sdpa(key_device="meta")),
    (ValueError, r"attn_mask has shape \(5, 6\), expected one that broadcasts to \(2, 4, 5, 7\)",
     sdpa(attn_mask=torch.zeros(5, 6))),
    (ValueError, r"attn_mask has shape \(3, 1, 5, 7\), expected one", sdpa(attn_mask=torch.zeros(3, 1, 5, 7))),
    (ValueError, r"attn_mask has shape \(2, 2, 1, 5, 7\), expected one", sdpa(attn_mask=torch.zeros(2, 2, 1, 5, 7))),
    (TypeError, "attn_mask has dtype torch.int64, expected bool, torch.float32",
     sdpa(attn_mask=torch.zeros(5, 7, dtype=torch.int64))),
    (ValueError, "attn_mask is on meta, expected cpu", sdpa(attn_mask=torch.zeros(5, 7, device="meta"))),
    (ValueError, "dropout_p is 1.5, expected a probability", sdpa(dropout_p=1.5)),
    (ValueError, "dropout_p is -0.1, expected a probability", sdpa(dropout_p=-0.1)),
    (ValueError, "dropout_p is nan, expected a probability", sdpa(dropout_p=math.nan)),
    (ValueError, "dropout_p is None, expected a probability", sdpa(dropout_p=None)),
    (TypeError, "scale is 'small', expected a number or None", sdpa(scale="small")),
    (ValueError, r"window is \(-2, 3\), expected \(left, right\)", sdpa(window=(-2, 3))),
    (ValueError, r"window is \(3,\), expected \(left, right\)", sdpa(window=(3,))),
    (ValueError, r"window is \(3.0, 1\), expected \(left, right\)", sdpa(window=(3.0, 1))),
    (ValueError, "window is 3, expected", sdpa(window=3)),
    (ValueError, r"softcap is -1.0, expected 0 \(off\) or a positive number", sdpa(softcap=-1.0)),
    (ValueError, r"softcap is 1e\+39, expected 0 \(off\) or a positive number within", sdpa(softcap=1e39)),
    (ValueError, "softcap is 1e-39, expected 0", sdpa(softcap=1e-39)),
    (ValueError, "softcap is nan, expected 0", sdpa(softcap=math.nan)),
    (ValueError, "softcap is None, expected 0", sdpa(softcap=None)),
    (ValueError, "causal is 'lower', expected 'top_left', 'bottom_right' or None", sdpa(causal="lower")),
    (ValueError, "is_causal=True is 'top_left', got causal", sdpa(is_causal=True, causal="bottom_right")),
    (ValueError, r"alibi_slopes has shape \(3,\), expected \(4,\) or \(2, 4\)", sdpa(alibi_slopes=torch.ones(3))),
    (TypeError, "alibi_slopes has dtype torch.int64", sdpa(alibi_slopes=torch.ones(4).long())),
    (ValueError, r"sinks has shape \(2, 4\), expected \(4,\)", sdpa(sinks=torch.ones(2, 4))),
    (ValueError, "sinks is on meta, expected cpu", sdpa(sinks=torch.ones(4, device="meta"))),
    (llmkernels.NoBackendError, "backend 'cuda' cannot run this call: cuda: input is on the CPU", sdpa(backend="cuda")),
]  # fmt: skip


def check(op, error, message, call):
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).startswith(f"{op}: ")


@pytest.mark.parametrize("error, message, call", SDPA_ERRORS, ids=[message[:30] for _, message, _ in SDPA_ERRORS])
def test_mistakes(error, message, call):
    check(SDPA, error, message, call)


VARLEN_ERRORS = [
    (ValueError, r"query has shape \(1, 9, 4, 8\), expected \(total, heads, head_dim\)", varlen(q=(1, 9, 4, 8))),
    (ValueError, "key has head_dim 9, expected 8, the one of query", varlen(k=(12, 2, 9))),
    (ValueError, "value has 11 rows, expected 12, as many as key", varlen(v=(11, 2, 6))),
    (ValueError, "query has 4 heads, expected a multiple of 3", varlen(k=(12, 3, 8), v=(12, 3, 6))),
    (ValueError, "value has 1 heads, expected 2, as many as key", varlen(v=(12, 1, 6))),
    (ValueError, r"cu_seqlens_q\[2\] is 4 after 5, expected no less than that", varlen(ends_q=(0, 5, 4, 9))),
    (ValueError, "cu_seqlens_q runs from 1 to 9, expected from 0 to 9, all rows", varlen(ends_q=(1, 5, 9))),
    (ValueError, "cu_seqlens_k runs from 0 to 11, expected from 0 to 12, all rows", varlen(ends_k=(0, 4, 11))),
    (ValueError, "cu_seqlens_k runs from 0 to 13, expected from 0 to 12, all rows", varlen(ends_k=(0, 4, 13))),
    (ValueError, "max_seqlen_k is 7, expected at least 8, the length of sequence 1", varlen(longest=(5, 7))),
    (ValueError, "max_seqlen_q is 4, expected at least 5, the length of sequence 0", varlen(longest=(4, 8))),
    (ValueError, "max_seqlen_q is None, expected the rows of the longest sequence", varlen(longest=(None, 8))),
    (ValueError, "max_seqlen_k is 8.0, expected the rows of the longest sequence", varlen(longest=(5, 8.0))),
    (ValueError, "max_seqlen_k is 4294967296, expected the rows", varlen(longest=(5, 2**32))),
    (ValueError, r"cu_seqlens_k has shape \(2,\), expected \(3,\), the shape of cu_seqlens_q", varlen(ends_k=(0, 12))),
    (ValueError, r"cu_seqlens_q has shape \(1, 3\), expected \(sequences \+ 1,\)", varlen(ends_q=((0, 5, 9),))),
    (ValueError, r"cu_seqlens_q has shape \(0,\), expected \(sequences \+ 1,\)", varlen(ends_q=())),
    (TypeError, "cu_seqlens_q has dtype torch.int64, expected torch.int32", varlen(dtype=torch.int64)),
    (ValueError, r"alibi_slopes has shape \(3, 4\), expected \(4,\) or", varlen(alibi_slopes=torch.ones(3, 4))),
    (ValueError, "causal is True, expected 'top_left', 'bottom_right' or None", varlen(causal=True)),
    (ValueError, "dropout_p is 2.0, expected a probability", varlen(dropout_p=2.0)),
    (ValueError, r"window is \(1, -5\), expected", varlen(window=(1, -5))),
    (ValueError, "softcap is -3.0, expected", varlen(softcap=-3.0)),
]  # fmt: skip


@pytest.mark.parametrize("error, message, call", VARLEN_ERRORS, ids=[message[:30] for _, message, _ in VARLEN_ERRORS])
def test_mistakes_with_packed_sequences(error, message, call):
    check(VARLEN, error, message, call)


def test_kernels_that_are_forced_refuse_fp64_with_a_sentence():
    with pytest.raises(llmkernels.NoBackendError, match="backend 'cpu' cannot run this call: cpu: "):
        sdpa(dtypes=(torch.float64,) * 3, backend="cpu")()
    with pytest.raises(ValueError, match="backend: unknown backend 'gpu'"):
        sdpa(backend="gpu")()


def test_raw_ops_never_crash():
    if llmkernels.backends()["cpu"]:
        pytest.skip(f"cpu: {llmkernels.backends()['cpu']}")
    q, k, ends = torch.ones(2, 4, 5, 8), torch.ones(2, 2, 7, 8), torch.tensor([0, 5], dtype=torch.int32)

    def raw(q, k, v, mask=None, slopes=None, sinks=None, seed=None, ends_q=None, ends_k=None):
        tensors = (q, k, v, mask, slopes, sinks, seed, ends_q, ends_k)
        return torch.ops.llmkernels_cpu.attention_fwd(*tensors, 5, 0.3, -1, -1, False, 0.0, 0.5)

    wrong = (
        lambda: raw(q[0], k, k),
        lambda: raw(q, k[:1], k),
        lambda: raw(q, k[..., :7], k),
        lambda: raw(q, k, k[:, :, :3]),
        lambda: raw(q, k[:, :0], k[:, :0]),
        lambda: raw(q, k.half(), k),
        lambda: raw(q.double(), k.double(), k.double()),
        lambda: raw(q, k, k, mask=torch.zeros(5, 7)),
        lambda: raw(q, k, k, mask=torch.zeros(1, 1, 5, 6)),
        lambda: raw(q, k, k, mask=torch.zeros(1, 1, 5, 7).long()),
        lambda: raw(q, k, k, slopes=torch.ones(3)),
        lambda: raw(q, k, k, sinks=torch.ones(5)),
        lambda: raw(q, k, k, seed=torch.zeros(2).long()),
        lambda: raw(q, k, k, ends_q=ends, ends_k=ends),
        lambda: raw(q[:1], k[:1], k[:1], ends_q=ends),
        lambda: raw(q[:1], k[:1], k[:1], ends_q=ends.long(), ends_k=ends),
    )
    for call in wrong:
        with pytest.raises((ValueError, TypeError), match="expected|missing"):
            call()
    # Lengths that the public function refuses are refused or clamped.
    wild = torch.tensor([-3, 400], dtype=torch.int32)
    with contextlib.suppress(ValueError):
        raw(q[:1], k[:1], k[:1], ends_q=wild, ends_k=wild)
