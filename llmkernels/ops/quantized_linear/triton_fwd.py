"""The forward of quantized_linear in Triton: a program has a tile of y and runs over columns, all or one part of them.

The weight is the left operand, decoded in registers, and x transposed the right one: on Hopper that is wgmma for any
number of rows of x, where x on the left would need 64 of them.
"""

import triton
import triton.language as tl

from llmkernels._triton import INTERPRETED, cast, dot
from llmkernels.ops.quantized_linear.triton_formats import decoded, levels, load_scales, load_zeros

M_BLOCKS_TOGETHER = tl.constexpr(8)  # blocks of x that are read with one block of the weight after another, from cache


@triton.jit
def tile_of(program, m_blocks, other_blocks):
    """(block of rows of x, block of the other side) of a program: a group of blocks of x passes all others."""
    group = program // (M_BLOCKS_TOGETHER * other_blocks)
    first = group * M_BLOCKS_TOGETHER
    size = tl.minimum(m_blocks - first, M_BLOCKS_TOGETHER)
    rest = program % (M_BLOCKS_TOGETHER * other_blocks)
    return first + rest % size, rest // size


@triton.jit
def add_product(w, x, acc):
    """acc + w @ x^T: int32 of int8, else fp32."""
    if acc.dtype == tl.int32:
        acc = tl.dot(w, tl.trans(x), acc, out_dtype=tl.int32)
    else:
        acc = dot(w, tl.trans(x), acc)
    return acc


@triton.jit
def compensated(acc, part, lost):
    """(acc + part, what that sum has too much), where `lost` is what the sum before had too much (Kahan 1965): for x in
    fp32, where a long sum would otherwise have a larger error than that of libraries, which add in several chains."""
    part = part - lost
    total = acc + part
    return total, (total - acc) - part


