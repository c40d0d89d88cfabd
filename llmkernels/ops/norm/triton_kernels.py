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

from llmkernels import _random
from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import TL_DTYPE, as_rows, bits_of, split_scalar
from llmkernels.ops.norm.triton_bwd import _norm_bwd_kernel, _norm_reduce_kernel
from llmkernels.ops.norm.triton_fwd import _norm_fwd_kernel

MAX_BLOCK = 8192  # columns held in registers at a time: 32 values a thread with 8 warps


def config(cols: int) -> tuple[int, int]:
    """(BLOCK_COLS, num_warps) for rows of `cols` columns. 16 to 32 values a thread keep loads in flight, no spills."""
    block = min(triton.next_power_of_2(max(cols, 16)), MAX_BLOCK)
    return block, min(max(block // 512, 1), 16)


def bwd_config(cols: int, dropout: bool) -> tuple[int, int]:
    """`config` of the backward: with dropout 16 warps have too few registers (8 bytes spilled on sm_100)."""
    return config(min(cols, MAX_BLOCK // 2) if dropout else cols)


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


def _dropout(dropout_p: float) -> tuple[int, int]:
    """The arguments `threshold` and `keep_scale`."""
    # With p = 1 nothing is kept, and nothing scaled.
    return _random.threshold(dropout_p), bits_of(_random.keep_scale(dropout_p) or 1.0)


def _fwd(x, residual, weight, bias, normalized_shape, eps, weight_offset, *, rms, seed=None, dropout_p=0.0):
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
                *split_scalar(eps), *split_scalar(weight_offset), seed, *_dropout(dropout_p),
                x_stride, residual_stride, cols, RMS=rms, ADD=residual is not None, DROPOUT=seed is not None,
                HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
                ONE_BLOCK=cols <= block, BLOCK_COLS=block, ACC=TL_DTYPE[acc], num_warps=warps,
            )  # fmt: skip
    return y, new_residual, mean, rstd


def _bwd(dy, dresidual, x, weight, mean, rstd, normalized_shape, weight_offset, wanted, *, rms, dropped=None, seed=None,
         dropout_p=0.0):  # fmt: skip
    """dx, dweight, dbias; fills `dropped` with the part of dx that dropout let through, unless it is None."""
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
    block, warps = bwd_config(cols, dropped is not None)
    with torch.cuda.device_of(x):
        _norm_bwd_kernel[(programs,)](
            grad, arriving, flat, weight, mean, rstd, outputs[0], dropped, partial[0], partial[1],
            *split_scalar(weight_offset), seed, *_dropout(dropout_p), dy_stride, dresidual_stride, x_stride, rows, cols,
            RMS=rms, ADD=dresidual is not None, HAS_WEIGHT=weight is not None,
            DX=wanted[0], DROPOUT=dropped is not None, DWEIGHT=wanted[1], DBIAS=wanted[2],
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


def dropout_add_layer_norm_fwd(x, residual, weight, bias, seed, normalized_shape, eps, dropout_p):
    weight, bias = _contiguous(weight, bias)
    return _fwd(x, residual, weight, bias, normalized_shape, eps, 0.0, rms=False, seed=seed, dropout_p=dropout_p)


def dropout_add_layer_norm_bwd(dy, dsum, s, weight, mean, rstd, seed, normalized_shape, dropout_p, wanted):
    weight, mean, rstd = _contiguous(weight, mean, rstd)
    return _dropout_bwd(dy, dsum, s, weight, mean, rstd, seed, normalized_shape, 0.0, dropout_p, wanted, rms=False)


def dropout_add_rms_norm_fwd(x, residual, weight, seed, normalized_shape, eps, weight_offset, dropout_p):
    (weight,) = _contiguous(weight)
    settings = {"rms": True, "seed": seed, "dropout_p": dropout_p}
    y, new_residual, _, rstd = _fwd(x, residual, weight, None, normalized_shape, eps, weight_offset, **settings)
    return y, new_residual, rstd


def dropout_add_rms_norm_bwd(dy, dsum, s, weight, rstd, seed, normalized_shape, weight_offset, dropout_p, wanted):
    weight, rstd = _contiguous(weight, rstd)
    settings = (normalized_shape, weight_offset, dropout_p, (*wanted, False))
    return _dropout_bwd(dy, dsum, s, weight, None, rstd, seed, *settings, rms=True)[:3]


def _dropout_bwd(dy, dsum, s, weight, mean, rstd, seed, normalized_shape, weight_offset, dropout_p, wanted, *, rms):
    """dx, dresidual, dweight, dbias: dx is computed from dresidual, which is that of the sum."""
    dropped = torch.empty(s.shape, dtype=s.dtype, device=s.device) if wanted[0] else None
    of_norm = (wanted[0] or wanted[1], *wanted[2:])
    settings = {"rms": rms, "dropped": dropped, "seed": seed, "dropout_p": dropout_p}
    ds, *rest = _bwd(dy, dsum, s, weight, mean, rstd, normalized_shape, weight_offset, of_norm, **settings)
    return (s.new_empty(0) if dropped is None else dropped, ds if wanted[1] else s.new_empty(0), *rest)


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
            flags = {"RMS": rms, "ADD": index % 2 == 0, "DROPOUT": index % 2 == 0, "HAS_WEIGHT": True}
            dropout = ["*i64", "i32", "i64"]
            types = [data, data, weight, weight, data, data, acc, acc, *["scalar"] * 4, *dropout, "i64", "i64", "i32"]
            yield _norm_fwd_kernel, types, {**flags, "HAS_BIAS": not rms, **shared}, warps
            types = [data, data, data, weight, acc, acc, data, data, acc, acc, "scalar", "scalar", *dropout]
            types += ["i64", "i64", "i64", "i32", "i32"]
            bwd_block, bwd_warps = bwd_config(cols, flags["DROPOUT"])
            sizes = {"ONE_BLOCK": cols <= bwd_block, "BLOCK_COLS": bwd_block}
            flags |= {"DX": True, "DWEIGHT": True, "DBIAS": not rms}
            yield _norm_bwd_kernel, types, {**flags, **shared, **sizes}, bwd_warps
        reduce = {"BLOCK_COLS": _REDUCE_COLS, "ACC": shared["ACC"]}
        yield _norm_reduce_kernel, [acc, weight, "i32", "i32"], reduce, 4
