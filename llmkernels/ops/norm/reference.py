"""layer_norm and rms_norm in plain PyTorch: the `torch` backend, the maths written out, the truth in the tests.

Shapes: `x`, `residual`, `dy` are `[*rows, *normalized_shape]`; statistics are `[*rows]`, fp32 (fp64 for fp64 input).
Ba, Kiros, Hinton 2016, arXiv:1607.06450 (layer norm); Zhang, Sennrich 2019, arXiv:1910.07467 (RMS norm).
"""

import math

import torch
from torch import Tensor

from llmkernels import _random
from llmkernels._dtypes import accumulate_dtype


def _normalized_dims(normalized_shape) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


def _row_dims(x: Tensor, normalized_shape) -> tuple[int, ...]:
    return tuple(range(x.dim() - len(normalized_shape)))


def _per_row(statistic: Tensor, normalized_shape) -> Tensor:
    return statistic.reshape(*statistic.shape, *[1] * len(normalized_shape))


def _add(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The normed tensor, and what the op returns as new_residual (empty without a residual)."""
    if residual is None:
        return x, x.new_empty(0)
    total = x + residual
    return total, total


def dropped(x: Tensor, seed: Tensor, normalized_shape, dropout_p: float) -> Tensor:
    """`x` after dropout, rounded to its dtype. The row and the column of an element say whether it is kept."""
    dims = len(normalized_shape)
    leading = x.shape[: x.dim() - dims]
    rows = _per_row(torch.arange(math.prod(leading), device=x.device).view(leading), normalized_shape)
    columns = torch.arange(math.prod(normalized_shape), device=x.device).view(tuple(normalized_shape))
    keep = _random.keep(seed, rows, columns, dropout_p)
    return torch.where(keep, x * _random.keep_scale(dropout_p), 0.0)


def layer_norm(x, residual, weight, bias, normalized_shape, eps):
    """The differentiable formula: y, or (y, new_residual) with a residual."""
    y, new_residual, _, _ = layer_norm_fwd(x, residual, weight, bias, normalized_shape, eps)
    return y if residual is None else (y, new_residual)


def rms_norm(x, residual, weight, normalized_shape, eps, weight_offset):
    """The differentiable formula: y, or (y, new_residual) with a residual."""
    y, new_residual, _ = rms_norm_fwd(x, residual, weight, normalized_shape, eps, weight_offset)
    return y if residual is None else (y, new_residual)


def layer_norm_fwd(x, residual, weight, bias, normalized_shape, eps):
    """Returns (y, new_residual, mean, rstd)."""
    x, new_residual = _add(x, residual)
    dims, acc = _normalized_dims(normalized_shape), accumulate_dtype(x.dtype)
    wide = x.to(acc)
    mean = wide.mean(dims, keepdim=True)
    centered = wide - mean
    # The mean of fp32 values can be off by half an ulp of the values, which shows when they are far from zero.
    correction = centered.mean(dims, keepdim=True)
    centered = centered - correction
    rstd = torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)
    y = centered * rstd
    if weight is not None:
        y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    stats_shape = x.shape[: x.dim() - len(normalized_shape)]
    return y.to(x.dtype), new_residual, (mean + correction).reshape(stats_shape), rstd.reshape(stats_shape)


def rms_norm_fwd(x, residual, weight, normalized_shape, eps, weight_offset):
    """Returns (y, new_residual, rstd)."""
    x, new_residual = _add(x, residual)
    dims, acc = _normalized_dims(normalized_shape), accumulate_dtype(x.dtype)
    wide = x.to(acc)
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + eps)
    y = wide * rstd
    if weight is not None:
        y = y * (weight.to(acc) + weight_offset)
    return y.to(x.dtype), new_residual, rstd.reshape(x.shape[: x.dim() - len(normalized_shape)])


def layer_norm_bwd(dy, dresidual, x, weight, mean, rstd, normalized_shape, wanted):
    """Returns (dx, dweight, dbias); what is not wanted is an empty tensor. `x` is the tensor that was normed."""
    acc = accumulate_dtype(x.dtype)
    dims, centered = _normalized_dims(normalized_shape), x.to(acc) - _per_row(mean, normalized_shape)
    centered = centered - centered.mean(dims, keepdim=True)
    xhat = centered * _per_row(rstd, normalized_shape)
    return _bwd(dy, dresidual, x, xhat, weight, 0.0, rstd, normalized_shape, wanted, subtract_mean=True)


def rms_norm_bwd(dy, dresidual, x, weight, rstd, normalized_shape, weight_offset, wanted):
    """Returns (dx, dweight); what is not wanted is an empty tensor. `x` is the tensor that was normed."""
    xhat = x.to(accumulate_dtype(x.dtype)) * _per_row(rstd, normalized_shape)
    wanted = (*wanted, False)
    return _bwd(dy, dresidual, x, xhat, weight, weight_offset, rstd, normalized_shape, wanted, subtract_mean=False)[:2]


def _bwd(dy, dresidual, x, xhat, weight, weight_offset, rstd, normalized_shape, wanted, *, subtract_mean):
    dims, rows = _normalized_dims(normalized_shape), _row_dims(x, normalized_shape)
    acc = xhat.dtype
    dy = dy.to(acc)
    dx, dweight, dbias = (x.new_empty(0) for _ in range(3))
    if wanted[0]:
        g = dy if weight is None else dy * (weight.to(acc) + weight_offset)
        wide = g - xhat * (g * xhat).mean(dims, keepdim=True)
        if subtract_mean:
            wide = wide - g.mean(dims, keepdim=True)
        wide = wide * _per_row(rstd, normalized_shape)
        if dresidual is not None:
            wide = wide + dresidual.to(acc)
        dx = wide.to(x.dtype)
    weight_dtype = x.dtype if weight is None else weight.dtype
    if wanted[1]:
        dweight = ((dy * xhat).sum(rows) if rows else dy * xhat).to(weight_dtype)
    if wanted[2]:
        dbias = (dy.sum(rows) if rows else dy).to(weight_dtype)
    return dx, dweight, dbias


def dropout_add_layer_norm_fwd(x, residual, weight, bias, seed, normalized_shape, eps, dropout_p):
    """Returns (y, new_residual, mean, rstd)."""
    x = dropped(x, seed, normalized_shape, dropout_p)
    return layer_norm_fwd(x, residual, weight, bias, normalized_shape, eps)


def dropout_add_layer_norm_bwd(dy, dsum, s, weight, mean, rstd, seed, normalized_shape, dropout_p, wanted):
    """Returns (dx, dresidual, dweight, dbias); what is not wanted is an empty tensor."""
    of_norm = (wanted[0] or wanted[1], wanted[2], wanted[3])
    ds, *rest = layer_norm_bwd(dy, dsum, s, weight, mean, rstd, normalized_shape, of_norm)
    return (*_of_addends(ds, seed, normalized_shape, dropout_p, wanted), *rest)


def dropout_add_rms_norm_fwd(x, residual, weight, seed, normalized_shape, eps, weight_offset, dropout_p):
    """Returns (y, new_residual, rstd)."""
    x = dropped(x, seed, normalized_shape, dropout_p)
    return rms_norm_fwd(x, residual, weight, normalized_shape, eps, weight_offset)


def dropout_add_rms_norm_bwd(dy, dsum, s, weight, rstd, seed, normalized_shape, weight_offset, dropout_p, wanted):
    """Returns (dx, dresidual, dweight); what is not wanted is an empty tensor."""
    of_norm = (wanted[0] or wanted[1], wanted[2])
    ds, *rest = rms_norm_bwd(dy, dsum, s, weight, rstd, normalized_shape, weight_offset, of_norm)
    return (*_of_addends(ds, seed, normalized_shape, dropout_p, wanted), *rest)


def _of_addends(ds, seed, normalized_shape, dropout_p, wanted):
    dx = dropped(ds, seed, normalized_shape, dropout_p) if wanted[0] else ds.new_empty(0)
    return dx, ds if wanted[1] else ds.new_empty(0)
