"""attention_varlen: sequences of different lengths, packed one after the other."""

from collections.abc import Sequence

from torch import Tensor

from llmkernels import _op, _random
from llmkernels.ops.attention import arguments
from llmkernels.ops.attention.op import attend

OP = "attention_varlen"


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
    causal: str | None = None,
    window: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of several packed sequences; the work grows with the sum of their lengths squared.

    Args:
        query: `[total_q, H, D]`, fp64, fp32, bf16 or fp16.
        key, value: `[total_k, Hk, D]` and `[total_k, Hk, Dv]`, the dtype of `query`; H is a multiple of Hk.
        cu_seqlens_q, cu_seqlens_k: `[sequences + 1]`, int32: sequence b has the rows from entry b to entry b + 1. The
            first is 0 and the last the number of rows (checked on the CPU; on CUDA with LLMKERNELS_VALIDATE=1).
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        alibi_slopes: `[H]` or `[sequences, H]`.
        Other arguments as scaled_dot_product_attention's.
    Returns: `[total_q, H, Dv]`, or (that, lse `[H, total_q]`).
    Raises: ValueError or TypeError, shapes, devices, dtypes or options disagree; NoBackendError, a forced backend
        cannot run this call (the message says why).
    """
    arguments.check_dtypes(OP, query, key=key, value=value)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{OP}: {name} has shape {tuple(tensor.shape)}, expected (total, heads, head_dim)")
    if key.shape[2] != query.shape[2]:
        raise ValueError(f"{OP}: key has head_dim {key.shape[2]}, expected {query.shape[2]}, the one of query")
    if value.shape[0] != key.shape[0]:
        raise ValueError(f"{OP}: value has {value.shape[0]} rows, expected {key.shape[0]}, as many as key")
    arguments.check_heads(OP, query.shape[1], key.shape[1], value.shape[1], grouped=True)
    options = arguments.options(
        OP, query.shape[2], scale=scale, is_causal=False, causal=causal, window=window, softcap=softcap,
        dropout_p=dropout_p,
    )  # fmt: skip
    arguments.cu_seqlens(OP, "cu_seqlens_q", cu_seqlens_q, query, query.shape[0], max_seqlen_q, "max_seqlen_q")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{OP}: cu_seqlens_k has shape {tuple(cu_seqlens_k.shape)}, expected {tuple(cu_seqlens_q.shape)}, the"
            " shape of cu_seqlens_q"
        )
    arguments.cu_seqlens(OP, "cu_seqlens_k", cu_seqlens_k, query, key.shape[0], max_seqlen_k, "max_seqlen_k")
    sequences = cu_seqlens_q.shape[0] - 1
    arguments.head_vector(OP, "alibi_slopes", alibi_slopes, query, query.shape[1], sequences)
    arguments.head_vector(OP, "sinks", sinks, query, query.shape[1], None)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    seed = _random.draw_seed(q.device) if options.dropout_p > 0.0 else None
    result = attend(
        OP, q, k, v, None, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options,
        return_lse, backend,
    )  # fmt: skip
    if return_lse:
        return result[0][0].transpose(0, 1), result[1][0]
    return result[0].transpose(0, 1)


def _public(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attention_varlen(query, key, value, *lengths, return_lse=True, **options)


_op.define_public(
    OP,
    "(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, *, float dropout_p=0.0, float? scale=None, str? causal=None, int[]? window=None,"
    " float softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, bool? deterministic=None)"
    " -> (Tensor out, Tensor lse)",
    _public,
)
