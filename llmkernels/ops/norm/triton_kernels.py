"""layer_norm and rms_norm in Triton: kernels and launchers, with the signatures of the raw ops.

A row is read in blocks of BLOCK_COLS. Up to MAX_BLOCK columns it is one block and stays in registers: each tensor is
read and written once. Longer rows are read again for the second pass. No atomics: the backward runs a fixed grid of
programs, each sums dweight and dbias over its own rows into its own line of a workspace, and a second kernel adds the
lines in order, so results are bitwise the same from run to run on one device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, as_rows, cast, split_scalar

MAX_BLOCK = 8192  # columns held in registers at a time: 32 values a thread with 8 warps


def config(cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps) for rows of `cols` columns. 16 to 32 values a thread keep loads in flight, no spills."""
    block = min(triton.next_power_of_2(max(cols, 16)), MAX_BLOCK)
    return block, min(max(block // 512, 1), 16)


@triton.jit
def _norm_fwd_kernel(
    x_ptr,  # [rows, cols] T, row stride x_stride
    residual_ptr,  # [rows, cols] T, row stride residual_stride; unused unless ADD
    weight_ptr,  # [cols] W; unused unless HAS_WEIGHT
    bias_ptr,  # [cols] W; unused unless HAS_BIAS
    y_ptr,  # [rows, cols] T
    sum_ptr,  # [rows, cols] T: x + residual; unused unless ADD
    mean_ptr,  # [rows] Acc; unused if RMS
    rstd_ptr,  # [rows] Acc
    eps,  # a scalar argument is fp32, so each comes in two parts whose sum it is: see split_scalar
    eps_rest,
    weight_offset,
    weight_offset_rest,
    x_stride,
    residual_stride,
    cols,
    RMS: tl.constexpr,
    ADD: tl.constexpr,
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


@triton.jit
def _norm_bwd_kernel(
    dy_ptr,  # [rows, cols] T, row stride dy_stride
    dresidual_ptr,  # [rows, cols] T, row stride dresidual_stride; unused unless ADD
    x_ptr,  # [rows, cols] T, row stride x_stride: the s of the forward
    weight_ptr,  # [cols] W; unused unless HAS_WEIGHT
    mean_ptr,  # [rows] Acc; unused if RMS
    rstd_ptr,  # [rows] Acc
    dx_ptr,  # [rows, cols] T; unused unless DX
    dweight_ptr,  # [programs, cols] Acc, zeros: this program's line; unused unless DWEIGHT
    dbias_ptr,  # [programs, cols] Acc, zeros; unused unless DBIAS
    weight_offset,  # in two parts
    weight_offset_rest,
    dy_stride,
    dresidual_stride,
    x_stride,
    rows,
    cols,
    RMS: tl.constexpr,
    ADD: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    DX: tl.constexpr,
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
            if ONE_BLOCK:
                dweight += dy * xhat
                dbias += dy
            else:
                # Every thread reads back only what it wrote itself: same lanes, same block.
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


_REDUCE_COLS = 128


def _size(x: Tensor, normalized_shape) -> tuple[int, int]:
    cols = 1
    for size in normalized_shape:
        cols *= size
    rows = 1
    for size in x.shape[: x.dim() - len(normalized_shape)]:
        rows *= size
    return rows, cols


def bwd_programs(rows: int, device: torch.device) -> int:
    """Programs of the backward: two for each multiprocessor; a few in the interpreter. Never more than rows."""
    if device.type != "cuda":
        return min(rows, 4)
    return min(rows, 2 * torch.cuda.get_device_properties(device).multi_processor_count)


def _fwd(x, residual, weight, bias, normalized_shape, eps, weight_offset, *, rms):
    rows, cols = _size(x, normalized_shape)
    acc = accumulate_dtype(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new_residual = torch.empty(x.shape if residual is not None else 0, dtype=x.dtype, device=x.device)
    stats = x.shape[: x.dim() - len(normalized_shape)]
    mean, rstd = (torch.empty(stats, dtype=acc, device=x.device) for _ in range(2))
    if cols == 0:  # as torch: the statistics of nothing
        mean.fill_(float("nan"))
        rstd.fill_(float("nan"))
    elif rows > 0:
        flat, x_stride = as_rows(x, rows, cols)
        added, residual_stride = as_rows(residual, rows, cols)
        block, warps = config(cols)
        with torch.cuda.device_of(x):
            _norm_fwd_kernel[(rows,)](
                flat, added, weight, bias, y, new_residual, mean, rstd,
                *split_scalar(eps), *split_scalar(weight_offset), x_stride, residual_stride, cols,
                RMS=rms, ADD=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
                ONE_BLOCK=cols <= block, BLOCK_COLS=block, ACC=TL_DTYPE[acc], num_warps=warps,
            )  # fmt: skip
    return y, new_residual, mean, rstd


def _bwd(dy, dresidual, x, weight, mean, rstd, normalized_shape, weight_offset, wanted, *, rms):
    rows, cols = _size(x, normalized_shape)
    acc = accumulate_dtype(x.dtype)
    parameter_dtype = x.dtype if weight is None else weight.dtype
    outputs = [torch.empty(x.shape if wanted[0] else 0, dtype=x.dtype, device=x.device)]
    for want in wanted[1:]:
        dtype = parameter_dtype if want else x.dtype
        outputs.append(torch.zeros(tuple(normalized_shape) if want else 0, dtype=dtype, device=x.device))
    if rows == 0 or cols == 0:
        return outputs
    programs = bwd_programs(rows, x.device)
    partial = [torch.zeros((programs, cols), dtype=acc, device=x.device) if want else None for want in wanted[1:]]
    (grad, dy_stride), (flat, x_stride), (arriving, dresidual_stride) = (
        as_rows(tensor, rows, cols) for tensor in (dy, x, dresidual)
    )
    block, warps = config(cols)
    with torch.cuda.device_of(x):
        _norm_bwd_kernel[(programs,)](
            grad, arriving, flat, weight, mean, rstd, outputs[0], partial[0], partial[1], *split_scalar(weight_offset),
            dy_stride, dresidual_stride, x_stride, rows, cols,
            RMS=rms, ADD=dresidual is not None, HAS_WEIGHT=weight is not None,
            DX=wanted[0], DWEIGHT=wanted[1], DBIAS=wanted[2],
            ONE_BLOCK=cols <= block, BLOCK_COLS=block, ACC=TL_DTYPE[acc], num_warps=warps,
        )  # fmt: skip
        for lines, out in zip(partial, outputs[1:], strict=True):
            if lines is not None:
                grid = (triton.cdiv(cols, _REDUCE_COLS),)
                _norm_reduce_kernel[grid](
                    lines, out, programs, cols, BLOCK_COLS=_REDUCE_COLS, ACC=TL_DTYPE[acc], num_warps=4
                )
    return outputs


def _contiguous(*tensors):
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def layer_norm_fwd(x, residual, weight, bias, normalized_shape, eps):
    weight, bias = _contiguous(weight, bias)
    return _fwd(x, residual, weight, bias, normalized_shape, eps, 0.0, rms=False)


def layer_norm_bwd(dy, dresidual, x, weight, mean, rstd, normalized_shape, wanted):
    weight, mean, rstd = _contiguous(weight, mean, rstd)
    return tuple(_bwd(dy, dresidual, x, weight, mean, rstd, normalized_shape, 0.0, wanted, rms=False))


def rms_norm_fwd(x, residual, weight, normalized_shape, eps, weight_offset):
    (weight,) = _contiguous(weight)
    y, new_residual, _, rstd = _fwd(x, residual, weight, None, normalized_shape, eps, weight_offset, rms=True)
    return y, new_residual, rstd


def rms_norm_bwd(dy, dresidual, x, weight, rstd, normalized_shape, weight_offset, wanted):
    weight, rstd = _contiguous(weight, rstd)
    wanted = (*wanted, False)
    return tuple(_bwd(dy, dresidual, x, weight, None, rstd, normalized_shape, weight_offset, wanted, rms=True)[:2])


def configurations():
    """For testing/triton_aot.py: every block size, and every flag at least once."""
    kinds = (("bf16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp64", "fp64"))
    lengths = (10, 600, 1500, 3000, 8192, 8193)
    for index, cols in enumerate(lengths):
        block, warps = config(cols)
        data, weight = kinds[index % 4]
        acc = "fp64" if data == "fp64" else "fp32"
        shared = {"ONE_BLOCK": cols <= block, "BLOCK_COLS": block, "ACC": tl.float64 if acc == "fp64" else tl.float32}
        for rms in (False, True):
            flags = {"RMS": rms, "ADD": index % 2 == 0, "HAS_WEIGHT": True}
            types = [data, data, weight, weight, data, data, acc, acc, *["scalar"] * 4, "i64", "i64", "i32"]
            yield _norm_fwd_kernel, types, {**flags, "HAS_BIAS": not rms, **shared}, warps
            types = [data, data, data, weight, acc, acc, data, acc, acc, "scalar", "scalar"]
            types += ["i64", "i64", "i64", "i32", "i32"]
            yield (
                _norm_bwd_kernel,
                types,
                {**flags, "DX": True, "DWEIGHT": True, "DBIAS": not rms, **shared},
                warps,
            )
        reduce = {"BLOCK_COLS": _REDUCE_COLS, "ACC": shared["ACC"]}
        yield _norm_reduce_kernel, [acc, weight, "i32", "i32"], reduce, 4
