"""The backward of quantized_linear in Triton, dx = dy @ weight: a program has a tile of dx and runs over the weight's
rows, all or one part of them. The weight is decoded with its scales and rounded to the type of dy, as the reference
does."""

import triton
import triton.language as tl

from llmkernels._triton import INTERPRETED, cast, dot
from llmkernels.ops.quantized_linear.triton_formats import decoded, levels, load_scales, load_zeros
from llmkernels.ops.quantized_linear.triton_fwd import tile_of


@triton.jit
def _spread(values, COLUMNS: tl.constexpr):
    """`[rows, groups]` for each of COLUMNS columns: `[rows, COLUMNS]`, or `[rows, 1]` if there is one group."""
    ROWS: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = values.shape[1]
    if GROUPS > 1:
        values = tl.broadcast_to(values[:, :, None], [ROWS, GROUPS, COLUMNS // GROUPS])
        values = tl.reshape(values, [ROWS, COLUMNS])
    return values


@triton.jit(do_not_specialize=["M", "split"])
def _quantized_linear_bwd_kernel(
    dy_ptr,  # [M, N] T
    data_ptr,  # [N, K] int8 or uint8, [N, ceil(K / 2)] uint8
    scales_ptr,  # [N], [N, groups] or [ceil(N / 128), groups]
    zeros_ptr,  # [N, groups] uint8
    second_ptr,  # [1 + ceil(N * groups / 256)] fp32
    dx_ptr,  # [M, K] T, or [splits, M, K] fp32
    M,
    N,
    K,
    dy_row,  # strides of rows
    data_row,
    groups,
    split,  # blocks of the weight's rows that one part of the programs has
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,  # columns; 0: the whole row
    SCALE_ROWS: tl.constexpr,  # rows of the weight that share scales
    PARTS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,  # the GPU has e4m3: from compute capability 8.9 on
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    T: tl.constexpr = dy_ptr.dtype.element_ty
    TYPE: tl.constexpr = tl.float32 if INTERPRETED and tl.bfloat16 == T else T
    PACKED: tl.constexpr = 2 if FORMAT == "int4" or FORMAT == "nf4" else 1  # codes of a byte
    # What is multiplied by a scale in fp32 need not be rounded on the way there.
    DECODED: tl.constexpr = tl.float32 if PACKED == 1 else TYPE
    BYTES: tl.constexpr = BLOCK_K // PACKED
    GROUPS: tl.constexpr = BLOCK_K // GROUP if GROUP > 0 and GROUP < BLOCK_K else 1  # of the tile
    m_block, k_block = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K))
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    lanes = tl.arange(0, BLOCK_N)
    byte = k_block * BYTES + tl.arange(0, BYTES)
    group = tl.arange(0, GROUPS)
    if GROUP > 0:
        group += k_block * BLOCK_K // GROUP
    dy_rows = dy_ptr + m.to(tl.int64)[:, None] * dy_row
    table = 0
    if FORMAT == "nf4":
        table = levels()
    first = tl.program_id(1) * split * BLOCK_N
    last = tl.minimum(first + split * BLOCK_N, N)
    acc = tl.zeros([BLOCK_M, BYTES], tl.float32)  # of even columns, where a byte has two
    odd = tl.zeros([BLOCK_M, BYTES], tl.float32)
    for row in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = row + lanes
        n_mask = (n < N)[:, None]
        dy = tl.load(dy_rows + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        at = n.to(tl.int64)[:, None] * data_row + byte[None, :]
        packed = tl.load(data_ptr + at, mask=n_mask & (byte < data_row)[None, :], other=0)
        at = (n // SCALE_ROWS).to(tl.int64)[:, None] * groups + group[None, :]
        mask = n_mask & (group < groups)[None, :]
        scales = _spread(load_scales(scales_ptr, second_ptr, at, mask), BYTES)
        zeros = _spread(load_zeros(zeros_ptr, at, mask), BYTES)
        if PACKED == 2:
            low = (decoded(packed & 15, zeros, table, FORMAT, TYPE, NATIVE_FP8).to(tl.float32) * scales).to(TYPE)
            high = (decoded(packed >> 4, zeros, table, FORMAT, TYPE, NATIVE_FP8).to(tl.float32) * scales).to(TYPE)
            acc = dot(dy, low, acc)
            odd = dot(dy, high, odd)
        else:
            w = decoded(packed, zeros, table, FORMAT, DECODED, NATIVE_FP8).to(tl.float32) * scales
            acc = dot(dy, w.to(TYPE), acc)
    if PACKED == 2:
        acc = tl.reshape(tl.join(acc, odd), [BLOCK_M, BLOCK_K])
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    to = dx_ptr + m.to(tl.int64)[:, None] * K + k[None, :]
    mask = (m < M)[:, None] & (k < K)[None, :]
    if PARTS:
        tl.store(to + tl.program_id(1).to(tl.int64) * M * K, acc, mask=mask)
    else:
        tl.store(to, cast(acc, dx_ptr.dtype.element_ty), mask=mask)
