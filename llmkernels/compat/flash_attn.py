"""flash-attn 2's functions, with its signatures and meaning, on every backend.

    from llmkernels.compat.flash_attn import flash_attn_func  # was: from flash_attn import flash_attn_func

Tensors are `[B, S, H, D]`, packed `[total, H, D]`. causal, window_size and alibi_slopes align bottom-right: query i of
S is at key i + T - S. The heads of q are a multiple of those of k and v. What is more than in flash-attn: fp32, fp64,
any head dim, a head dim of v of its own, CPU tensors, a gradient of softmax_lse, double backward. What differs:

- a query without keys has an lse of -inf (flash-attn: +inf), and out = 0 as there;
- with alibi_slopes and causal, lse is that of the bias as documented (flash-attn's has another constant in each row);
- dropout draws its seed from torch's generator, and drops other elements than flash-attn;
- S_dmask, the third result with return_attn_probs, is None: the weights are never in memory;
- deterministic is accepted and always so; num_splits is checked, and each backend splits the keys as it does.

Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
"""

from collections.abc import Sequence

from torch import Tensor

from llmkernels.compat._paging import check_rows, expect, gathered, shifted
from llmkernels.ops.attention.kvcache import attention_kvcache
from llmkernels.ops.attention.sdpa import scaled_dot_product_attention
from llmkernels.ops.attention.varlen import attention_varlen

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Result = Tensor | tuple[Tensor, Tensor, None]


def _options(softmax_scale, causal, window_size, softcap, alibi_slopes) -> dict:
    """What all the functions of llmkernels have, from flash-attn's words. There softcap <= 0 is off."""
    return {
        "scale": softmax_scale,
        "causal": "bottom_right" if causal else None,
        "window": tuple(window_size),
        "softcap": max(softcap, 0.0),
        "alibi_slopes": alibi_slopes,
    }


