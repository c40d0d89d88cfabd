"""The forward of attention in Triton: a program has a block of queries of one head and runs over the keys they see.

The online softmax of FlashAttention-2 (Dao 2023, arXiv:2307.08691): largest score, sum and product of the keys so far.
Keys and values come by pointers or, from Hopper on, by descriptors: then one thread asks the hardware for a tile.
"""

import triton
import triton.language as tl

from llmkernels._triton import cast, dot, kept, load_block, wide
from llmkernels.ops.attention.triton_common import (
    edge_block,
    finite,
    first_stat,
    head_value,
    key_blocks,
    load_tile,
    place,
    scores,
    sequence,
    store_tile,
)  # fmt: skip


@triton.jit
def online_softmax(s, row_max, total, acc):
    """(weights without their divisor, row_max, total, acc) after a tile of scores; `acc` is still without the tile."""
    new_max = tl.maximum(row_max, tl.max(s, 1))
    top = finite(new_max)
    weights = tl.exp(s - top[:, None])
    decay = tl.exp(row_max - top)
    return weights, new_max, total * decay + tl.sum(weights, 1), acc * decay[:, None]


@triton.jit
def joined(row_max, total, acc, other_max, other_total, other_acc):
    """The three of the keys of both."""
    new_max = tl.maximum(row_max, other_max)
    decay = tl.exp(row_max - finite(new_max))
    other_decay = tl.exp(other_max - finite(new_max))
    acc = acc * decay[:, None] + other_acc * other_decay[:, None]
    return new_max, total * decay + other_total * other_decay, acc


@triton.jit
def with_sink(row_max, total, acc, sink):
    """The three after a score that has no value."""
    new_max = tl.maximum(row_max, sink)
    decay = tl.exp(row_max - finite(new_max))
    return new_max, total * decay + tl.exp(sink - finite(new_max)), acc * decay[:, None]


