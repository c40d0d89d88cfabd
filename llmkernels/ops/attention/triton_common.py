"""What the attention kernels in Triton share: tiles of scores with every option, ranges of blocks.

Rows are queries and columns keys of one sequence. Their lanes in a tile are [BLOCK_M, 1] and [1, BLOCK_N], or, where a
kernel computes the transposed scores, [1, BLOCK_M] and [BLOCK_N, 1]: what they combine to has the shape of products.
An option whose tensor is absent is compiled away: its pointer is None. Offsets of elements are 64-bit.
"""

import triton
import triton.language as tl

from llmkernels._triton import cast


@triton.jit
def load_tile(ptr, count, stride, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr,
              BOUND: tl.constexpr):  # fmt: skip
    """[ROWS, PAD] of the rows at `ptr`: zero beyond DIM and, where BOUND, beyond `count` rows."""
    dims = tl.arange(0, PAD)
    rows = tl.arange(0, ROWS)
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if BOUND:
        tile = tl.load(at, mask=(rows < count)[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM != PAD:
        tile = tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def load_stats(ptr, count, ROWS: tl.constexpr, BOUND: tl.constexpr):
    """[ROWS] fp32 at `ptr`; zero, where BOUND, beyond `count`."""
    rows = tl.arange(0, ROWS)
    if BOUND:
        found = tl.load(ptr + rows, mask=rows < count, other=0.0)
    else:
        found = tl.load(ptr + rows)
    return found


@triton.jit
def store_tile(ptr, tile, count, stride, ROWS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    dims = tl.arange(0, PAD)
    rows = tl.arange(0, ROWS)
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(at, cast(tile, ptr.dtype.element_ty), mask=(rows < count)[:, None] & (dims < DIM)[None, :])


@triton.jit
def place(blocks, heads):
    """(block, head, batch) of this program; the blocks of a head are next to each other."""
    program = tl.program_id(0)
    rest = program // blocks
    return program % blocks, (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)


@triton.jit
def sequence(ends_ptr, batch, total):
    """(first row, rows) of a sequence. Nobody has looked at the values of `ends` on a GPU: they are clamped."""
    start = tl.zeros((), tl.int64)
    length = total
    if ends_ptr is not None:
        first = tl.minimum(tl.maximum(tl.load(ends_ptr + batch), 0), total)
        last = tl.minimum(tl.maximum(tl.load(ends_ptr + batch + 1), first), total)
        start = first.to(tl.int64)
        length = last - first
    return start, length


@triton.jit
def first_stat(batch, head, heads, start, q_rows, ends_ptr):
    """Where row 0 of a sequence is in row_max, log_sum and delta, which is also its number for dropout."""
    if ends_ptr is not None:
        batch = batch * 0
    return (batch * heads + head) * q_rows + start


@triton.jit
def head_value(ptr, batch, stride, head):
    """A number of a head in fp32, zero where `ptr` is None."""
    value = 0.0
    if ptr is not None:
        value = tl.load(ptr + batch * stride + head).to(tl.float32)
    return value


# --- which blocks ---------------------------------------------------------------------------------------------------


@triton.jit
def seen_blocks(low, high, low_all, high_all, count, BLOCK: tl.constexpr):
    """(first, first_whole, last_whole, last) blocks of BLOCK numbers in 0 .. count.

    Something in low .. high - 1 is seen, and everything in low_all .. high_all - 1: blocks within need no masking.
    """
    first = tl.maximum(low, 0) // BLOCK
    last = tl.maximum(tl.cdiv(tl.minimum(high, count), BLOCK), first)
    first_whole = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(low_all, 0), BLOCK), first), last)
    last_whole = tl.minimum(tl.maximum(tl.minimum(tl.maximum(high_all, 0), count) // BLOCK, first_whole), last)
    return first, first_whole, last_whole, last


@triton.jit
def key_blocks(row, rows, shift, k_len, window_left, window_right,
               LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """seen_blocks of the keys that the queries row .. row + rows - 1 see."""
    low = row * 0
    low_all = low
    high = low + k_len
    high_all = high
    if LEFT:
        low = row + shift - window_left
        low_all = low + rows - 1
    if RIGHT:
        high_all = row + shift + window_right + 1
        high = high_all + rows - 1
    return seen_blocks(low, high, low_all, high_all, k_len, BLOCK)


@triton.jit
def query_blocks(col, cols, shift, q_len, window_left, window_right,
                 LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """seen_blocks of the queries that see the keys col .. col + cols - 1."""
    low = col * 0
    low_all = low
    high = low + q_len
    high_all = high
    if RIGHT:
        low = col - shift - window_right
        low_all = low + cols - 1
    if LEFT:
        high_all = col - shift + window_left + 1
        high = high_all + cols - 1
    return seen_blocks(low, high, low_all, high_all, q_len, BLOCK)


@triton.jit
def edge_block(index, first, first_whole, last_whole):
    """The block number `index` of those that are not whole: some before the whole ones, some behind them."""
    block = first + index
    return tl.where(block < first_whole, block, block + (last_whole - first_whole))


# --- scores ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tanh(x):
    """To an ulp: near zero the formula of the exponential has only absolute precision. Coefficients: a fit of
    (tanh(x) / x - 1) / x^2 for |x| < 0.55."""
    z = x * x
    near = -0.3333331644535065 + z * (
        0.13332565128803253 + z * (-0.053850289434194565 + z * (0.02106410823762417 - z * 0.006264324299991131))
    )
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return tl.where(tl.abs(x) < 0.55, x + x * (z * near), far)


@triton.jit
def scores(products, first_row, first_col, row_lanes, col_lanes, mask_ptr, mask_row, slope, shift, q_len,
           k_len, window_left, window_right, scale, softcap, softcap_inverse,
           MASK_COL: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
           EDGE: tl.constexpr):  # fmt: skip
    """(scores, tanh of the softcap) of q @ k^T. EDGE: the tile may have pairs that the bounds or the window hide."""
    rows = first_row + row_lanes
    cols = first_col + col_lanes
    s = products * scale
    capped = s
    if SOFTCAP:
        capped = _tanh(s * softcap_inverse)
        s = capped * softcap
    if ALIBI:
        s -= slope * tl.abs(cols - rows - shift).to(tl.float32)
    if mask_ptr is not None:
        at = mask_ptr + rows.to(tl.int64) * mask_row + cols.to(tl.int64) * MASK_COL
        if EDGE:
            value = tl.load(at, mask=(rows < q_len) & (cols < k_len), other=0)
        else:
            value = tl.load(at)
        if mask_ptr.dtype.element_ty == tl.uint8:
            s = tl.where(value != 0, s, float("-inf"))
        else:
            s += value.to(tl.float32)
    if EDGE:
        seen = (rows < q_len) & (cols < k_len)
        if LEFT:
            seen = seen & (cols >= rows + shift - window_left)
        if RIGHT:
            seen = seen & (cols <= rows + shift + window_right)
        s = tl.where(seen, s, float("-inf"))
    return s, capped


@triton.jit
def finite(row_max):
    """What is subtracted of the scores: those of a row without keys stay -inf."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)
