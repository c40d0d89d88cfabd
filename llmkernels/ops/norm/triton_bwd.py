"""The backward kernels of the norms in Triton; triton_kernels.py launches them."""

import triton
import triton.language as tl

from llmkernels._triton import cast, kept, number


@triton.jit
def _load_row(dy_ptr, x_ptr, weight_ptr, at, mask, mean, weight_offset, RMS: tl.constexpr,
              HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """(dy, g, x - mean) of one block of a row; zero outside the mask."""
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(ACC)
    v = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    if not RMS:
        v = tl.where(mask, v - mean, 0.0)
    g = dy
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(ACC)
        if RMS:
            w += weight_offset
        g = dy * w
    return dy, g, v


@triton.jit(do_not_specialize=["threshold", "keep_scale"])
def _norm_bwd_kernel(
    dy_ptr,  # [rows, cols] T, row stride dy_stride
    dresidual_ptr,  # [rows, cols] T, row stride dresidual_stride; unused unless ADD
    x_ptr,  # [rows, cols] T, row stride x_stride: the s of the forward
    weight_ptr,  # [cols] W; unused unless HAS_WEIGHT
    mean_ptr,  # [rows] Acc; unused if RMS
    rstd_ptr,  # [rows] Acc
    dx_ptr,  # [rows, cols] T: the gradient of s; unused unless DX
    dropped_ptr,  # [rows, cols] T: dx where dropout kept; unused unless DROPOUT
    dweight_ptr,  # [programs, cols] Acc, zeros: this program's line; unused unless DWEIGHT
    dbias_ptr,  # [programs, cols] Acc, zeros; unused unless DBIAS
    weight_offset,  # in two parts
    weight_offset_rest,
    seed_ptr,  # [] int64; unused unless DROPOUT, as the next two
    threshold,  # of _random.py
    keep_scale,  # what a kept element is multiplied with: see bits_of
    dy_stride,
    dresidual_stride,
    x_stride,
    rows,
    cols,
    RMS: tl.constexpr,
    ADD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DX: tl.constexpr,
    DROPOUT: tl.constexpr,
    DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Program p takes rows p, p + programs, ... With one block its sums stay in registers until the end."""
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_COLS)
    weight_offset = tl.full((), weight_offset, ACC) + tl.full((), weight_offset_rest, ACC)
    dweight = tl.zeros([BLOCK_COLS], ACC)
    dbias = tl.zeros([BLOCK_COLS], ACC)
    for row in range(program, rows, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row)
        mean = rstd
        if not RMS:
            mean = tl.load(mean_ptr + row)
        dy_row = dy_ptr + row * dy_stride
        x_row = x_ptr + row * x_stride
        if ONE_BLOCK:
            dy, g, v = _load_row(dy_row, x_row, weight_ptr, lanes, lanes < cols, mean, weight_offset,
                                 RMS, HAS_WEIGHT, ACC)  # fmt: skip
            g_sum = g
            gv_sum = g * v
            v_sum = v
        else:
            g_sum = tl.zeros([BLOCK_COLS], ACC)
            gv_sum = tl.zeros([BLOCK_COLS], ACC)
            v_sum = tl.zeros([BLOCK_COLS], ACC)
            for start in range(0, cols, BLOCK_COLS):
                at = start + lanes
                _, gb, vb = _load_row(dy_row, x_row, weight_ptr, at, at < cols, mean, weight_offset,
                                      RMS, HAS_WEIGHT, ACC)  # fmt: skip
                g_sum += gb
                gv_sum += gb * vb
                v_sum += vb
        g_mean = tl.sum(g_sum, 0) / cols
        correction = tl.sum(v_sum, 0) / cols
        if RMS:
            g_mean = 0.0 * g_mean
            correction = 0.0 * correction
        slope = (tl.sum(gv_sum, 0) / cols - correction * g_mean) * rstd
        for start in range(0, cols, BLOCK_COLS):
            at = start + lanes
            mask = at < cols
            if not ONE_BLOCK:
                dy, g, v = _load_row(dy_row, x_row, weight_ptr, at, mask, mean, weight_offset, RMS, HAS_WEIGHT, ACC)
            xhat = v * rstd
            if not RMS:
                xhat = tl.where(mask, (v - correction) * rstd, 0.0)
            if DX:
                dx = (g - g_mean - xhat * slope) * rstd
                if ADD:
                    dx += tl.load(dresidual_ptr + row * dresidual_stride + at, mask=mask, other=0.0).to(ACC)
                tl.store(dx_ptr + row * cols + at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
                if DROPOUT:
                    keep = kept(seed_ptr, tl.full((), row, tl.int64), at, threshold)  # to the interpreter row is an int
                    dx = tl.where(keep, dx * number(keep_scale, ACC), 0.0)
                    tl.store(dropped_ptr + row * cols + at, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
            if ONE_BLOCK:
                dweight += dy * xhat
                dbias += dy
            else:
                # Every thread reads back only what it wrote itself: same lanes, same block, which has a vector for each
                # thread (4 of fp32; with fewer, threads would share elements).
                line = program * cols + at
                if DWEIGHT:
                    tl.store(dweight_ptr + line, tl.load(dweight_ptr + line, mask=mask) + dy * xhat, mask=mask)
                if DBIAS:
                    tl.store(dbias_ptr + line, tl.load(dbias_ptr + line, mask=mask) + dy, mask=mask)
    if ONE_BLOCK:
        line = program * cols + lanes
        if DWEIGHT:
            tl.store(dweight_ptr + line, dweight, mask=lanes < cols)
        if DBIAS:
            tl.store(dbias_ptr + line, dbias, mask=lanes < cols)


@triton.jit
def _norm_reduce_kernel(
    partial_ptr,  # [programs, cols] Acc
    out_ptr,  # [cols] W
    programs,
    cols,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program for BLOCK_COLS columns, lines in order."""
    at = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = at < cols
    total = tl.zeros([BLOCK_COLS], ACC)
    line_ptr = partial_ptr + at
    for _ in range(0, programs):
        total += tl.load(line_ptr, mask=mask, other=0.0)
        line_ptr += cols
    tl.store(out_ptr + at, cast(total, out_ptr.dtype.element_ty), mask=mask)