@triton.jit
def _step(block, q, k_ptr, v_ptr, k_desc, v_desc, batch, key_head, row_max, total, acc, first_row, numbers, mask_ptr,
          mask_row, slope, seed_ptr, threshold, k_row, v_row, shift, q_len, k_len, window_left, window_right, scale,
          softcap, softcap_inverse,
          D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
          MASK_COL: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
          EDGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(row_max, total, acc) after one block of keys."""
    first_col = block * BLOCK_N
    row_lanes = tl.arange(0, BLOCK_M)[:, None]
    col_lanes = tl.arange(0, BLOCK_N)[None, :]
    if k_desc is None:
        k = load_tile(k_ptr + wide(first_col) * k_row, k_len - first_col, k_row, BLOCK_N, D, D_PAD, EDGE)
    else:
        k = load_block(k_desc, batch, key_head, first_col, BLOCK_N, D_PAD)
    products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    s, _ = scores(products, first_row, first_col, row_lanes, col_lanes, mask_ptr, mask_row, slope, shift,
                  q_len, k_len, window_left, window_right, scale, softcap, softcap_inverse,
                  MASK_COL, ALIBI, SOFTCAP, LEFT, RIGHT, EDGE)  # fmt: skip
    weights, row_max, total, acc = online_softmax(s, row_max, total, acc)
    if seed_ptr is not None:
        weights = tl.where(kept(seed_ptr, numbers[:, None], first_col + col_lanes, threshold), weights, 0.0)
    if v_desc is None:
        v = load_tile(v_ptr + wide(first_col) * v_row, k_len - first_col, v_row, BLOCK_N, DV, DV_PAD, EDGE)
    else:
        v = load_block(v_desc, batch, key_head, first_col, BLOCK_N, DV_PAD)
    return row_max, total, dot(cast(weights, v.dtype), v, acc)


_SIZES = ["q_blocks", "heads", "group", "q_rows", "k_rows", "window_left", "window_right", "threshold"]


@triton.jit(do_not_specialize=_SIZES)
def _attention_fwd_kernel(
    q_ptr,  # [B, H, S, D] T
    k_ptr,  # [B, Hk, T, D] T
    v_ptr,  # [B, Hk, T, DV] T
    k_desc,  # descriptors of keys and values; None: tiles are read by pointers
    v_desc,
    mask_ptr,  # [B, H, S, T] T or fp32, added, or uint8
    slopes_ptr,  # [B, H], any float
    sinks_ptr,  # [H], any float
    seed_ptr,  # [] int64
    ends_q_ptr,  # [B + 1] int32: of packed sequences
    ends_k_ptr,  # [B + 1] int32
    out_ptr,  # [B, H, S, DV] T
    row_max_ptr,  # [B, H, S] fp32
    log_sum_ptr,  # [B, H, S] fp32
    q_batch,  # strides; the last dimension of all but the mask has 1
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    mask_batch,
    mask_head,
    mask_row,
    slope_batch,
    out_batch,
    out_head,
    out_row,
    q_blocks,
    heads,
    group,
    q_rows,
    k_rows,
    window_left,
    window_right,
    threshold,
    scale,
    softcap,
    softcap_inverse,
    keep_inverse,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    MASK_COL: tl.constexpr,  # the column stride of the mask: 1, or 0 where it is broadcast
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    block, head, batch = place(q_blocks, heads)
    if RIGHT:
        block = q_blocks - 1 - block  # the longest first
    start_q, q_len = sequence(ends_q_ptr, batch, q_rows)
    start_k, k_len = sequence(ends_k_ptr, batch, k_rows)
    first_row = block * BLOCK_M
    if first_row >= q_len:
        return
    shift = k_len - q_len
    if TOP_LEFT:
        shift = 0
    stat = first_stat(batch, head, heads, start_q, q_rows, ends_q_ptr) + first_row
    numbers = stat + tl.arange(0, BLOCK_M)
    slope = head_value(slopes_ptr, batch, slope_batch, head)
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
    key_head = head // group
    k_ptr += batch * k_batch + key_head * k_head + start_k * k_row
    v_ptr += batch * v_batch + key_head * v_head + start_k * v_row
    q_ptr += batch * q_batch + head * q_head + (start_q + first_row) * q_row
    q = load_tile(q_ptr, q_len - first_row, q_row, BLOCK_M, D, D_PAD, True)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    count = tl.minimum(BLOCK_M, q_len - first_row)
    first, first_whole, last_whole, last = key_blocks(
        first_row, count, shift, k_len, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    last_whole = tl.where(count == BLOCK_M, last_whole, first_whole)
    for index in tl.range(first_whole, last_whole, num_stages=STAGES):
        row_max, total, acc = _step(
            index, q, k_ptr, v_ptr, k_desc, v_desc, batch, key_head, row_max, total, acc, first_row, numbers, mask_ptr,
            mask_row, slope, seed_ptr, threshold, k_row, v_row, shift, q_len, k_len, window_left, window_right, scale,
            softcap, softcap_inverse, D, DV, D_PAD, DV_PAD, MASK_COL, slopes_ptr is not None, SOFTCAP, LEFT, RIGHT,
            False, BLOCK_M, BLOCK_N)  # fmt: skip
    for index in tl.range(0, (first_whole - first) + (last - last_whole), num_stages=STAGES):
        row_max, total, acc = _step(
            edge_block(index, first, first_whole, last_whole), q, k_ptr, v_ptr, k_desc, v_desc, batch, key_head,
            row_max, total, acc, first_row, numbers, mask_ptr, mask_row, slope, seed_ptr, threshold, k_row, v_row,
            shift, q_len, k_len, window_left, window_right, scale, softcap, softcap_inverse, D, DV, D_PAD, DV_PAD,
            MASK_COL, slopes_ptr is not None, SOFTCAP, LEFT, RIGHT, True, BLOCK_M, BLOCK_N)  # fmt: skip
    if sinks_ptr is not None:
        row_max, total, acc = with_sink(row_max, total, acc, head_value(sinks_ptr, batch, 0, head))
    total = tl.where(total == 0.0, 1.0, total)
    out = acc * (keep_inverse / total)[:, None]
    out_ptr += batch * out_batch + head * out_head + (start_q + first_row) * out_row
    store_tile(out_ptr, out, q_len - first_row, out_row, BLOCK_M, DV, DV_PAD)
    seen = tl.arange(0, BLOCK_M) < q_len - first_row
    tl.store(row_max_ptr + numbers, row_max, mask=seen)
    tl.store(log_sum_ptr + numbers, tl.log(total), mask=seen)
