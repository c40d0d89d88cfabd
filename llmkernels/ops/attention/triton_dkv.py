"""The gradients of keys and values in Triton: a program has a block of keys and runs over the queries that see it."""

import triton
import triton.language as tl

from llmkernels._triton import cast, dot, load_block, wide
from llmkernels.ops.attention.triton_bwd import gradients
from llmkernels.ops.attention.triton_common import (
    finite,
    first_stat,
    head_value,
    load_stats,
    load_tile,
    place,
    query_blocks,
    sequence,
    store_tile,
)

_SIZES = ["blocks", "heads", "group", "q_rows", "k_rows", "window_left", "window_right", "threshold"]


@triton.jit
def _step(block, k, v, q_ptr, dout_ptr, q_desc, dout_desc, batch, head, dk, dv, first_col, row_max_ptr, log_sum_ptr,
          delta_ptr, stat, mask_ptr, mask_row, slope, seed_ptr, threshold, q_row, dout_row, shift, q_len, k_len,
          window_left, window_right, scale, softcap, softcap_inverse, keep_inverse,
          D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, MASK_COL: tl.constexpr,
          ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """(dk without its factor `scale`, dv) after one block of queries. All tiles are transposed, so that the weights
    are the first operand of the next product as they stand in registers."""
    first_row = block * BLOCK_M
    count = q_len - first_row
    if q_desc is None:
        q = load_tile(q_ptr + wide(first_row) * q_row, count, q_row, BLOCK_M, D, D_PAD, True)
    else:
        q = load_block(q_desc, batch, head, first_row, BLOCK_M, D_PAD)
    if dout_desc is None:
        dout = load_tile(dout_ptr + wide(first_row) * dout_row, count, dout_row, BLOCK_M, DV, DV_PAD, True)
    else:
        dout = load_block(dout_desc, batch, head, first_row, BLOCK_M, DV_PAD)
    stat += first_row
    top = finite(load_stats(row_max_ptr + stat, count, BLOCK_M, True))
    log_sum = load_stats(log_sum_ptr + stat, count, BLOCK_M, True)
    delta = load_stats(delta_ptr + stat, count, BLOCK_M, True)
    row_lanes = tl.arange(0, BLOCK_M)[None, :]
    products = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    dweights = dot(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
    used, _, dproducts = gradients(
        products, dweights, first_row, first_col, row_lanes, tl.arange(0, BLOCK_N)[:, None], top[None, :],
        log_sum[None, :], delta[None, :], stat + row_lanes, mask_ptr, mask_row, slope, seed_ptr, threshold,
        shift, q_len, k_len, window_left, window_right, scale, softcap, softcap_inverse, keep_inverse,
        MASK_COL, ALIBI, SOFTCAP, LEFT, RIGHT, True)  # fmt: skip
    dv = dot(cast(used, dout.dtype), dout, dv)
    return dot(cast(dproducts, q.dtype), q, dk), dv


@triton.jit(do_not_specialize=_SIZES)
def _attention_dkv_kernel(
    q_ptr,  # [B, H, S, D] T; for all of these see triton_fwd.py
    k_ptr,
    v_ptr,
    q_desc,  # descriptors of q and dout; None: tiles are read by pointers
    dout_desc,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    ends_q_ptr,
    ends_k_ptr,
    dout_ptr,  # [B, H, S, DV] T
    row_max_ptr,  # [B, H, S] fp32
    log_sum_ptr,  # [B, H, S] fp32
    delta_ptr,  # [B, H, S] fp32
    dk_ptr,  # [B, Hk, T, D] T; None: not wanted
    dv_ptr,  # [B, Hk, T, DV] T; None: not wanted
    q_batch,
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
    dout_batch,
    dout_head,
    dout_row,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    blocks,
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
    MASK_COL: tl.constexpr,
    TOP_LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A program has a block of keys of one key head, and runs over its query heads and their queries."""
    block, key_head, batch = place(blocks, heads // group)
    start_q, q_len = sequence(ends_q_ptr, batch, q_rows)
    start_k, k_len = sequence(ends_k_ptr, batch, k_rows)
    first_col = block * BLOCK_N
    if first_col >= k_len:
        return
    shift = k_len - q_len
    if TOP_LEFT:
        shift = 0
    k_ptr += batch * k_batch + key_head * k_head + (start_k + first_col) * k_row
    v_ptr += batch * v_batch + key_head * v_head + (start_k + first_col) * v_row
    k = load_tile(k_ptr, k_len - first_col, k_row, BLOCK_N, D, D_PAD, True)
    v = load_tile(v_ptr, k_len - first_col, v_row, BLOCK_N, DV, DV_PAD, True)
    dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
    dv = tl.zeros([BLOCK_N, DV_PAD], tl.float32)
    count = tl.minimum(BLOCK_N, k_len - first_col)
    first, _, _, last = query_blocks(first_col, count, shift, q_len, window_left, window_right, LEFT, RIGHT, BLOCK_M)
    # One loop and one kind of step: what a second of either keeps in registers would be spilled.
    for index in tl.range(0, group * (last - first), num_stages=STAGES):
        head = key_head * group + index // (last - first)
        block = first + index % (last - first)
        head_mask = mask_ptr
        if mask_ptr is not None:
            head_mask = mask_ptr + batch * mask_batch + head * mask_head
        dk, dv = _step(
            block, k, v, q_ptr + batch * q_batch + head * q_head + start_q * q_row,
            dout_ptr + batch * dout_batch + head * dout_head + start_q * dout_row, q_desc, dout_desc, batch, head,
            dk, dv, first_col, row_max_ptr, log_sum_ptr, delta_ptr,
            first_stat(batch, head, heads, start_q, q_rows, ends_q_ptr), head_mask, mask_row,
            head_value(slopes_ptr, batch, slope_batch, head), seed_ptr, threshold, q_row, dout_row, shift, q_len,
            k_len, window_left, window_right, scale, softcap, softcap_inverse, keep_inverse, D, DV, D_PAD, DV_PAD,
            MASK_COL, slopes_ptr is not None, SOFTCAP, LEFT, RIGHT, BLOCK_M, BLOCK_N)  # fmt: skip
    if dk_ptr is not None:
        dk_ptr += batch * dk_batch + key_head * dk_head + (start_k + first_col) * dk_row
        store_tile(dk_ptr, dk * scale, k_len - first_col, dk_row, BLOCK_N, D, D_PAD)
    if dv_ptr is not None:
        dv_ptr += batch * dv_batch + key_head * dv_head + (start_k + first_col) * dv_row
        store_tile(dv_ptr, dv, k_len - first_col, dv_row, BLOCK_N, DV, DV_PAD)
