"""Attention in plain PyTorch: the `torch` backend, and the maths written out.

Shapes: q `[B, H, S, D]`, k `[B, Hk, T, D]`, v `[B, Hk, T, Dv]`; query head h reads key head h // (H / Hk). For query i
and key j, with center(i) = i where the alignment is top-left and i + T - S where it is bottom-right:

    s = scale * q_i . k_j;  s = softcap * tanh(s / softcap) where softcap > 0
    s = s - alibi_slope * |center(i) - j| + mask      (an additive mask)
    s = -inf where a boolean mask is False, j < center(i) - window_left or j > center(i) + window_right
    m = max_j s, sink;  l = sum_j exp(s - m) + exp(sink - m);  p = exp(s - m) / l;  lse = m + log l
    out = sum_j keep * p / (1 - dropout_p) * v_j

A row without any key has m = -inf, log l = 0 and out = 0. `row_max` = m and `log_sum` = log l are kept apart, because
their sum loses log l where m is as large as finfo.min. A window entry of -1 is open; causal is window_right = 0.

With cu_seqlens the sequences are packed: q `[1, H, total_q, D]`, and sequence b has the rows from cu_seqlens_q[b] to
cu_seqlens_q[b + 1]. Dropout numbers a row (b * H + h) * S + i, packed h * total_q + the packed row; its column is j.

Vaswani et al. 2017, arXiv:1706.03762; Press, Smith, Lewis 2021, arXiv:2108.12409 (ALiBi); Xiao et al. 2023,
arXiv:2309.17453 (sinks); Gemma Team 2024, arXiv:2408.00118 (softcap).
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmkernels import _random
from llmkernels._dtypes import accumulate_dtype

CHUNK_ELEMENTS = 1 << 24  # of scores at a time: 64 MB in fp32


class Options(NamedTuple):
    """What the maths above calls scale, window, alignment, softcap and dropout_p."""

    scale: float
    window_left: int
    window_right: int
    top_left: bool
    softcap: float
    dropout_p: float


def _grouped(x: Tensor, heads: int) -> Tensor:
    """[B, H, ...] as [B, heads, H / heads, ...]."""
    return x.unflatten(1, (heads, x.shape[1] // max(heads, 1)))


def _shared(x: Tensor, y: Tensor) -> Tensor:
    """`x` [B, Hk, G, S, C] @ `y` [B, Hk, C, N]: heads that share `y` are rows of one product, so it is not copied."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _head_column(x: Tensor, heads: int) -> Tensor:
    """[H] or [B, H] as [B or 1, heads, H / heads, 1, 1]."""
    return _grouped(x if x.dim() == 2 else x[None], heads)[..., None, None]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One sequence, or the whole of an unpacked batch, in the type of the sums."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None
    queries: slice  # its rows of the packed queries
    keys: slice
    base: int  # dropout's number of its first row
    row_count: int  # and what each head adds to it

    @property
    def heads(self) -> int:
        return self.k.shape[1]

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first, count) of the queries whose scores are in memory at a time."""
        rows = self.q.shape[2]
        row_elements = self.q.shape[0] * self.q.shape[1] * self.k.shape[2]
        if rows * row_elements <= CHUNK_ELEMENTS:
            yield 0, rows  # without a loop over a range: a compiler would fix its length
            return
        step = max(1, CHUNK_ELEMENTS // row_elements)
        for first in range(0, rows, step):
            yield first, min(step, rows - first)

    def numbers(self, first: int, count: int) -> Tensor:
        """Dropout's numbers of the rows first .. first + count: [B, Hk, G, count, 1]."""
        batch, heads = self.q.shape[:2]
        head = torch.arange(batch * heads, device=self.q.device).view(batch, self.heads, heads // max(self.heads, 1))
        row = torch.arange(self.base + first, self.base + first + count, device=self.q.device)
        return head[..., None, None] * self.row_count + row[:, None]


def _parts(q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k) -> Iterator[_Part]:
    acc, row_count = accumulate_dtype(q.dtype), q.shape[2]
    q, k, v = q.to(acc), k.to(acc), v.to(acc)
    if cu_seqlens_q is None:
        yield _Part(q, k, v, alibi_slopes, slice(None), slice(None), 0, row_count)
        return
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(ends_q) - 1):
        queries, keys = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        yield _Part(q[:, :, queries], k[:, :, keys], v[:, :, keys], slopes, queries, keys, ends_q[b], row_count)


