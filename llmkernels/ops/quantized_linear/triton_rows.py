"""Activations in Triton: each row of x rounded to int8 or fp8, with the scale that it has when it arrives, and before
that normed where the call says so."""

import triton
import triton.language as tl

from llmkernels._triton import cast
from llmkernels.ops.quantized_linear.triton_formats import FP8_MAX, from_fp8, to_fp8
from llmkernels.quantization import int8

_INT8_MAX = tl.constexpr(float(int8.MAX))
# Added to a number of less than 2^22 and subtracted again, it rounds to nearest, ties to even.
_ROUND = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _row_values(x_ptr, norm_ptr, rstd, columns, mask, NORM: tl.constexpr):
    """Columns of the row as they are to be rounded, in fp32: of the dtype of x also when they were normed."""
    x = tl.load(x_ptr + columns, mask=mask, other=0.0)
    value = x.to(tl.float32)
    if NORM:
        value *= rstd
        if norm_ptr is not None:
            value *= tl.load(norm_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        value = cast(value, x.dtype).to(tl.float32)
    return value


@triton.jit
def _quantized_linear_rows_kernel(
    x_ptr,  # [M, K] T
    norm_ptr,  # [K] T or fp32, None: ones
    rstd_ptr,  # [M] fp32, None: no norm
    to_ptr,  # [M, K] int8, uint8 (bytes of e4m3) or fp16
    scales_ptr,  # [M] fp32
    K,
    x_row,
    eps,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
):
    MAX: tl.constexpr = FP8_MAX if FP8 else _INT8_MAX
    TO: tl.constexpr = to_ptr.dtype.element_ty
    NORM: tl.constexpr = rstd_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    x_ptr += row * x_row
    to_ptr += row * K
    rstd = 1.0
    if NORM:
        squares = tl.zeros([BLOCK], tl.float32)
        for first in tl.range(0, K, BLOCK):
            value = tl.load(x_ptr + first + lanes, mask=first + lanes < K, other=0.0).to(tl.float32)
            squares += value * value
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(squares, 0), K * 1.0) + eps))
        tl.store(rstd_ptr + row, rstd)
    largest = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, K, BLOCK):
        size = tl.abs(_row_values(x_ptr, norm_ptr, rstd, first + lanes, first + lanes < K, NORM))
        # A NaN is not less than infinity. Behind the row it is one only where rstd is no number.
        largest = tl.maximum(largest, tl.where(size < float("inf"), size, float("inf")))
    scale = tl.div_rn(tl.max(largest, 0), MAX)
    scale = tl.where(scale == 0.0, 1.0, scale)
    is_finite = scale < float("inf")
    tl.store(scales_ptr + row, tl.where(is_finite, scale, float("nan")))
    scale = tl.where(is_finite, scale, 1.0)
    for first in tl.range(0, K, BLOCK):
        mask = first + lanes < K
        value = tl.div_rn(_row_values(x_ptr, norm_ptr, rstd, first + lanes, mask, NORM), scale)
        value = tl.where(value == value, tl.minimum(tl.maximum(value, -MAX), MAX), 0.0)
        if FP8:
            rounded = to_fp8(value)
            if tl.float16 == TO:
                rounded = from_fp8(rounded, TO, False)
        else:
            rounded = ((value + _ROUND) - _ROUND).to(TO)
        tl.store(to_ptr + first + lanes, rounded, mask=mask)
