"""sample in Triton: the kernel and its launcher, with the signature of the raw op.

A program takes one row in blocks of BLOCK_COLS, many times: a threshold is found bit by bit, each with a sum over the
row, which stays in a cache. Nothing is sorted.
"""

import torch
import triton
import triton.language as tl

from llmkernels._triton import as_rows, split_scalar

MAX_BLOCK = 2048  # columns at a time: 8 values a thread, whose sums are fp64
LARGEST_FACTOR = 3.4e38  # an infinite one would make a NaN of the largest logit


def config(cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps) for rows of `cols` columns."""
    block = min(triton.next_power_of_2(max(cols, 32)), MAX_BLOCK)
    return block, min(max(block // 256, 1), 8)


@triton.jit
def _key_of(x):
    """Unsigned numbers, as 64 bits, in the order of the floats."""
    bits = x.to(tl.uint32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _at_least(row_ptr, cols, least, top, factor, MASS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """How many keys are at least `least`, or the sum of their e."""
    total = tl.zeros([BLOCK_COLS], tl.float64)
    for start in range(0, cols, BLOCK_COLS):
        at = start + tl.arange(0, BLOCK_COLS)
        x = tl.load(row_ptr + at, mask=at < cols, other=0.0).to(tl.float32)
        here = (at < cols) & (_key_of(x) >= least)
        if MASS:
            total += tl.where(here, tl.exp((x - top) * factor), 0.0).to(tl.float64)
        else:
            total += here.to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _sample_kernel(
    logits_ptr,  # [rows, cols] T, row stride row_stride
    u_ptr,  # [rows] fp64
    tokens_ptr,  # [rows] int64
    factor,  # 1 / temperature
    top_k,  # as fp32, exact up to 2^24
    top_p,  # in two parts whose sum it is: see split_scalar
    top_p_rest,
    min_p,
    row_stride,
    cols,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + r * row_stride
    lanes = tl.arange(0, BLOCK_COLS)
    top = tl.full((), float("-inf"), tl.float32)
    wrong = tl.full((), 0, tl.int32)
    for start in range(0, cols, BLOCK_COLS):
        at = start + lanes
        x = tl.load(row_ptr + at, mask=at < cols, other=float("-inf")).to(tl.float32)
        wrong = tl.maximum(wrong, tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0))
        top = tl.maximum(top, tl.max(tl.where(x == x, x, float("-inf")), 0))
    wrong = tl.where(top == float("-inf"), 1, wrong)
    token = tl.full((), 0x7FFFFFFF, tl.int32)
    if GREEDY:
        for start in range(0, cols, BLOCK_COLS):
            at = start + lanes
            x = tl.load(row_ptr + at, mask=at < cols, other=float("-inf")).to(tl.float32)
            token = tl.minimum(token, tl.min(tl.where((x == top) & (at < cols), at, 0x7FFFFFFF), 0))
    else:
        least = tl.full((), 0, tl.int64)
        if TOP_K:
            for step in range(0, 32):
                candidate = least + (tl.full((), 1, tl.int64) << (31 - step))
                enough = _at_least(row_ptr, cols, candidate, top, factor, False, BLOCK_COLS) >= top_k
                least = tl.where(enough, candidate, least)
        if TOP_P:
            mass = _at_least(row_ptr, cols, least, top, factor, True, BLOCK_COLS)
            target = mass * (tl.full((), top_p, tl.float64) + tl.full((), top_p_rest, tl.float64))
            of_top_p = tl.full((), 0, tl.int64)
            for step in range(0, 32):
                candidate = of_top_p + (tl.full((), 1, tl.int64) << (31 - step))
                enough = _at_least(row_ptr, cols, candidate, top, factor, True, BLOCK_COLS) >= target
                of_top_p = tl.where(enough, candidate, of_top_p)
            least = tl.maximum(least, of_top_p)
        # The sum of all that is taken, then the first column at which the running sum exceeds its share.
        total = tl.full((), 0.0, tl.float64)
        last = tl.full((), 0, tl.int32)
        for start in range(0, cols, BLOCK_COLS):
            at = start + lanes
            x = tl.load(row_ptr + at, mask=at < cols, other=0.0).to(tl.float32)
            e = tl.exp((x - top) * factor)
            e = tl.where((at < cols) & (_key_of(x) >= least) & (e >= min_p), e, 0.0)
            total += tl.sum(e.to(tl.float64), 0)
            last = tl.maximum(last, tl.max(tl.where(e > 0.0, at, 0), 0))
        target = tl.load(u_ptr + r) * total
        before = tl.full((), 0.0, tl.float64)
        for start in range(0, cols, BLOCK_COLS):
            at = start + lanes
            x = tl.load(row_ptr + at, mask=at < cols, other=0.0).to(tl.float32)
            e = tl.exp((x - top) * factor)
            e = tl.where((at < cols) & (_key_of(x) >= least) & (e >= min_p), e, 0.0).to(tl.float64)
            sums = before + tl.cumsum(e, 0)
            token = tl.minimum(token, tl.min(tl.where((sums > target) & (e > 0.0), at, 0x7FFFFFFF), 0))
            before += tl.sum(e, 0)
        # By rounding no sum may exceed it: then the last one that is taken.
        token = tl.minimum(token, last)
    tl.store(tokens_ptr + r, tl.where(wrong != 0, -1, token).to(tl.int64))


def sample_tokens(logits, u, temperature, top_k, top_p, min_p):
    cols = logits.shape[-1]
    tokens = torch.empty(u.shape, dtype=torch.int64, device=logits.device)
    if tokens.numel() == 0:
        return tokens
    rows, stride = as_rows(logits, tokens.numel(), cols)
    block, warps = config(cols)
    factor = 0.0 if temperature == 0.0 else min(1.0 / temperature, LARGEST_FACTOR)
    with torch.cuda.device_of(logits):
        _sample_kernel[(tokens.numel(),)](
            rows, u.contiguous(), tokens, factor, float(top_k), *split_scalar(top_p), min_p, stride, cols,
            GREEDY=temperature == 0.0, TOP_K=0 < top_k < cols, TOP_P=top_p < 1.0, BLOCK_COLS=block, num_warps=warps,
        )  # fmt: skip
    return tokens


def configurations():
    """For testing/triton_aot.py: every block size, flag and dtype."""
    for index, cols in enumerate((32, 256, 1024, 2048, 32_000)):
        block, warps = config(cols)
        for offset, data in enumerate(("bf16", "fp16", "fp32")):
            flags = {"GREEDY": index == 1, "TOP_K": offset != 1, "TOP_P": offset != 2}
            types = [data, "fp64", "*i64", *["scalar"] * 5, "i64", "i32"]
            yield _sample_kernel, types, {**flags, "BLOCK_COLS": block}, warps