def _scores(part: _Part, mask: Tensor | None, options: Options, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(scores, the same before ALiBi and masks) of a chunk of queries: [B, Hk, G, count, T]."""
    queries, keys = part.q.shape[2], part.k.shape[2]
    q = _grouped(part.q[:, :, first : first + count], part.heads)
    capped = _shared(q, part.k.transpose(-1, -2)) * options.scale
    if options.softcap > 0.0:
        capped = options.softcap * torch.tanh(capped / options.softcap)
    scores = capped
    center = torch.arange(first, first + count, device=q.device)[:, None]
    if not options.top_left:
        center = center + (keys - queries)
    distance = torch.arange(keys, device=q.device) - center
    if part.alibi_slopes is not None:
        scores = scores - _head_column(part.alibi_slopes.to(scores.dtype), part.heads) * distance.abs()
    if mask is not None:
        mask = _mask_rows(mask, first, count)
        mask = _grouped(mask, part.heads if mask.shape[1] > 1 else 1)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if options.window_left >= 0:
        scores = scores.masked_fill(distance < -options.window_left, -torch.inf)
    if options.window_right >= 0:
        scores = scores.masked_fill(distance > options.window_right, -torch.inf)
    return scores, capped


def _mask_rows(mask: Tensor, first: int, count: int) -> Tensor:
    return mask if mask.shape[2] == 1 else mask[:, :, first : first + count]


def _finite(row_max: Tensor) -> Tensor:
    """What is subtracted of the scores: those of a row without keys stay -inf."""
    return torch.where(row_max == -torch.inf, 0.0, row_max)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, row_max, log_sum) of scores [B, Hk, G, count, T]; `sinks` [1, Hk, G, 1, 1]."""
    if scores.shape[-1] == 0:
        row_max = scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    else:
        row_max = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        row_max = torch.maximum(row_max, sinks.detach())
    weights = torch.exp(scores - _finite(row_max))
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - _finite(row_max))
    total = torch.where(total == 0.0, 1.0, total)
    return weights / total, row_max, torch.log(total)


def _dropped(values: Tensor, seed: Tensor | None, options: Options, numbers: Tensor) -> Tensor:
    """`values` of a chunk after dropout."""
    if seed is None:
        return values
    columns = torch.arange(values.shape[-1], device=values.device)
    keep = _random.keep(seed, numbers, columns, options.dropout_p)
    # With dropout_p = 1 nothing is kept, and there is nothing to scale.
    return torch.where(keep, values / max(1.0 - options.dropout_p, 1e-30), 0.0)


