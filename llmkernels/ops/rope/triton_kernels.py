"""rope in Triton: the kernel and its launchers, with the signatures of the raw ops.

A program takes BLOCK_HEADS heads of q or of k at one place, and BLOCK of their pairs at a time: the heads share the row
of cos and sin in registers.
"""

import torch
import triton
import triton.language as tl

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, cast

MAX_BLOCK = 256  # pairs of a head at a time
PROGRAM_PAIRS = 1024  # pairs at a time: 8 values of each half a thread
THREAD_PAIRS = 8


def config(half: int, heads: int) -> tuple[int, int, int]:
    """(BLOCK, BLOCK_HEADS, num_warps) for `half` pairs and at most `heads` heads of a tensor."""
    block = min(triton.next_power_of_2(max(half, 8)), MAX_BLOCK)
    block_heads = min(triton.next_power_of_2(max(heads, 1)), max(PROGRAM_PAIRS // block, 1), 16)
    return block, block_heads, max(block * block_heads // (32 * THREAD_PAIRS), 1)


@triton.jit
def _rope_kernel(
    q_ptr,  # [batch, seq, q_heads, cols] T
    k_ptr,  # [batch, seq, k_heads, cols] T; unused if k_heads is 0
    yq_ptr,  # as q and k: the results, which may be in their place
    yk_ptr,
    cos_ptr,  # [length, half] or [batch, seq, half] W
    sin_ptr,
    positions_ptr,  # [batch, seq] int64 or int32; unused unless POSITIONS
    q_batch_stride, q_seq_stride, q_head_stride,
    k_batch_stride, k_seq_stride, k_head_stride,
    yq_batch_stride, yq_seq_stride, yq_head_stride,
    yk_batch_stride, yk_seq_stride, yk_head_stride,
    cos_batch_stride, cos_row_stride,
    sin_batch_stride, sin_row_stride,
    position_batch_stride, position_seq_stride,
    seq, q_heads, k_heads, cols, half, length,
    POSITIONS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    INPLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    q_blocks = tl.cdiv(q_heads, BLOCK_HEADS)
    blocks = q_blocks + tl.cdiv(k_heads, BLOCK_HEADS)
    token = tl.program_id(0) // blocks
    part = tl.program_id(0) % blocks
    batch = (token // seq).to(tl.int64)
    place = (token % seq).to(tl.int64)
    if part < q_blocks:
        heads = part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        count = q_heads
        x_ptr = q_ptr + batch * q_batch_stride + place * q_seq_stride
        y_ptr = yq_ptr + batch * yq_batch_stride + place * yq_seq_stride
        x_head_stride = q_head_stride
        y_head_stride = yq_head_stride
    else:
        heads = (part - q_blocks) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        count = k_heads
        x_ptr = k_ptr + batch * k_batch_stride + place * k_seq_stride
        y_ptr = yk_ptr + batch * yk_batch_stride + place * yk_seq_stride
        x_head_stride = k_head_stride
        y_head_stride = yk_head_stride
    heads_mask = heads < count
    x_rows = heads.to(tl.int64) * x_head_stride
    y_rows = heads.to(tl.int64) * y_head_stride

    row = place
    inside = place < length
    if POSITIONS:
        row = tl.load(positions_ptr + batch * position_batch_stride + place * position_seq_stride).to(tl.int64)
        inside = (row >= 0) & (row < length)
        row = tl.where(inside, row, 0)
    cos_ptr += batch * cos_batch_stride + row * cos_row_stride
    sin_ptr += batch * sin_batch_stride + row * sin_row_stride
    for start in range(0, half, BLOCK):
        at = start + tl.arange(0, BLOCK)
        # A row that the table has not is NaN.
        c = tl.load(cos_ptr + at, mask=(at < half) & inside, other=float("nan")).to(ACC)[None, :]
        s = tl.load(sin_ptr + at, mask=(at < half) & inside, other=float("nan")).to(ACC)[None, :]
        if INVERSE:
            s = -s
        mask = heads_mask[:, None] & (at < half)[None, :]
        if INTERLEAVED:  # whole pieces of memory, taken apart in registers
            both = 2 * start + tl.arange(0, 2 * BLOCK)
            both_mask = heads_mask[:, None] & (both < 2 * half)[None, :]
            pairs = tl.load(x_ptr + x_rows[:, None] + both[None, :], mask=both_mask, other=0.0)
            a, b = tl.split(tl.reshape(pairs, [BLOCK_HEADS, BLOCK, 2]))
        else:
            a = tl.load(x_ptr + x_rows[:, None] + at[None, :], mask=mask, other=0.0)
            b = tl.load(x_ptr + x_rows[:, None] + half + at[None, :], mask=mask, other=0.0)
        if INPLACE:
            # A block smaller than a warp is loaded several times over, by threads of which one stores.
            tl.debug_barrier()
        a = a.to(ACC)
        b = b.to(ACC)
        ya = cast(a * c - b * s, y_ptr.dtype.element_ty)
        yb = cast(b * c + a * s, y_ptr.dtype.element_ty)
        if INTERLEAVED:
            tl.store(y_ptr + y_rows[:, None] + both[None, :], tl.interleave(ya, yb), mask=both_mask)
        else:
            tl.store(y_ptr + y_rows[:, None] + at[None, :], ya, mask=mask)
            tl.store(y_ptr + y_rows[:, None] + half + at[None, :], yb, mask=mask)
    if not INPLACE:
        for start in range(2 * half, cols, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = heads_mask[:, None] & (at < cols)[None, :]
            tl.store(
                y_ptr + y_rows[:, None] + at[None, :],
                tl.load(x_ptr + x_rows[:, None] + at[None, :], mask=mask, other=0.0),
                mask=mask,
            )


def _unit(x):
    return x.shape[-1] <= 1 or x.stride(-1) == 1


def _strides(x, seq_dim):
    """Of the batch, the sequence and the heads."""
    if x is None:
        return 0, 0, 0
    return (
        x.stride(0) if x.dim() == 4 else 0,
        x.stride(seq_dim),
        x.stride(-5 - seq_dim) if x.dim() >= 3 else 0,
    )


def _run(q, k, results, cos, sin, positions, seq_dim, interleaved, inverse):
    """Writes the turned `q` and `k` into `results`, which may be these."""
    sources = [x if x is None or _unit(x) else x.contiguous() for x in (q, k)]
    targets = []
    for x, source, result in zip((q, k), sources, results, strict=True):
        inplace = result is x
        targets.append(
            result
            if x is None or _unit(result)
            else source
            if inplace
            else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        )
    cos, sin = (table if _unit(table) else table.contiguous() for table in (cos, sin))
    seq, half, cols = q.shape[seq_dim], cos.shape[-1], q.shape[-1]
    batch = q.shape[0] if q.dim() == 4 else 1
    heads = [0 if x is None else x.shape[-5 - seq_dim] if x.dim() >= 3 else 1 for x in (q, k)]
    if batch * seq * sum(heads) > 0:
        block, block_heads, warps = config(half, max(heads))
        programs = batch * seq * sum(triton.cdiv(count, block_heads) for count in heads)
        pointers = [q if x is None else x for x in (*sources, *targets)]
        tables = [table.stride(0) if table.dim() == 3 else 0 for table in (cos, sin)]
        batched = positions is not None and positions.dim() == 2
        with torch.cuda.device_of(q):
            _rope_kernel[(programs,)](
                *pointers, cos, sin, q if positions is None else positions,
                *_strides(sources[0], seq_dim), *_strides(sources[1], seq_dim),
                *_strides(targets[0], seq_dim), *_strides(targets[1], seq_dim),
                tables[0], cos.stride(-2), tables[1], sin.stride(-2),
                positions.stride(0) if batched else 0, 0 if positions is None else positions.stride(-1),
                seq, *heads, cols, half, cos.shape[-2],
                POSITIONS=positions is not None, INTERLEAVED=interleaved, INVERSE=inverse,
                INPLACE=results[0] is q,
                BLOCK=block, BLOCK_HEADS=block_heads, ACC=TL_DTYPE[accumulate_dtype(q.dtype)], num_warps=warps,
            )  # fmt: skip
    for result, target in zip(results, targets, strict=True):
        if result is not None and result is not target:
            result.copy_(target)


def _out_of_place(q, k, cos, sin, positions, seq_dim, interleaved, inverse):
    results = torch.empty_like(q), None if k is None else torch.empty_like(k)
    _run(q, k, results, cos, sin, positions, seq_dim, interleaved, inverse)
    return results[0], q.new_empty(0) if k is None else results[1]


def rope_fwd(q, k, cos, sin, positions, seq_dim, interleaved):
    return _out_of_place(q, k, cos, sin, positions, seq_dim, interleaved, False)


def rope_bwd(dq, dk, cos, sin, positions, seq_dim, interleaved):
    return _out_of_place(dq, dk, cos, sin, positions, seq_dim, interleaved, True)


def rope_fwd_(q, k, cos, sin, positions, seq_dim, interleaved):
    _run(q, k, (q, k), cos, sin, positions, seq_dim, interleaved, False)


def configurations():
    """For testing/triton_aot.py: every block size and flag, and every dtype at least once."""
    dtypes, tables = ("bf16", "fp16", "fp32", "fp64"), ("fp32", "fp16", "fp32", "fp64")
    for index, half in enumerate((4, 16, 32, 64, 128, 256, 257)):
        for heads in (1, 8, 32):
            block, block_heads, warps = config(half, heads)
            data, table = dtypes[(index + heads) % 4], tables[(index + heads) % 4]
            flags = {
                "POSITIONS": heads != 8,
                "INTERLEAVED": index % 2 == 0,
                "INVERSE": heads == 1,
                "INPLACE": heads == 8,
            }
            constants = {**flags, "BLOCK": block, "BLOCK_HEADS": block_heads}
            constants["ACC"] = tl.float64 if data == "fp64" else tl.float32
            types = [*[data] * 4, *[table] * 2, "*i64", *["i64"] * 18, *["i32"] * 6]
            yield _rope_kernel, types, constants, warps
