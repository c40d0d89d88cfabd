"""The backward of attention in Triton: delta, then dq by blocks of queries. triton_dkv.py has dk and dv by blocks of
keys, triton_dmask.py dmask by blocks of the mask. Scores are computed again in each; every sum has a fixed order.
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
    load_stats,
    load_tile,
    place,
    scores,
    sequence,
    store_tile,
)


@triton.jit(do_not_specialize=["q_blocks", "heads", "rows_of_head"])
def _attention_delta_kernel(
    dout_ptr,  # [B, H, S, DV] T
    out_ptr,  # [B, H, S, DV] T
    dlse_ptr,  # [B, H, S] fp32
    delta_ptr,  # [B, H, S] fp32: dout . out - dlse
    dout_batch,
    dout_head,
    dout_row,
    out_batch,
    out_head,
    out_row,
    q_blocks,
    heads,
    rows_of_head,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    block, head, batch = place(q_blocks, heads)
    first_row = block * BLOCK_M
    dout_ptr += batch * dout_batch + head * dout_head + wide(first_row) * dout_row
    out_ptr += batch * out_batch + head * out_head + wide(first_row) * out_row
    dout = load_tile(dout_ptr, rows_of_head - first_row, dout_row, BLOCK_M, DV, DV_PAD, True)
    out = load_tile(out_ptr, rows_of_head - first_row, out_row, BLOCK_M, DV, DV_PAD, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    rows = first_row + tl.arange(0, BLOCK_M)
    at = (batch * heads + head) * rows_of_head + rows
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=rows < rows_of_head, other=0.0)
    tl.store(delta_ptr + at, delta, mask=rows < rows_of_head)


@triton.jit
def gradients(products, dweights, first_row, first_col, row_lanes, col_lanes, top, log_sum, delta, numbers, mask_ptr,
              mask_row, slope, seed_ptr, threshold, shift, q_len, k_len, window_left, window_right, scale,
              softcap, softcap_inverse, keep_inverse,
              MASK_COL: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr,
              RIGHT: tl.constexpr,
              EDGE: tl.constexpr):  # fmt: skip
    """(weights after dropout, gradient of the scores, the same of the products but for `scale`) of a tile, from
    q @ k^T and dout @ v^T; or all of them transposed."""
    s, capped = scores(products, first_row, first_col, row_lanes, col_lanes, mask_ptr, mask_row, slope,
                       shift, q_len, k_len, window_left, window_right, scale, softcap, softcap_inverse,
                       MASK_COL, ALIBI, SOFTCAP, LEFT, RIGHT, EDGE)  # fmt: skip
    weights = tl.exp((s - top) - log_sum)
    used = weights
    if seed_ptr is not None:
        keep = kept(seed_ptr, numbers, first_col + col_lanes, threshold)
        used = tl.where(keep, weights * keep_inverse, 0.0)
        dweights = tl.where(keep, dweights * keep_inverse, 0.0)
    dscores = weights * (dweights - delta)
    dproducts = dscores
    if SOFTCAP:
        dproducts = dscores * (1.0 - capped * capped)
    return used, dscores, dproducts


@triton.jit
def _dq_step(block, q, dout, k_ptr, v_ptr, k_desc, v_desc, batch, key_head, dq, first_row, top, log_sum, delta, numbers,
             mask_ptr, mask_row, slope, seed_ptr, threshold, k_row, v_row, shift, q_len, k_len, window_left,
             window_right, scale, softcap, softcap_inverse, keep_inverse,
             D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
             MASK_COL: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr,
             RIGHT: tl.constexpr,
             EDGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dq, without its factor `scale`, after one block of keys."""
    first_col = block * BLOCK_N
    if k_desc is None:
        k = load_tile(k_ptr + wide(first_col) * k_row, k_len - first_col, k_row, BLOCK_N, D, D_PAD, EDGE)
    else:
        k = load_block(k_desc, batch, key_head, first_col, BLOCK_N, D_PAD)
    if v_desc is None:
        v = load_tile(v_ptr + wide(first_col) * v_row, k_len - first_col, v_row, BLOCK_N, DV, DV_PAD, EDGE)
    else:
        v = load_block(v_desc, batch, key_head, first_col, BLOCK_N, DV_PAD)
    products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    dweights = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    _, _, dproducts = gradients(
        products, dweights, first_row, first_col, tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :],
        top[:, None], log_sum[:, None], delta[:, None], numbers[:, None], mask_ptr, mask_row, slope,
        seed_ptr, threshold, shift, q_len, k_len, window_left, window_right, scale, softcap, softcap_inverse,
        keep_inverse, MASK_COL, ALIBI, SOFTCAP, LEFT, RIGHT, EDGE)  # fmt: skip
    return dot(cast(dproducts, k.dtype), k, dq)


