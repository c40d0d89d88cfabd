"""gelu and silu with a bias in Triton: kernels and launchers, with the signatures of the raw ops.

A forward program takes BLOCK_COLS columns of one row, a backward program those of `slab` rows, over which it sums.
"""

import math

import torch
import triton
import triton.language as tl

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, as_rows, cast
from llmkernels.ops.gated.triton_kernels import activated, config

SLAB_ROWS = 16  # of a program where it sums over them: the sums are then a small part of the data


@triton.jit
def _activation_fwd_kernel(
    input_ptr,  # [rows, cols] T, row stride input_stride
    bias_ptr,  # [cols] ACC; unused unless BIAS
    y_ptr,  # [rows, cols] T
    input_stride,
    cols,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(cols, BLOCK_COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = at < cols
    x = tl.load(input_ptr + row * input_stride + at, mask=mask, other=0.0).to(ACC)
    if BIAS:
        x += tl.load(bias_ptr + at, mask=mask, other=0.0)
    value, _ = activated(x, ACTIVATION, ACC)
    tl.store(y_ptr + row * cols + at, cast(value, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activation_bwd_kernel(
    dy_ptr,  # [rows, cols] T, row stride dy_stride
    input_ptr,  # [rows, cols] T, row stride input_stride
    bias_ptr,  # [cols] ACC; unused unless BIAS
    dinput_ptr,  # [rows, cols] T; unused unless DINPUT
    partial_ptr,  # [slabs, cols] ACC; unused unless DBIAS
    dy_stride,
    input_stride,
    rows,
    cols,
    slab,
    ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr,
    DINPUT: tl.constexpr,
    DBIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    blocks = tl.cdiv(cols, BLOCK_COLS)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = at < cols
    sums = tl.zeros((BLOCK_COLS,), ACC)
    bias = tl.zeros((BLOCK_COLS,), ACC)
    if BIAS:
        bias = tl.load(bias_ptr + at, mask=mask, other=0.0)
    for step in range(0, slab):
        row = number * slab + step
        here = mask & (row < rows)
        x = tl.load(input_ptr + row * input_stride + at, mask=here, other=0.0).to(ACC) + bias
        dy = tl.load(dy_ptr + row * dy_stride + at, mask=here, other=0.0).to(ACC)
        _, slope = activated(x, ACTIVATION, ACC)
        gradient = dy * slope
        if DINPUT:
            tl.store(dinput_ptr + row * cols + at, cast(gradient, dinput_ptr.dtype.element_ty), mask=here)
        sums += tl.where(here, gradient, 0.0)
    if DBIAS:
        tl.store(partial_ptr + number * cols + at, sums, mask=mask)


def _rows_and_cols(input):
    return math.prod(input.shape[:-1]), input.shape[-1] if input.dim() else 1


def activation_fwd(input, bias, activation):
    y = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    if y.numel() == 0:
        return y
    rows, cols = _rows_and_cols(input)
    input_rows, input_stride = as_rows(input, rows, cols)
    block, warps = config(cols)
    with torch.cuda.device_of(input):
        _activation_fwd_kernel[(rows * triton.cdiv(cols, block),)](
            input_rows, y if bias is None else bias.contiguous(), y, input_stride, cols,
            ACTIVATION=activation, BIAS=bias is not None, BLOCK_COLS=block,
            ACC=TL_DTYPE[accumulate_dtype(input.dtype)], num_warps=warps,
        )  # fmt: skip
    return y


def activation_bwd(dy, input, bias, activation, wanted):
    acc = accumulate_dtype(input.dtype)
    rows, cols = _rows_and_cols(input)
    dinput = torch.empty(input.shape if wanted[0] else 0, dtype=input.dtype, device=input.device)
    if dy.numel() == 0 or not any(wanted):
        return dinput, torch.zeros(cols if wanted[1] else 0, dtype=acc, device=input.device)
    slab = SLAB_ROWS if wanted[1] else 1
    slabs = triton.cdiv(rows, slab)
    partial = torch.empty((slabs, cols) if wanted[1] else 0, dtype=acc, device=input.device)
    input_rows, input_stride = as_rows(input, rows, cols)
    dy_rows, dy_stride = as_rows(dy, rows, cols)
    block, warps = config(cols)
    with torch.cuda.device_of(input):
        _activation_bwd_kernel[(slabs * triton.cdiv(cols, block),)](
            dy_rows, input_rows, dy_rows if bias is None else bias.contiguous(), dinput, partial, dy_stride,
            input_stride, rows, cols, slab, ACTIVATION=activation, BIAS=bias is not None, DINPUT=wanted[0],
            DBIAS=wanted[1], BLOCK_COLS=block, ACC=TL_DTYPE[acc], num_warps=warps,
        )  # fmt: skip
    return dinput, partial.sum(0) if wanted[1] else partial


def configurations():
    """For testing/triton_aot.py: every block size, activation and dtype, with a bias and without."""
    dtypes = ("bf16", "fp16", "fp32", "fp64")
    for index, cols in enumerate((32, 64, 128, 256, 512, 1024, 1025)):
        block, warps = config(cols)
        data = dtypes[index % 4]
        acc = "fp64" if data == "fp64" else "fp32"
        constants = {
            "ACTIVATION": ("silu", "gelu", "gelu_tanh")[index % 3],
            "BIAS": index % 2 == 0,
            "BLOCK_COLS": block,
            "ACC": tl.float64 if data == "fp64" else tl.float32,
        }
        yield _activation_fwd_kernel, [data, acc, data, "i64", "i32"], constants, warps
        types = [data, data, acc, data, acc, "i64", "i64", "i32", "i32", "i32"]
        yield _activation_bwd_kernel, types, {**constants, "DINPUT": True, "DBIAS": index % 2 == 0}, warps
