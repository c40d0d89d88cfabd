"""The gradient of an additive mask in Triton: a program has a tile of the mask and sums over what the mask broadcasts.

It runs over the batch entries, heads, queries and keys of its tile in order, and adds their tiles element by element.
"""

import triton
import triton.language as tl

from llmkernels._triton import cast, dot, wide
from llmkernels.ops.attention.triton_bwd import gradients
from llmkernels.ops.attention.triton_common import (
    finite,
    first_stat,
    head_value,
    key_blocks,
    load_stats,
    load_tile,
    query_blocks,
)  # fmt: skip


@triton.jit
def _tile(first_row, first_col, q_ptr, k_ptr, v_ptr, dout_ptr, row_max_ptr, log_sum_ptr, delta_ptr, stat, mask_ptr,
          mask_row, slope, seed_ptr, threshold, q_row, k_row, v_row, dout_row, shift, q_len, k_len, window_left,
          window_right, scale, softcap, softcap_inverse, keep_inverse,
          D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, MASK_COL: tl.constexpr,
          ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The gradient of the scores of a tile; `q_ptr`, `dout_ptr` and `stat` are at its first row."""
    count = q_len - first_row
    q = load_tile(q_ptr, count, q_row, BLOCK_M, D, D_PAD, True)
    k = load_tile(k_ptr + wide(first_col) * k_row, k_len - first_col, k_row, BLOCK_N, D, D_PAD, True)
    products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    dout = load_tile(dout_ptr, count, dout_row, BLOCK_M, DV, DV_PAD, True)
    v = load_tile(v_ptr + wide(first_col) * v_row, k_len - first_col, v_row, BLOCK_N, DV, DV_PAD, True)
    dweights = dot(dout, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
    top = finite(load_stats(row_max_ptr + stat, count, BLOCK_M, True))
    log_sum = load_stats(log_sum_ptr + stat, count, BLOCK_M, True)
    delta = load_stats(delta_ptr + stat, count, BLOCK_M, True)
    row_lanes = tl.arange(0, BLOCK_M)[:, None]
    _, dscores, _ = gradients(
        products, dweights, first_row, first_col, row_lanes, tl.arange(0, BLOCK_N)[None, :], top[:, None],
        log_sum[:, None], delta[:, None], stat + row_lanes, mask_ptr, mask_row, slope, seed_ptr, threshold, shift,
        q_len, k_len, window_left, window_right, scale, softcap, softcap_inverse, keep_inverse,
        MASK_COL, ALIBI, SOFTCAP, LEFT, RIGHT, True)  # fmt: skip
    return dscores


_SIZES = ["row_tiles", "col_tiles", "head_tiles", "sum_batches", "sum_heads", "heads", "group", "q_rows", "k_rows"]
_SIZES += ["window_left", "window_right", "threshold"]


@triton.jit(do_not_specialize=_SIZES)
def _attention_dmask_kernel(
    q_ptr,  # [B, H, S, D] T; for all of these see triton_fwd.py
    k_ptr,
    v_ptr,
    mask_ptr,
    slopes_ptr,
    seed_ptr,
    dout_ptr,  # [B, H, S, DV] T
    row_max_ptr,  # [B, H, S] fp32
    log_sum_ptr,  # [B, H, S] fp32
    delta_ptr,  # [B, H, S] fp32
    dmask_ptr,  # the shape of the mask, and its type
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
    dmask_batch,
    dmask_head,
    dmask_row,
    dmask_col,
    row_tiles,  # of the mask: 1 where it broadcasts
    col_tiles,
    head_tiles,
    sum_batches,  # how many share an element of the mask
    sum_heads,
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
    SUM_ROWS: tl.constexpr,
    SUM_COLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    col_tile = program % col_tiles
    row_tile = (program // col_tiles) % row_tiles
    rest = program // col_tiles // row_tiles
    first_head = rest % head_tiles  # a tile stands for all heads or for one, and so for the batch
    first_batch = rest // head_tiles
    shift = k_rows - q_rows
    if TOP_LEFT:
        shift = 0
    row_block = row_tile
    col_block = col_tile
    row_blocks = 1
    col_blocks = 1
    if SUM_ROWS and SUM_COLS:
        row_blocks = tl.cdiv(q_rows, BLOCK_M)
        col_blocks = tl.cdiv(k_rows, BLOCK_N)
    elif SUM_ROWS:
        row_block, _, _, last = query_blocks(
            col_tile * BLOCK_N, BLOCK_N, shift, q_rows, window_left, window_right, LEFT, RIGHT, BLOCK_M
        )
        row_blocks = last - row_block
    else:
        first, _, _, last = key_blocks(
            row_tile * BLOCK_M, BLOCK_M, shift, k_rows, window_left, window_right, LEFT, RIGHT, BLOCK_N
        )
        if not SUM_COLS:
            first = tl.maximum(first, col_tile)
            last = tl.minimum(last, col_tile + 1)
        col_block = first
        col_blocks = tl.maximum(last - first, 0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for index in tl.range(0, sum_batches * sum_heads * row_blocks * col_blocks, num_stages=STAGES):
        member = index // (row_blocks * col_blocks)
        batch = wide(first_batch + member // sum_heads)
        head = wide(first_head + member % sum_heads)
        first_row = (row_block + (index // col_blocks) % row_blocks) * BLOCK_M
        total += _tile(
            first_row, (col_block + index % col_blocks) * BLOCK_N,
            q_ptr + batch * q_batch + head * q_head + wide(first_row) * q_row,
            k_ptr + batch * k_batch + (head // group) * k_head, v_ptr + batch * v_batch + (head // group) * v_head,
            dout_ptr + batch * dout_batch + head * dout_head + wide(first_row) * dout_row, row_max_ptr, log_sum_ptr,
            delta_ptr, first_stat(batch, head, heads, first_row, q_rows, None),
            mask_ptr + batch * mask_batch + head * mask_head, mask_row,
            head_value(slopes_ptr, batch, slope_batch, head), seed_ptr, threshold, q_row, k_row, v_row, dout_row,
            shift, q_rows, k_rows, window_left, window_right, scale, softcap, softcap_inverse, keep_inverse,
            D, DV, D_PAD, DV_PAD, MASK_COL, slopes_ptr is not None, SOFTCAP, LEFT, RIGHT, BLOCK_M,
            BLOCK_N)  # fmt: skip
    rows = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (col_tile * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    dmask_ptr += first_batch.to(tl.int64) * dmask_batch + first_head.to(tl.int64) * dmask_head
    if SUM_ROWS and SUM_COLS:
        tl.store(dmask_ptr, cast(tl.sum(tl.sum(total, 1), 0), dmask_ptr.dtype.element_ty))
    elif SUM_ROWS:
        tl.store(dmask_ptr + cols * dmask_col, cast(tl.sum(total, 0), dmask_ptr.dtype.element_ty), mask=cols < k_rows)
    elif SUM_COLS:
        tl.store(dmask_ptr + rows * dmask_row, cast(tl.sum(total, 1), dmask_ptr.dtype.element_ty), mask=rows < q_rows)
    else:
        at = dmask_ptr + rows[:, None] * dmask_row + cols[None, :] * dmask_col
        seen = (rows < q_rows)[:, None] & (cols < k_rows)[None, :]
        tl.store(at, cast(total, dmask_ptr.dtype.element_ty), mask=seen)