_SIZES = ["blocks", "heads", "group", "q_rows", "k_rows", "window_left", "window_right", "threshold"]


@triton.jit(do_not_specialize=_SIZES)
def _attention_dq_kernel(
    q_ptr,  # [B, H, S, D] T; for all of these see triton_fwd.py
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    ends_q_ptr,
    ends_k_ptr,
    dout_ptr,  # [B, H, S, DV] T
    row_max_ptr,  # [B, H, S] fp32
    log_sum_ptr,  # [B, H, S] fp32
    delta_ptr,  # [B, H, S] fp32
    dq_ptr,  # [B, H, S, D] T
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
    dq_batch,
    dq_head,
    dq_row,
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
    """A program has a block of queries of one head, as in the forward."""
    block, head, batch = place(blocks, heads)
    if RIGHT:
        block = blocks - 1 - block
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
    dout_ptr += batch * dout_batch + head * dout_head + (start_q + first_row) * dout_row
    q = load_tile(q_ptr, q_len - first_row, q_row, BLOCK_M, D, D_PAD, True)
    dout = load_tile(dout_ptr, q_len - first_row, dout_row, BLOCK_M, DV, DV_PAD, True)
    top = finite(load_stats(row_max_ptr + stat, q_len - first_row, BLOCK_M, True))
    log_sum = load_stats(log_sum_ptr + stat, q_len - first_row, BLOCK_M, True)
    delta = load_stats(delta_ptr + stat, q_len - first_row, BLOCK_M, True)
    dq = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    count = tl.minimum(BLOCK_M, q_len - first_row)
    first, first_whole, last_whole, last = key_blocks(
        first_row, count, shift, k_len, window_left, window_right, LEFT, RIGHT, BLOCK_N
    )
    last_whole = tl.where(count == BLOCK_M, last_whole, first_whole)
    for index in tl.range(first_whole, last_whole, num_stages=STAGES):
        dq = _dq_step(
            index, q, dout, k_ptr, v_ptr, k_desc, v_desc, batch, key_head, dq, first_row, top, log_sum, delta, numbers,
            mask_ptr, mask_row, slope, seed_ptr, threshold, k_row, v_row, shift, q_len, k_len, window_left,
            window_right, scale, softcap, softcap_inverse, keep_inverse, D, DV, D_PAD, DV_PAD, MASK_COL,
            slopes_ptr is not None, SOFTCAP, LEFT, RIGHT, False, BLOCK_M, BLOCK_N)  # fmt: skip
    for index in tl.range(0, (first_whole - first) + (last - last_whole), num_stages=STAGES):
        dq = _dq_step(
            edge_block(index, first, first_whole, last_whole), q, dout, k_ptr, v_ptr, k_desc, v_desc, batch, key_head,
            dq, first_row, top, log_sum, delta, numbers, mask_ptr, mask_row, slope, seed_ptr, threshold, k_row, v_row,
            shift, q_len, k_len, window_left, window_right, scale, softcap, softcap_inverse, keep_inverse, D, DV,
            D_PAD, DV_PAD, MASK_COL, slopes_ptr is not None, SOFTCAP, LEFT, RIGHT, True, BLOCK_M,
            BLOCK_N)  # fmt: skip
    dq_ptr += batch * dq_batch + head * dq_head + (start_q + first_row) * dq_row
    store_tile(dq_ptr, dq * scale, q_len - first_row, dq_row, BLOCK_M, D, D_PAD)
