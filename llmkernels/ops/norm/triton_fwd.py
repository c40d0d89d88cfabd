"""The forward kernel of the norms in Triton; triton_kernels.py launches it."""

import triton
import triton.language as tl

from llmkernels._triton import cast, kept, number


@triton.jit(do_not_specialize=["threshold", "keep_scale"])
def _norm_fwd_kernel(
    x_ptr,  # [rows, cols] T, row stride x_stride
    residual_ptr,  # [rows, cols] T, row stride residual_stride; unused unless ADD
    weight_ptr,  # [cols] W; unused unless HAS_WEIGHT
    bias_ptr,  # [cols] W; unused unless HAS_BIAS
    y_ptr,  # [rows, cols] T
    sum_ptr,  # [rows, cols] T: x (after dropout) + residual; unused unless ADD
    mean_ptr,  # [rows] Acc; unused if RMS
    rstd_ptr,  # [rows] Acc
    eps,  # a scalar argument is fp32, so each comes in two parts whose sum it is: see split_scalar
    eps_rest,
    weight_offset,
    weight_offset_rest,
    seed_ptr,  # [] int64; unused unless DROPOUT, as the next two
    threshold,  # of _random.py
    keep_scale,  # what a kept element is multiplied with: see bits_of
    x_stride,
    residual_stride,
    cols,
    RMS: tl.constexpr,
    ADD: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_COLS)
    eps = tl.full((), eps, ACC) + tl.full((), eps_rest, ACC)
    weight_offset = tl.full((), weight_offset, ACC) + tl.full((), weight_offset_rest, ACC)
    s_ptr = x_ptr + row * x_stride
    if ADD:
        # The norm is of the sum as rounded to T, so it is written first and read back rounded.
        for start in range(0, cols, BLOCK_COLS):
            at = start + lanes
            a = tl.load(x_ptr + row * x_stride + at, mask=at < cols, other=0.0).to(ACC)
            if DROPOUT:
                # Rounded to T before the sum is.
                scaled = cast(a * number(keep_scale, ACC), sum_ptr.dtype.element_ty).to(ACC)
                a = tl.where(kept(seed_ptr, row, at, threshold), scaled, 0.0)
            b = tl.load(residual_ptr + row * residual_stride + at, mask=at < cols, other=0.0).to(ACC)
            tl.store(sum_ptr + row * cols + at, cast(a + b, sum_ptr.dtype.element_ty), mask=at < cols)
        tl.debug_barrier()  # other threads of this program read what this one wrote
        s_ptr = sum_ptr + row * cols

    mean = tl.sum(tl.zeros([BLOCK_COLS], ACC), 0)
    correction = mean
    if ONE_BLOCK:
        v = tl.load(s_ptr + lanes, mask=lanes < cols, other=0.0).to(ACC)
        if not RMS:
            mean = tl.sum(v, 0) / cols
            v = tl.where(lanes < cols, v - mean, 0.0)
            # The rounding of the mean shows when it is far larger than the spread.
            correction = tl.sum(v, 0) / cols
            v = tl.where(lanes < cols, v - correction, 0.0)
        square = tl.sum(v * v, 0) / cols
    else:
        total = tl.zeros([BLOCK_COLS], ACC)
        if not RMS:
            for start in range(0, cols, BLOCK_COLS):
                at = start + lanes
                total += tl.load(s_ptr + at, mask=at < cols, other=0.0).to(ACC)
            mean = tl.sum(total, 0) / cols
            total = tl.zeros([BLOCK_COLS], ACC)
        squares = tl.zeros([BLOCK_COLS], ACC)
        for start in range(0, cols, BLOCK_COLS):
            at = start + lanes
            v = tl.load(s_ptr + at, mask=at < cols, other=0.0).to(ACC)
            if not RMS:
                v = tl.where(at < cols, v - mean, 0.0)
                total += v
            squares += v * v
        correction = tl.sum(total, 0) / cols
        square = tl.sum(squares, 0) / cols - correction * correction
        square = tl.where(square < 0.0, 0.0, square)  # below zero by rounding only; a NaN stays
    rstd = 1.0 / tl.sqrt(square + eps)
    if not RMS:
        tl.store(mean_ptr + row, mean + correction)
    tl.store(rstd_ptr + row, rstd)

    for start in range(0, cols, BLOCK_COLS):
        at = start + lanes
        mask = at < cols
        if not ONE_BLOCK:
            v = tl.load(s_ptr + at, mask=mask, other=0.0).to(ACC)
            if not RMS:
                v = (v - mean) - correction
        y = v * rstd
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + at, mask=mask, other=0.0).to(ACC)
            if RMS:
                w += weight_offset
            y = y * w
        if HAS_BIAS:
            y += tl.load(bias_ptr + at, mask=mask, other=0.0).to(ACC)
        tl.store(y_ptr + row * cols + at, cast(y, y_ptr.dtype.element_ty), mask=mask)
