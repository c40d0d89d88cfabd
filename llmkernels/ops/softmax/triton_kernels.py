"""softmax and log_softmax in Triton: kernels and launchers, with the signatures of the raw ops.

A program takes one row in blocks of BLOCK_COLS, twice: for its top and sum, and for its result, which reads it again
from a cache unless it is one block.
"""

import torch
import triton
import triton.language as tl

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, as_rows, cast, split_scalar
from llmkernels.ops.softmax import sample_triton

MAX_BLOCK = 4096  # columns at a time: 16 values a thread with 8 warps
MASK_DIMS = 4


def config(cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps) for rows of `cols` columns."""
    block = min(triton.next_power_of_2(max(cols, 16)), MAX_BLOCK)
    return block, min(max(block // 512, 1), 8)


@triton.jit
def _scores(x_ptr, mask_ptr, at, cols, scale, MASK: tl.constexpr, ACC: tl.constexpr):
    """s of a block of columns; -inf beyond the row."""
    inside = at < cols
    s = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC) * scale
    if MASK == "bool":
        inside = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    elif MASK == "add":
        s += tl.load(mask_ptr + at, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, s, float("-inf"))


@triton.jit
def _softmax_fwd_kernel(
    x_ptr,  # [rows, cols] T, row stride x_stride
    mask_ptr,  # rows as of softmax.h; unused unless MASK
    y_ptr,  # [rows, cols] T
    scale,  # a scalar argument is fp32, so it comes in two parts whose sum it is: see split_scalar
    scale_rest,
    x_stride,
    size1, size2, size3,
    stride0, stride1, stride2, stride3,
    cols,
    MASK: tl.constexpr,
    LOG: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_COLS)
    scale = tl.full((), scale, ACC) + tl.full((), scale_rest, ACC)
    x_ptr += row * x_stride
    if MASK != "none":
        rest = row
        mask_ptr += (rest % size3) * stride3
        rest = rest // size3
        mask_ptr += (rest % size2) * stride2
        rest = rest // size2
        mask_ptr += (rest % size1) * stride1
        mask_ptr += (rest // size1) * stride0
    s = _scores(x_ptr, mask_ptr, lanes, cols, scale, MASK, ACC)
    top = tl.max(s, 0)
    nan = tl.max((s != s).to(tl.int32), 0)
    if not ONE_BLOCK:
        for start in range(BLOCK_COLS, cols, BLOCK_COLS):
            s = _scores(x_ptr, mask_ptr, start + lanes, cols, scale, MASK, ACC)
            top = tl.maximum(top, tl.max(s, 0))
            nan = tl.maximum(nan, tl.max((s != s).to(tl.int32), 0))
    # Not every maximum keeps a NaN.
    top = tl.where(nan != 0, float("nan"), top)
    dead = top == float("-inf")
    top = tl.where(dead, 0.0, top)
    if ONE_BLOCK:
        e = tl.exp(s - top)
        total = tl.sum(e, 0)
    else:
        sums = tl.zeros([BLOCK_COLS], ACC)
        for start in range(0, cols, BLOCK_COLS):
            sums += tl.exp(_scores(x_ptr, mask_ptr, start + lanes, cols, scale, MASK, ACC) - top)
        total = tl.sum(sums, 0)
    total = tl.where(dead, 1.0, total)
    log_total = tl.log(total)
    for start in range(0, cols, BLOCK_COLS):
        at = start + lanes
        if not ONE_BLOCK:
            s = _scores(x_ptr, mask_ptr, at, cols, scale, MASK, ACC)
        # Two subtractions: the sum of top and logarithm would lose digits.
        y = (s - top) - log_total if LOG else tl.exp(s - top) / total
        tl.store(y_ptr + row * cols + at, cast(y, y_ptr.dtype.element_ty), mask=at < cols)


@triton.jit
def _softmax_bwd_kernel(
    dy_ptr,  # [rows, cols] T, row stride dy_stride
    y_ptr,  # [rows, cols] T, row stride y_stride
    dx_ptr,  # [rows, cols] T; unused unless DX
    ds_ptr,  # [rows, cols] Acc; unused unless DS
    scale,  # in two parts
    scale_rest,
    dy_stride,
    y_stride,
    cols,
    LOG: tl.constexpr,
    DX: tl.constexpr,
    DS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ACC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_COLS)
    scale = tl.full((), scale, ACC) + tl.full((), scale_rest, ACC)
    sums = tl.zeros([BLOCK_COLS], ACC)
    for start in range(0, cols, BLOCK_COLS):
        at = start + lanes
        dy = tl.load(dy_ptr + row * dy_stride + at, mask=at < cols, other=0.0).to(ACC)
        y = tl.load(y_ptr + row * y_stride + at, mask=at < cols, other=0.0).to(ACC)
        if LOG:
            sums += tl.where(y == float("-inf"), 0.0, dy)
        else:
            sums += dy * y
    total = tl.sum(sums, 0)
    for start in range(0, cols, BLOCK_COLS):
        at = start + lanes
        dy = tl.load(dy_ptr + row * dy_stride + at, mask=at < cols, other=0.0).to(ACC)
        y = tl.load(y_ptr + row * y_stride + at, mask=at < cols, other=0.0).to(ACC)
        ds = tl.where(y == float("-inf"), 0.0, dy - tl.exp(y) * total) if LOG else y * (dy - total)
        if DX:
            tl.store(dx_ptr + row * cols + at, cast(ds * scale, dx_ptr.dtype.element_ty), mask=at < cols)
        if DS:
            tl.store(ds_ptr + row * cols + at, ds, mask=at < cols)


def _shape(x):
    cols = x.shape[-1] if x.dim() > 0 else 1
    return x.numel() // max(cols, 1), cols


def _mask_rows(mask, x, cols):
    """(mask, sizes, strides): its row for row r of x counts places of `sizes`, the last of which runs fastest."""
    if cols > 1 and (mask.dim() == 0 or mask.shape[-1] != cols or mask.stride(-1) != 1):
        mask = mask.expand(*mask.shape[:-1], cols).contiguous()
    for given in (mask, mask.expand(x.shape)):
        wide = given.expand(x.shape) if given is mask else given.contiguous()
        places = []
        for size, stride in zip(reversed(wide.shape[:-1]), reversed(wide.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if places and stride == places[-1][0] * places[-1][1]:
                places[-1] = (places[-1][0] * size, places[-1][1])
            else:
                places.append((size, stride))
        if len(places) <= MASK_DIMS:
            break
    places = [*places, *[(1, 0)] * (MASK_DIMS - len(places))][::-1]
    return wide, [size for size, _ in places], [stride for _, stride in places]


def softmax_fwd(x, mask, scale, log):
    rows, cols = _shape(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x_rows, x_stride = as_rows(x, rows, cols)
    kind, sizes, strides = "none", [1] * MASK_DIMS, [0] * MASK_DIMS
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "add"
        mask, sizes, strides = _mask_rows(mask, x, cols)
        mask = mask.view(torch.uint8) if kind == "bool" else mask
    block, warps = config(cols)
    with torch.cuda.device_of(x):
        _softmax_fwd_kernel[(rows,)](
            x_rows, x_rows if mask is None else mask, y, *split_scalar(scale), x_stride, *sizes[1:], *strides, cols,
            MASK=kind, LOG=log, ONE_BLOCK=cols <= block, BLOCK_COLS=block,
            ACC=TL_DTYPE[accumulate_dtype(x.dtype)], num_warps=warps,
        )  # fmt: skip
    return y


def softmax_bwd(dy, y, scale, log, wanted):
    rows, cols = _shape(y)
    acc = accumulate_dtype(y.dtype)
    dx = torch.empty(y.shape if wanted[0] else 0, dtype=y.dtype, device=y.device)
    ds = torch.empty(y.shape if wanted[1] else 0, dtype=acc, device=y.device)
    if y.numel() == 0 or not any(wanted):
        return dx, ds
    (dy_rows, dy_stride), (y_rows, y_stride) = as_rows(dy, rows, cols), as_rows(y, rows, cols)
    block, warps = config(cols)
    with torch.cuda.device_of(y):
        _softmax_bwd_kernel[(rows,)](
            dy_rows, y_rows, dx, ds, *split_scalar(scale), dy_stride, y_stride, cols,
            LOG=log, DX=wanted[0], DS=wanted[1], BLOCK_COLS=block, ACC=TL_DTYPE[acc], num_warps=warps,
        )  # fmt: skip
    return dx, ds


def configurations():
    """For testing/triton_aot.py: every block size and flag, and every dtype at least once."""
    yield from sample_triton.configurations()
    dtypes = ("bf16", "fp16", "fp32", "fp64")
    for index, cols in enumerate((16, 64, 256, 1024, 2048, 4096, 4097)):
        block, warps = config(cols)
        for offset, kind in enumerate(("none", "bool", "add")):
            data = dtypes[(index + offset) % 4]
            log, acc = offset % 2 == index % 2, tl.float64 if data == "fp64" else tl.float32
            wide = "fp64" if data == "fp64" else "fp32"
            constants = {"MASK": kind, "LOG": log, "ONE_BLOCK": cols <= block, "BLOCK_COLS": block, "ACC": acc}
            mask = "*u8" if kind == "bool" else data
            yield _softmax_fwd_kernel, [data, mask, data, *["scalar"] * 2, *["i64"] * 8, "i32"], constants, warps
            constants = {"LOG": log, "DX": True, "DS": offset != 1, "BLOCK_COLS": block, "ACC": acc}
            yield _softmax_bwd_kernel, [*[data] * 3, wide, *["scalar"] * 2, *["i64"] * 2, "i32"], constants, warps