def _batched(op, q, k, v, dropout_p, options, deterministic, return_attn_probs) -> Result:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect(op, name, tensor, "(batch, seqlen, nheads, headdim)")
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(f"{op}: {name} has a batch of {tensor.shape[0]}, expected {q.shape[0]}, the one of q")
    result = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), dropout_p=dropout_p, enable_gqa=True, return_lse=return_attn_probs,
        deterministic=deterministic, **options,
    )  # fmt: skip
    return (result[0].transpose(1, 2), result[1], None) if return_attn_probs else result.transpose(1, 2)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention, as flash_attn.flash_attn_func.

    Args:
        q, k, v: `[B, S, H, D]`, `[B, T, Hk, D]`, `[B, T, Hk, Dv]`; fp64, fp32, bf16 or fp16.
        dropout_p: drawn whenever it is not 0. softmax_scale: default 1 / sqrt(D).
        causal, window_size: query i sees up to key i + T - S; left and right of there, -1 being open.
        softcap: 0 or less is off. alibi_slopes: `[H]` or `[B, H]`.
        deterministic: always so. return_attn_probs: also return (softmax_lse `[B, H, S]`, None).
    Returns: `[B, S, H, Dv]`, or (that, softmax_lse, None).
    Raises: as scaled_dot_product_attention.
    """
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _batched("flash_attn_func", q, k, v, dropout_p, options, deterministic, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func with k and v in one tensor `[B, T, 2, Hk, D]`, which has one gradient."""
    op = "flash_attn_kvpacked_func"
    expect(op, "kv", kv, "(batch, seqlen, 2, nheads, headdim)", 2, 2)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _batched(op, q, *kv.unbind(2), dropout_p, options, deterministic, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_func with q, k and v in one tensor `[B, S, 3, H, D]`, which has one gradient."""
    op = "flash_attn_qkvpacked_func"
    expect(op, "qkv", qkv, "(batch, seqlen, 3, nheads, headdim)", 2, 3)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _batched(op, *qkv.unbind(2), dropout_p, options, deterministic, return_attn_probs)


# --- packed sequences -----------------------------------------------------------------------------------------------


def _varlen(op, q, k, v, lengths, dropout_p, options, deterministic, return_attn_probs) -> Result:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect(op, name, tensor, "(total, nheads, headdim)")
    result = attention_varlen(
        q, k, v, *lengths, dropout_p=dropout_p, return_lse=return_attn_probs, deterministic=deterministic, **options
    )
    return (*result, None) if return_attn_probs else result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention within packed sequences, as flash_attn.flash_attn_varlen_func.

    Args:
        q, k, v: `[total_q, H, D]`, `[total_k, Hk, D]`, `[total_k, Hk, Dv]`.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: as attention_varlen's.
        block_table: int32 `[sequences, pages of a sequence]`: k and v are paged, `[pages, page_size, Hk, D]`. They are
            gathered first, which waits for a GPU to know how many keys there are, and have gradients.
        Other arguments as flash_attn_func's; alibi_slopes `[H]` or `[sequences, H]`.
    Returns: `[total_q, H, Dv]`, or (that, softmax_lse `[H, total_q]`, None).
    Raises: as attention_varlen.
    """
    op = "flash_attn_varlen_func"
    if block_table is not None:
        k, v = gathered(op, q, k, v, cu_seqlens_k, max_seqlen_k, block_table)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _varlen(op, q, k, v, lengths, dropout_p, options, deterministic, return_attn_probs)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func with k and v in one tensor `[total_k, 2, Hk, D]`, which has one gradient."""
    op = "flash_attn_varlen_kvpacked_func"
    expect(op, "kv", kv, "(total, 2, nheads, headdim)", 1, 2)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _varlen(op, q, *kv.unbind(1), lengths, dropout_p, options, deterministic, return_attn_probs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """flash_attn_varlen_func with q, k and v in one tensor `[total, 3, H, D]`, which has one gradient."""
    op = "flash_attn_varlen_qkvpacked_func"
    expect(op, "qkv", qkv, "(total, 3, nheads, headdim)", 1, 3)
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    return _varlen(op, *qkv.unbind(1), lengths, dropout_p, options, deterministic, return_attn_probs)


# --- a cache --------------------------------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache, after an append in place, as flash_attn.flash_attn_with_kvcache. Forward only.

    Args:
        q: `[B, S, H, D]`.
        k_cache, v_cache: `[B or more, T, Hk, D]`, or with a `block_table` `[pages, page_size, Hk, D]`, any size.
        k, v: `[B, S_new, Hk, D]`: written to the rows cache_seqlens + i of each sequence.
        rotary_cos, rotary_sin: `[positions, R/2]`: turn k, and q, by their rows of the cache (rotary_interleaved:
            pairs (2j, 2j + 1), else (j, j + R/2)); q by cache_seqlens alone where neither causal nor windowed.
        cache_seqlens: an int or int32 `[B]`; default, without k: all rows.
        cache_batch_idx: int32 `[B]`: sequence b is in this row of the cache. Not with a block_table.
        cache_leftpad: int32 `[B]`: the first row of each sequence; cache_seqlens counts the rows before it too. Not
            with a block_table; the cache's batch and length must be contiguous.
        num_splits: 0 to 128, a hint that has no influence.
        Other arguments as flash_attn_func's.
    Returns: `[B, S, H, D]`, or (that, softmax_lse `[B, H, S]`).
    Raises, before anything is written: as attention_kvcache.
    """
    op = "flash_attn_with_kvcache"
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        expect(op, name, tensor, "(batch, seqlen, nheads, headdim)")
    if not 0 <= num_splits <= 128:
        raise ValueError(f"{op}: num_splits is {num_splits}, expected 0 (as the backend likes) to 128")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{op}: one of rotary_cos and rotary_sin is given, expected both or none")
    turning = None if rotary_cos is None else (rotary_cos, rotary_sin, rotary_interleaved)
    options = _options(softmax_scale, causal, window_size, softcap, alibi_slopes)
    if block_table is not None:
        for name, tensor in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
            if tensor is not None:
                raise ValueError(f"{op}: {name} is given with a block_table, expected one of them")
    elif cache_leftpad is not None:
        q, k, k_cache, v_cache, cache_seqlens, block_table = shifted(
            op, q, k, k_cache, v_cache, turning, cache_seqlens, cache_batch_idx, cache_leftpad, options
        )
        turning = None
    elif cache_batch_idx is not None:
        check_rows(op, "cache_batch_idx", cache_batch_idx, q, k_cache.shape[0] - 1)
        block_table = cache_batch_idx[:, None]  # pages as long as the cache
    else:
        k_cache, v_cache = k_cache[: q.shape[0]], v_cache[: q.shape[0]]
    return attention_kvcache(
        q, k_cache, v_cache, k=k, v=v, cache_seqlens=cache_seqlens, block_table=block_table, rotary=turning,
        return_lse=return_softmax_lse, **options,
    )  # fmt: skip