@triton.jit
def finished(sums, x_scales_ptr, scales_ptr, bias_ptr, m, n, m_mask, n_mask):
    """Sums in fp32, times the scales of rows of x and of the weight where there are any, plus bias. m and n broadcast
    to a tile."""
    y = sums.to(tl.float32)
    if scales_ptr is not None:
        scales = tl.load(scales_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        if x_scales_ptr is not None:
            scales = scales * tl.load(x_scales_ptr + m, mask=m_mask, other=0.0)
        y = y * scales
    elif x_scales_ptr is not None:
        y = y * tl.load(x_scales_ptr + m, mask=m_mask, other=0.0)
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M", "split"])
def _quantized_linear_fwd_kernel(
    x_ptr,  # [M, K] T; of rounded activations int8, uint8 (bytes of e4m3) or fp16, which holds both
    x_scales_ptr,  # [M] fp32 of rounded activations
    data_ptr,  # [N, K] int8 or uint8, [N, ceil(K / 2)] uint8
    scales_ptr,  # [N], [N, groups] or [ceil(N / 128), groups]
    zeros_ptr,  # [N, groups] uint8
    second_ptr,  # [1 + ceil(N * groups / 256)] fp32
    bias_ptr,  # [N] T
    y_ptr,  # [M, N] T, or [splits, M, N] fp32 or int32: sums without scales of rows and bias
    M,
    N,
    K,
    x_row,  # strides of rows
    data_row,
    groups,
    split,  # blocks of columns that one part of the programs has; whole groups
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,  # columns, at least BLOCK_K; 0: the whole row
    SCALE_ROWS: tl.constexpr,  # rows of the weight that share scales
    SCALING: tl.constexpr,  # what is multiplied by the scales: "weights", "sums" of a group, sums at the "end"
    PARTS: tl.constexpr,
    NATIVE_FP8: tl.constexpr,  # the GPU has e4m3: from compute capability 8.9 on
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    X: tl.constexpr = x_ptr.dtype.element_ty
    NUMBER: tl.constexpr = tl.float32 if INTERPRETED and tl.bfloat16 == X else X
    TYPE: tl.constexpr = tl.float8e4nv if tl.uint8 == X else NUMBER
    # What is multiplied by a scale in fp32 need not be rounded on the way there.
    DECODED: tl.constexpr = tl.float32 if FORMAT == "fp8" and SCALING == "weights" else TYPE
    SUM: tl.constexpr = tl.int32 if tl.int8 == X else tl.float32
    PACKED: tl.constexpr = 2 if FORMAT == "int4" or FORMAT == "nf4" else 1  # codes of a byte
    BYTES: tl.constexpr = BLOCK_K // PACKED
    m_block, n_block = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    cols = tl.arange(0, BLOCK_K)
    places = tl.arange(0, BYTES)
    x_rows = x_ptr + m.to(tl.int64)[:, None] * x_row
    data_rows = data_ptr + n.to(tl.int64)[:, None] * data_row
    scale_rows = (n // SCALE_ROWS).to(tl.int64) * groups
    first = tl.program_id(1) * split * BLOCK_K
    last = tl.minimum(first + split * BLOCK_K, K)
    table = 0
    if FORMAT == "nf4":
        table = levels()
    at = scale_rows
    if GROUP > 0:
        at = scale_rows + first // GROUP
    scales = load_scales(scales_ptr, second_ptr, at, n_mask)
    zeros = load_zeros(zeros_ptr, at, n_mask)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32 if SCALING == "sums" else SUM)
    lost = acc
    for k in tl.range(first, last, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_rows + (k + cols)[None, :], mask=(m < M)[:, None] & (k + cols < K)[None, :], other=0)
        byte = k // PACKED + places
        packed = tl.load(data_rows + byte[None, :], mask=n_mask[:, None] & (byte < data_row)[None, :], other=0)
        # Those of the next block are on their way while this one is multiplied.
        next_scales = scales
        next_zeros = zeros
        if GROUP > 0:
            group = (k + BLOCK_K) // GROUP
            mask = n_mask & (group < groups)
            next_scales = load_scales(scales_ptr, second_ptr, scale_rows + group, mask)
            next_zeros = load_zeros(zeros_ptr, scale_rows + group, mask)
        if tl.uint8 == X:
            x = x.to(TYPE, bitcast=True)
        sums = acc
        if SCALING == "sums" or tl.float32 == X:
            sums = tl.zeros([BLOCK_N, BLOCK_M], SUM)
        if PACKED == 2:
            even, odd = tl.split(tl.reshape(x, [BLOCK_M, BYTES, 2]))
            low = decoded(packed & 15, zeros[:, None], table, FORMAT, TYPE, NATIVE_FP8)
            high = decoded(packed >> 4, zeros[:, None], table, FORMAT, TYPE, NATIVE_FP8)
            if SCALING == "weights":
                low = (low.to(tl.float32) * scales[:, None]).to(TYPE)
                high = (high.to(tl.float32) * scales[:, None]).to(TYPE)
            sums = add_product(high, odd, add_product(low, even, sums))
        else:
            w = decoded(packed, zeros[:, None], table, FORMAT, DECODED, NATIVE_FP8)
            if SCALING == "weights":
                w = (w.to(tl.float32) * scales[:, None]).to(TYPE)
            sums = add_product(w, x, sums)
        if SCALING == "sums":
            sums = sums.to(tl.float32) * scales[:, None]
        if tl.float32 == X:
            acc, lost = compensated(acc, sums, lost)
        elif SCALING == "sums":
            acc += sums
        else:
            acc = sums
        scales = next_scales
        zeros = next_zeros
    mask = (m < M)[None, :] & n_mask[:, None]
    to = y_ptr + m.to(tl.int64)[None, :] * N + n[:, None]
    if PARTS:
        tl.store(to + tl.program_id(1).to(tl.int64) * M * N, acc, mask=mask)
    else:
        y = finished(acc, x_scales_ptr, scales_ptr if SCALING == "end" else None, bias_ptr, m[None, :], n[:, None],
                     (m < M)[None, :], n_mask[:, None])  # fmt: skip
        tl.store(to, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "splits"])
def _quantized_linear_sum_kernel(
    parts_ptr,  # [splits, M, N] fp32 or int32
    x_scales_ptr,  # [M] fp32
    scales_ptr,  # [N] fp32, bf16 or fp16
    bias_ptr,  # [N] T
    y_ptr,  # [M, N] T
    splits,
    M,
    N,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK)
    m = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    at = parts_ptr + m * N + n
    sums = tl.load(at, mask=n < N, other=0)
    for part in tl.range(1, splits):
        sums += tl.load(at + (tl.zeros((), tl.int64) + part) * M * N, mask=n < N, other=0)
    y = finished(sums, x_scales_ptr, scales_ptr, bias_ptr, m, n, True, n < N)
    tl.store(y_ptr + m * N + n, cast(y, y_ptr.dtype.element_ty), mask=n < N)
