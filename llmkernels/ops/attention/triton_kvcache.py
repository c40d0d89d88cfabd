"""Attention to a cache in Triton: a program has a block of queries of all heads that share a key head, and a share of
the keys they see. The shares of one block are merged by a second kernel.

Row r of a block's queries is query r // group of member r % group: consecutive rows see nearly the same keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkernels._triton import cast, dot
from llmkernels.ops.attention.reference import empty_out
from llmkernels.ops.attention.triton_common import key_blocks, scores
from llmkernels.ops.attention.triton_fwd import joined, online_softmax, with_sink
from llmkernels.ops.attention.triton_launch import head_dims, numbers, open_window, rows, slopes_of, strides

KEYS_PER_SPLIT = 256  # at least: the merge reads a row of the values for each share
MAX_SPLITS = 64
MERGE_ROWS = 4


@triton.jit
def _cached(ptr, cols, table_ptr, pages, stride_batch, stride_row, count, DIM: tl.constexpr, PAD: tl.constexpr,
            PAGE: tl.constexpr):  # fmt: skip
    """[cols, PAD] of a cache, zero beyond `count` keys. Entries of a block table are clamped: nobody has looked."""
    dims = tl.arange(0, PAD)
    at = cols.to(tl.int64) * stride_row
    if PAGE > 0:
        page = tl.load(table_ptr + cols // PAGE, mask=cols < count, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)
        at = page * stride_batch + (cols % PAGE).to(tl.int64) * stride_row
    return tl.load(ptr + at[:, None] + dims[None, :], mask=(cols < count)[:, None] & (dims < DIM)[None, :], other=0.0)


_SIZES = ["q_blocks", "splits", "heads", "group", "queries", "keys", "pages", "window_left", "window_right"]


@triton.jit(do_not_specialize=_SIZES)
def _attention_kvcache_kernel(
    q_ptr,  # [B, H, S, D] T
    k_ptr,  # [B, Hk, T, D] T, or pages: [pages, Hk, PAGE, D]
    v_ptr,  # [B, Hk, T, DV] T, or pages
    slopes_ptr,  # [B, H], any float
    sinks_ptr,  # [H], any float
    lengths_ptr,  # [B] int32: keys of each sequence; None: `keys`
    table_ptr,  # [B, pages of a sequence] int32
    out_ptr,  # [B, H, S, DV] T; SPLIT: [splits, B, H, S, DV] fp32, without the divisor
    row_max_ptr,  # [B, H, S] fp32; SPLIT: of each share
    log_sum_ptr,  # [B, H, S] fp32; SPLIT: the sum of each share
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_split,
    out_batch,
    out_head,
    out_row,
    stat_split,
    slope_batch,
    table_row,
    q_blocks,
    splits,
    heads,
    group,
    queries,
    keys,
    pages,
    window_left,
    window_right,
    scale,
    softcap,
    softcap_inverse,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PAGE: tl.constexpr,  # keys of a page; 0: the cache is not paged
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    split = program % splits
    rest = program // splits
    block = rest % q_blocks
    key_head = ((rest // q_blocks) % (heads // group)).to(tl.int64)
    batch = (rest // q_blocks // (heads // group)).to(tl.int64)
    k_len = keys
    if lengths_ptr is not None:
        k_len = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), keys)
    shift = k_len - queries
    if TOP_LEFT:
        shift = 0
    lanes = block * BLOCK_M + tl.arange(0, BLOCK_M)
    used = lanes < group * queries
    row = lanes // group
    head = key_head * group + lanes % group
    dims = tl.arange(0, D_PAD)
    at = q_ptr + batch * q_batch + head * q_head + row.to(tl.int64) * q_row
    q = tl.load(at[:, None] + dims[None, :], mask=used[:, None] & (dims < D)[None, :], other=0.0)
    slope = tl.zeros([BLOCK_M], tl.float32)
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slope_batch + head, mask=used, other=0.0).to(tl.float32)
    k_ptr += key_head * k_head
    v_ptr += key_head * v_head
    if PAGE > 0:
        table_ptr += batch * table_row
    else:
        k_ptr += batch * k_batch
        v_ptr += batch * v_batch
    first_row = block * BLOCK_M // group
    last_row = (tl.minimum((block + 1) * BLOCK_M, group * queries) - 1) // group
    first, _, _, last = key_blocks(
        first_row, last_row - first_row + 1, shift, k_len, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    share = tl.cdiv(last - first, splits)
    first += split * share
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    for index in tl.range(first, tl.minimum(first + share, last), num_stages=STAGES):
        cols = index * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _cached(k_ptr, cols, table_ptr, pages, k_batch, k_row, k_len, D, D_PAD, PAGE)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        s, _capped = scores(products, 0, 0, row[:, None], cols[None, :], None, 0, slope[:, None], shift, queries, k_len,
                      window_left, window_right, scale, softcap, softcap_inverse,
                      0, slopes_ptr is not None, SOFTCAP, LEFT, RIGHT, True)  # fmt: skip
        weights, row_max, total, acc = online_softmax(s, row_max, total, acc)
        v = _cached(v_ptr, cols, table_ptr, pages, v_batch, v_row, k_len, DV, DV_PAD, PAGE)
        acc = dot(cast(weights, v.dtype), v, acc)
    stat = (batch * heads + head) * queries + row
    out_ptr += batch * out_batch
    if SPLIT:
        stat += split.to(tl.int64) * stat_split
        out_ptr += split.to(tl.int64) * out_split
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head, mask=used, other=0.0).to(tl.float32)
            row_max, total, acc = with_sink(row_max, total, acc, sink)
        total = tl.where(total == 0.0, 1.0, total)
        acc = acc / total[:, None]
        total = tl.log(total)
    dims = tl.arange(0, DV_PAD)
    at = out_ptr + head * out_head + row.to(tl.int64) * out_row
    seen = used[:, None] & (dims < DV)[None, :]
    tl.store(at[:, None] + dims[None, :], cast(acc, out_ptr.dtype.element_ty), mask=seen)
    tl.store(row_max_ptr + stat, row_max, mask=used)
    tl.store(log_sum_ptr + stat, total, mask=used)


@triton.jit(do_not_specialize=["splits", "heads", "queries", "stats"])
def _attention_merge_kernel(
    parts_ptr,  # [splits, B, H, S, DV] fp32
    tops_ptr,  # [splits, B, H, S] fp32
    totals_ptr,  # [splits, B, H, S] fp32
    sinks_ptr,  # [H]
    out_ptr,  # [B, H, S, DV] T
    row_max_ptr,  # [B, H, S] fp32
    log_sum_ptr,  # [B, H, S] fp32
    out_batch,
    out_head,
    out_row,
    splits,
    heads,
    queries,
    stats,  # B * H * S
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The shares in order, as the keys of one of them are taken in blocks."""
    at = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    used = at < stats
    dims = tl.arange(0, DV_PAD)
    seen = used[:, None] & (dims < DV)[None, :]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    part_at = at
    for _ in tl.range(0, splits):
        top = tl.load(tops_ptr + part_at, mask=used, other=float("-inf"))
        part_total = tl.load(totals_ptr + part_at, mask=used, other=0.0)
        part = tl.load(parts_ptr + part_at[:, None] * DV + dims[None, :], mask=seen, other=0.0)
        row_max, total, acc = joined(row_max, total, acc, top, part_total, part)
        part_at += stats
    head = (at // queries) % heads
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=used, other=0.0).to(tl.float32)
        row_max, total, acc = with_sink(row_max, total, acc, sink)
    total = tl.where(total == 0.0, 1.0, total)
    out = out_ptr + (at // queries // heads) * out_batch + head * out_head + (at % queries) * out_row
    tl.store(out[:, None] + dims[None, :], cast(acc / total[:, None], out_ptr.dtype.element_ty), mask=seen)
    tl.store(row_max_ptr + at, row_max, mask=used)
    tl.store(log_sum_ptr + at, tl.log(total), mask=used)


# (BLOCK_N, warps, stages) by the larger head dimension, padded to a power of two.
_TILES = {
    2: {64: (64, 4, 2), 128: (64, 4, 2), 256: (32, 4, 2), 512: (16, 4, 2)},
    4: {64: (32, 4, 2), 128: (16, 8, 1), 256: (16, 8, 1), 512: (16, 8, 1)},
}


def tiles(count: int, dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """(BLOCK_M, BLOCK_N, warps, stages) for `count` rows that share a key head."""
    block_n, warps, stages = _TILES[itemsize][max(dim, 64)]
    most = 32 if dim <= 128 and itemsize == 2 else 16
    return min(triton.next_power_of_2(max(count, 16)), most), block_n, warps, stages


def split_count(programs: int, keys: int, device: torch.device) -> int:
    """Shares of the keys: two programs for each multiprocessor, but no share below KEYS_PER_SPLIT."""
    wanted = 8
    if device.type == "cuda":
        wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(wanted, programs), keys // KEYS_PER_SPLIT, MAX_SPLITS))


def attention_kvcache_fwd(q, k_cache, v_cache, alibi_slopes, sinks, seqlens_k, block_table, scale, window_left,
                          window_right, top_left, softcap):  # fmt: skip
    out = empty_out(q, v_cache)
    row_max, log_sum = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    if row_max.numel() == 0:
        return out, row_max, log_sum
    q, k, v = rows(q), rows(k_cache), rows(v_cache)
    batch, heads, queries, _ = q.shape
    key_heads, page = k.shape[1], k.shape[2] if block_table is not None else 0
    keys = block_table.shape[1] * page if block_table is not None else k.shape[2]
    dims, group = head_dims(k, v), heads // key_heads
    block_m, block_n, warps, stages = tiles(group * queries, max(dims["D_PAD"], dims["DV_PAD"]), q.dtype.itemsize)
    q_blocks = triton.cdiv(group * queries, block_m)
    programs = batch * key_heads * q_blocks
    splits = split_count(programs, keys, q.device)
    sinks = None if sinks is None else sinks.contiguous()
    table = None if block_table is None else block_table.contiguous()
    if splits == 1:
        parts, tops, totals = out, row_max, log_sum
    else:
        parts, tops, totals = _shares(splits, out, row_max)
    with torch.cuda.device_of(q):
        _attention_kvcache_kernel[(programs * splits,)](
            q_ptr=q, k_ptr=k, v_ptr=v, sinks_ptr=sinks, table_ptr=table,
            lengths_ptr=None if seqlens_k is None else seqlens_k.contiguous(),
            out_ptr=parts, row_max_ptr=tops, log_sum_ptr=totals,
            **strides("q", q), **strides("k", k), **strides("v", v), **strides("out", parts[0] if splits > 1 else out),
            out_split=parts.stride(0), stat_split=row_max.numel(), table_row=0 if table is None else table.stride(0),
            **slopes_of(alibi_slopes), **open_window(window_left, window_right, queries + keys),
            **numbers(scale, softcap), **dims, TOP_LEFT=top_left, PAGE=page, SPLIT=splits > 1,
            q_blocks=q_blocks, splits=splits, heads=heads, group=group, queries=queries, keys=keys, pages=k.shape[0],
            BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _attention_merge_kernel[(triton.cdiv(row_max.numel(), MERGE_ROWS),)](
                parts_ptr=parts, tops_ptr=tops, totals_ptr=totals, sinks_ptr=sinks,
                out_ptr=out, row_max_ptr=row_max, log_sum_ptr=log_sum, **strides("out", out),
                splits=splits, heads=heads, queries=queries, stats=row_max.numel(),
                DV=dims["DV"], DV_PAD=dims["DV_PAD"], BLOCK_M=MERGE_ROWS, num_warps=4,
            )  # fmt: skip
    return out, row_max, log_sum


def _shares(splits: int, out: Tensor, row_max: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What each share has of out, of row_max and of the sum."""
    parts = row_max.new_empty((splits, *out.shape))
    return parts, *(row_max.new_empty((splits, *row_max.shape)) for _ in range(2))
