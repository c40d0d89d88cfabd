"""attention_kvcache: queries against a cache of keys and values, contiguous or paged, and the append before it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import needs_grad, transform_active
from llmkernels.ops.attention import arguments
from llmkernels.ops.attention import rotary as rotary_embedding
from llmkernels.ops.attention.reference import Options

OP = "attention_kvcache"

# --- what the arguments must be -------------------------------------------------------------------------------------


# A step of decoding asks all of this at every layer: each shape is read once, and texts are made for errors alone.


def _expect(name: str, shape: tuple[int, ...], expected: tuple[int, ...], why: str) -> None:
    if shape != expected:
        raise ValueError(f"{OP}: {name} has shape {tuple(shape)}, expected {expected}, {why}")


def _check_tensors(query, k_cache, v_cache, k, v, block_table) -> None:
    if (k is None) != (v is None):
        given, missing = ("k", "v") if v is None else ("v", "k")
        raise ValueError(f"{OP}: {given} is given without {missing}, expected both or none")
    tensors = {"query": query, "k_cache": k_cache, "v_cache": v_cache}
    if k is not None:
        tensors["k"], tensors["v"] = k, v
    arguments.check_dtypes(OP, **tensors)
    shapes = [tensor.shape for tensor in tensors.values()]
    for name, shape in zip(tensors, shapes, strict=True):
        if len(shape) != 4:
            raise ValueError(f"{OP}: {name} has shape {tuple(shape)}, expected (batch, length, heads, head_dim)")
    (batch, _, heads, head_dim), keys, values = shapes[:3]
    rows, key_heads, value_dim = keys[0], keys[2], values[3]
    if keys[3] != head_dim:
        _expect("k_cache", keys, (*keys[:3], head_dim), "with the head_dim of query")
    if values[:3] != keys[:3]:
        _expect("v_cache", values, (*keys[:3], value_dim), "as k_cache but for the head_dim")
    arguments.check_heads(OP, heads, key_heads, values[2], grouped=True)
    if block_table is None:
        if rows != batch:
            _expect("k_cache", keys, (batch, *keys[1:]), "with the batch of query")
    else:
        arguments.check_tensor(OP, "block_table", block_table, query, torch.int32)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"{OP}: block_table has shape {tuple(block_table.shape)}, expected ({batch}, pages of a sequence)"
            )
    if k is not None:
        count = shapes[3][1]
        _expect("k", shapes[3], (batch, count, key_heads, head_dim), "what fits query and k_cache")
        _expect("v", shapes[4], (batch, count, key_heads, value_dim), "what fits k and v_cache")


def _check_lengths(cache_seqlens, query: Tensor, appended: int | None, capacity: int) -> list[int] | None:
    """The lengths before the append, if they can be looked at."""
    batch = query.shape[0]
    if cache_seqlens is None:
        if appended is not None:
            raise ValueError(f"{OP}: cache_seqlens is missing, expected the lengths at which k and v are appended")
        return [capacity] * batch
    if isinstance(cache_seqlens, Tensor):
        arguments.check_tensor(OP, "cache_seqlens", cache_seqlens, query, torch.int32)
        _expect("cache_seqlens", cache_seqlens.shape, (batch,), "one length for each sequence")
        if not arguments.values_are_checked(cache_seqlens):
            return None
        lengths = cache_seqlens.tolist()
    elif isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, int | torch.SymInt):
        raise TypeError(f"{OP}: cache_seqlens is {cache_seqlens!r}, expected an int or an int32 tensor")
    else:
        lengths = [cache_seqlens] * max(batch, 1)
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{OP}: cache_seqlens[{b}] is {length}, expected 0 or more")
        if length + (appended or 0) > capacity:
            new = "" if appended is None else f" and {appended} keys are appended"
            raise ValueError(f"{OP}: cache_seqlens[{b}] is {length}{new}, expected no more than {capacity}, the cache")
    return lengths


def _check_pages(block_table: Tensor, lengths: list[int] | None, appended: int, k_cache: Tensor) -> None:
    """Every page that a sequence uses is one of the cache; entries beyond may be anything."""
    if lengths is None or not arguments.values_are_checked(block_table):
        return
    pages, page_size = k_cache.shape[:2]
    for b, (row, length) in enumerate(zip(block_table.tolist(), lengths, strict=False)):
        used = -(-(length + appended) // page_size) if page_size else 0
        for at, page in enumerate(row[:used]):
            if not 0 <= page < pages:
                raise ValueError(f"{OP}: block_table[{b}, {at}] is {page}, expected a page between 0 and {pages - 1}")


# --- what is done ---------------------------------------------------------------------------------------------------


def _places(cache: Tensor, start: int | Tensor, count: int, block_table: Tensor | None) -> tuple:
    """The index of the rows start .. start + count of each sequence, `[B, count, heads, dim]`."""
    if not isinstance(start, Tensor):
        return slice(None), slice(start, start + count)
    rows = start[:, None] + torch.arange(count, device=cache.device)
    if block_table is None:
        return torch.arange(rows.shape[0], device=cache.device)[:, None], rows
    page_size = cache.shape[1]
    pages = block_table.gather(1, rows // page_size).long()
    # Nobody has looked at these on a GPU, and a negative index would count from the end.
    return torch.where(pages < 0, cache.shape[0], pages), rows % page_size


def attention_kvcache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    rotary: Sequence[Tensor | bool] | None = None,
    scale: float | None = None,
    causal: str | None = None,
    window: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to a cache of keys and values: decoding, and prefill in chunks. Forward only.

    Appends `k` and `v` in place first, if they are given; the caller adds S_new to his lengths afterwards. What the
    cache holds beyond the length of a sequence, NaN included, has no influence.

    Args:
        query: `[B, S, H, D]`, fp64, fp32, bf16 or fp16.
        k_cache, v_cache: `[B, T, Hk, D]` and `[B, T, Hk, Dv]`, the dtype of `query`; H is a multiple of Hk. With a
            `block_table` paged: `[pages, page_size, Hk, D]` and `[pages, page_size, Hk, Dv]`.
        k, v: `[B, S_new, Hk, D]` and `[B, S_new, Hk, Dv]`: written to the rows cache_seqlens + i of each sequence.
        cache_seqlens: one int, or int32 `[B]`: the keys of each sequence before the append. Default, without `k`: all
            that the cache has room for.
        block_table: int32 `[B, pages of a sequence]`: which page has the keys page_size * j and on of sequence b.
            Entries beyond its length are not looked at. Sequences may share pages, and with pages as long as the
            cache it is an index of the batch.
        rotary: (cos, sin) or (cos, sin, interleaved), cos and sin `[positions, R/2]`, floating: the new keys are
            turned as at position cache_seqlens + i before they are written, and the query as at cache_seqlens + i
            with `causal` or a `window`, at cache_seqlens without. Pairs are (j, j + R/2), interleaved (2j, 2j + 1).
        causal, window, alibi_slopes: as scaled_dot_product_attention's, for each sequence by its length after the
            append: "bottom_right" lets query i see the keys up to length - S + i. alibi_slopes `[H]` or `[B, H]`.
        scale, softcap, sinks, return_lse, backend: as scaled_dot_product_attention's.
    Returns: `[B, S, H, Dv]`, or (that, lse `[B, H, S]`).
    Raises, before anything is written: ValueError or TypeError, shapes, devices, dtypes or options disagree, an input
        requires a gradient, a length or page is out of range or the cache is too small (values are looked at on the
        CPU; on CUDA with LLMKERNELS_VALIDATE=1, else an append out of range is torch's device-side assertion);
        NoBackendError, a forced backend cannot run this call.
    Reference: flash_attn_with_kvcache of flash-attn (Dao 2023, arXiv:2307.08691); Kwon et al. 2023, arXiv:2309.06180
        (pages).
    """
    _check_tensors(query, k_cache, v_cache, k, v, block_table)
    options = arguments.options(
        OP, query.shape[3], scale=scale, is_causal=False, causal=causal, window=window, softcap=softcap, dropout_p=0.0
    )
    arguments.head_vector(OP, "alibi_slopes", alibi_slopes, query, query.shape[2], query.shape[0])
    arguments.head_vector(OP, "sinks", sinks, query, query.shape[2], None)
    appended = None if k is None else k.shape[1]
    capacity = k_cache.shape[1] if block_table is None else block_table.shape[1] * k_cache.shape[1]
    lengths = _check_lengths(cache_seqlens, query, appended, capacity)
    if block_table is not None:
        _check_pages(block_table, lengths, appended or 0, k_cache)
    ordered = causal is not None or (options.window_left, options.window_right) != (-1, -1)
    turned = query.shape[1] if ordered else 1  # how many positions the queries are at
    if rotary is not None:
        rotary_embedding.check(OP, rotary, query, k, turned, lengths)
    cos, sin = (None, None) if rotary is None else rotary[:2]
    _check_forward_only(query=query, k_cache=k_cache, v_cache=v_cache, k=k, v=v, cos=cos, sin=sin,
                        alibi_slopes=alibi_slopes, sinks=sinks)  # fmt: skip
    chosen = registry.pick(OP, (query, k_cache, v_cache, None, alibi_slopes, sinks), backend)

    start = capacity if cache_seqlens is None else cache_seqlens
    if block_table is not None and not isinstance(start, Tensor):
        start = torch.full((query.shape[0],), start, dtype=torch.int32, device=query.device)
    if rotary is not None:
        query, k = rotary_embedding.turn(query, k, rotary, start, turned, backend)
    if appended:
        aligned = block_table is None and lengths is not None and len(set(lengths)) == 1  # a slice, then
        places = _places(k_cache, lengths[0] if aligned else start, appended, block_table)
        k_cache[places] = k
        v_cache[places] = v
    length, seqlens = start + (appended or 0), None
    if isinstance(length, Tensor):
        seqlens = length
    elif cache_seqlens is not None:  # the same for all: the cache ends there
        k_cache, v_cache = k_cache[:, :length], v_cache[:, :length]
    out, row_max, log_sum = chosen.fwd(
        query.transpose(1, 2), k_cache.transpose(1, 2), v_cache.transpose(1, 2), alibi_slopes, sinks, seqlens,
        block_table, options.scale, options.window_left, options.window_right, options.top_left, options.softcap,
    )  # fmt: skip
    out = out.transpose(1, 2)
    return (out, row_max + log_sum) if return_lse else out