def _chunk(part: _Part, mask, sinks, seed, options: Options, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(out, row_max, log_sum) of a chunk of queries: [B, H, count, Dv] and twice [B, H, count]."""
    scores, _ = _scores(part, mask, options, first, count)
    sinks = None if sinks is None else _head_column(sinks.to(scores.dtype), part.heads)
    weights, row_max, log_sum = _softmax(scores, sinks)
    out = _shared(_dropped(weights, seed, options, part.numbers(first, count)), part.v)
    return out.flatten(1, 2), row_max[..., 0].flatten(1, 2), log_sum[..., 0].flatten(1, 2)


def attention(q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, options: Options):
    """The differentiable formula: (out, lse), `[B, H, S, Dv]` in the dtype of q and `[B, H, S]`."""
    found = [
        _chunk(part, mask, sinks, seed, options, first, count)
        for part in _parts(q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k)
        for first, count in part.chunks()
    ]
    out, row_max, log_sum = (torch.cat(results, 2) for results in zip(*found, strict=True))
    return out.to(q.dtype), row_max + log_sum


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """`[B, H, S, Dv]` laid out as [B, S, H, Dv]: what follows attention in a model joins the heads."""
    batch, heads, rows, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)


def attention_fwd(q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                  scale, window_left, window_right, top_left, softcap, dropout_p):  # fmt: skip
    """Returns (out, row_max, log_sum); the two are `[B, H, S]` in the type of the sums."""
    options = Options(scale, window_left, window_right, top_left, softcap, dropout_p)
    acc = accumulate_dtype(q.dtype)
    out = empty_out(q, v)
    row_max, log_sum = (q.new_empty(q.shape[:3], dtype=acc) for _ in range(2))
    for part in _parts(q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k):
        for first, count in part.chunks():
            results = _chunk(part, mask, sinks, seed, options, first, count)
            for whole, result in zip((out, row_max, log_sum), results, strict=True):
                whole[:, :, part.queries][:, :, first : first + count] = result
    return out, row_max, log_sum


def attention_bwd(dout, dlse, q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                  max_seqlen_k, out, row_max, log_sum, scale, window_left, window_right, top_left, softcap, dropout_p,
                  wanted):  # fmt: skip
    """Returns (dq, dk, dv, dmask, dsinks); what is not wanted is an empty tensor. `dlse` may be None."""
    options = Options(scale, window_left, window_right, top_left, softcap, dropout_p)
    acc = accumulate_dtype(q.dtype)
    leaves = (q, k, v, mask, sinks)
    grads = [torch.zeros_like(x, dtype=acc) if want else None for x, want in zip(leaves, wanted, strict=True)]
    dq, dk, dv, dmask, dsinks = grads
    for part in _parts(q, k, v, alibi_slopes, cu_seqlens_q, cu_seqlens_k):
        for first, count in part.chunks():
            rows = lambda x, part=part, first=first, count=count: _grouped(
                x[:, :, part.queries][:, :, first : first + count].to(acc), part.heads
            )
            scores, capped = _scores(part, mask, options, first, count)
            top, log_total = _finite(rows(row_max))[..., None], rows(log_sum)[..., None]
            weights = torch.exp((scores - top) - log_total)
            numbers = part.numbers(first, count)
            dweights = _dropped(_shared(rows(dout), part.v.transpose(-1, -2)), seed, options, numbers)
            delta = (weights * dweights).sum(-1, keepdim=True)
            if dlse is not None:
                delta = delta - rows(dlse)[..., None]
            dscores = weights * (dweights - delta)
            if dsinks is not None:
                sink_weights = torch.exp((_head_column(sinks.to(acc), part.heads) - top) - log_total)
                dsinks -= (sink_weights * delta).sum((0, 3, 4)).flatten()
            if dmask is not None:
                _mask_rows(dmask, first, count).add_(
                    dscores.flatten(1, 2).sum_to_size(_mask_rows(dmask, first, count).shape)
                )
            if softcap > 0.0:
                dscores = dscores * (1.0 - (capped / softcap).square())
            dscores = dscores * scale
            if dq is not None:
                dq[:, :, part.queries][:, :, first : first + count] = _shared(dscores, part.k).flatten(1, 2)
            if dk is not None:
                dk[:, :, part.keys] += dscores.flatten(2, 3).transpose(-1, -2) @ rows(q).flatten(2, 3)
            if dv is not None:
                kept = _dropped(weights, seed, options, numbers)
                dv[:, :, part.keys] += kept.flatten(2, 3).transpose(-1, -2) @ rows(dout).flatten(2, 3)
    return tuple(q.new_empty(0) if grad is None else grad.to(x.dtype) for x, grad in zip(leaves, grads, strict=True))


def cached_keys(cache: Tensor, b: int, length: int, block_table: Tensor | None) -> Tensor:
    """The first `length` rows of sequence `b` of a cache `[B, Hk, T, D]`, or paged `[pages, Hk, page_size, D]`."""
    if block_table is None:
        return cache[b : b + 1, :, :length]
    page_size = max(cache.shape[2], 1)  # of pages without room nobody has keys
    pages = cache[block_table[b, : -(-length // page_size)].long()]
    return pages.transpose(0, 1).flatten(1, 2)[None, :, :length]


def attention_kvcache_fwd(q, k_cache, v_cache, alibi_slopes, sinks, seqlens_k, block_table, scale, window_left,
                          window_right, top_left, softcap):  # fmt: skip
    """Returns (out, row_max, log_sum) as attention_fwd does, for sequences of `seqlens_k` keys each."""
    options = Options(scale, window_left, window_right, top_left, softcap, 0.0)
    acc = accumulate_dtype(q.dtype)
    out = empty_out(q, v_cache)
    row_max, log_sum = (q.new_empty(q.shape[:3], dtype=acc) for _ in range(2))
    lengths = [k_cache.shape[2]] * q.shape[0] if seqlens_k is None else seqlens_k.tolist()
    for b, length in enumerate(lengths):
        slopes = alibi_slopes[b] if alibi_slopes is not None and alibi_slopes.dim() == 2 else alibi_slopes
        k, v = (cached_keys(cache, b, length, block_table).to(acc) for cache in (k_cache, v_cache))
        part = _Part(q[b : b + 1].to(acc), k, v, slopes, slice(None), slice(None), 0, q.shape[2])
        for first, count in part.chunks():
            results = _chunk(part, None, sinks, None, options, first, count)
            for whole, result in zip((out, row_max, log_sum), results, strict=True):
                whole[b : b + 1, :, first : first + count] = result
    return out, row_max, log_sum