def attend(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, seqlens: Tensor | None,
           block_table: Tensor | None, options: Options, backend: str | None) -> Tensor:  # fmt: skip
    """attention_kvcache for a cache that knows its dtypes, shapes and lengths, of which nothing is checked again.

    Args:
        query: `[B, H, S, D]`; key, value: `[B, Hk, T, D]`, with a `block_table` `[pages, Hk, page_size, D]`.
        seqlens: int32 `[B]`, the keys of each sequence; None: all T.
    Returns: `[B, H, S, D]`.
    """
    _check_forward_only(query=query, sinks=sinks)
    chosen = registry.pick(OP, (query, key, value, None, None, sinks), backend)
    return chosen.fwd(
        query, key, value, None, sinks, seqlens, block_table,
        options.scale, options.window_left, options.window_right, options.top_left, options.softcap,
    )[0]  # fmt: skip


def _check_forward_only(**tensors: Tensor | None) -> None:
    if transform_active():
        raise ValueError(
            f"{OP}: a torch.func transform or forward-mode AD is active, expected none: it has no backward"
        )
    if needs_grad(*tensors.values()):
        name = next(name for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad)
        raise ValueError(f"{OP}: {name} requires a gradient, expected none that does: it has no backward (use no_grad)")


def _public(query, k_cache, v_cache, *, rotary_cos=None, rotary_sin=None, rotary_interleaved=False, **options):
    rotary = None if rotary_cos is None and rotary_sin is None else (rotary_cos, rotary_sin, rotary_interleaved)
    return attention_kvcache(query, k_cache, v_cache, rotary=rotary, return_lse=True, **options)


_op.define_public(
    OP,
    "(Tensor query, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor? k=None, Tensor? v=None,"
    " Tensor? cache_seqlens=None, Tensor? block_table=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None,"
    " bool rotary_interleaved=False, float? scale=None, str? causal=None, int[]? window=None, float softcap=0.0,"
    " Tensor? alibi_slopes=None, Tensor? sinks=None) -> (Tensor out, Tensor lse)",
    _public,
)
