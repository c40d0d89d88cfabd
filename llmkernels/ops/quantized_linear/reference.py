"""quantized_linear in plain PyTorch: the `torch` backend, and the definition that the kernels are tested against.

    y[m, n]  =  sum_k x[m, k] * weight[n, k]  +  bias[n]            weight as its format's file says

Without rounded activations the weight is written out in the dtype of x, and torch multiplies. With them, the row x[m]
is x_scale[m] * xq[m], and integers (int8) or fp8 numbers are multiplied:

    y[m, n]  =  x_scale[m] * sum_g scales[n, g] * sum_{k in g} xq[m, k] * (q[n, k] - zeros[n, g])  +  bias[n]

Each inner sum of integers is exact; those of different groups are added in fp32.
"""

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype, without_autocast
from llmkernels.quantization import _groups, fp8, int4, int8, nf4
from llmkernels.quantization.tensor import QuantizedTensor

FORMATS = {"int8": int8, "int4": int4, "nf4": nf4, "fp8": fp8}


def weight_of(columns: int, data: Tensor, scales: Tensor, zeros: Tensor | None, second_scales: Tensor | None,
              format: str, group_size: int, activations: str = "") -> QuantizedTensor:  # fmt: skip
    """The weight as its parts are passed to kernels: a whole row is group 0, activations as they are ""."""
    shape = (data.shape[0], columns)
    parts = (data, scales, torch.float32, zeros, second_scales)
    return QuantizedTensor(format, shape, *parts, group_size or None, activations or None)


def linear_fwd(x: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, second_scales: Tensor | None,
               bias: Tensor | None, format: str, group_size: int, activations: str) -> Tensor:  # fmt: skip
    """x `[M, K]`, bias `[N]` of its dtype: y `[M, N]`."""
    weight = weight_of(x.shape[1], data, scales, zeros, second_scales, format, group_size, activations)
    with without_autocast(x.device):
        if not activations:
            return torch_functional.linear(x, FORMATS[format].dequantize(weight, x.dtype), bias)
        y = _integers(x, weight) if activations == "int8" else _fp8(x, weight)
        return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _integers(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """int8 activations: exact sums of integers for each group, in fp32 (fp64 for fp64) from there."""
    acc, columns = accumulate_dtype(x.dtype), weight.shape[1]
    values, x_scales = int8.quantize_rows(x)
    if weight.format == "int8":
        sums = int8.integer_product(values, weight.data).to(acc)
        return sums * (x_scales.to(acc) * weight.scales.to(acc))
    codes = int4.unpack(weight.data, columns).to(torch.int8)
    zeros = int4.MIDDLE if weight.zeros is None else weight.zeros.to(torch.int8)
    if weight.zeros is not None:
        zeros = _groups.spread(zeros, columns, weight.group_size)
    groups = (_groups.split(part, weight.group_size) for part in (values, codes - zeros))
    y = x.new_zeros(x.shape[0], weight.shape[0], dtype=acc)
    for xq, q, scale in zip(*(part.unbind(1) for part in groups), weight.scales.to(acc).unbind(1), strict=True):
        y = y + int8.integer_product(xq, q).to(acc) * scale
    return y * x_scales.to(acc)


def _fp8(x: Tensor, weight: QuantizedTensor) -> Tensor:
    """fp8 activations: products of fp8 numbers, added in fp32 (fp64 for fp64)."""
    acc = accumulate_dtype(x.dtype)
    values, x_scales = fp8.quantize_rows(x)
    if weight.group_size is None:
        return values.to(acc) @ weight.data.to(acc).t() * (x_scales.to(acc) * weight.scales.to(acc))
    return values.to(acc) @ fp8.dequantize(weight, acc).t() * x_scales.to(acc)


def linear_bwd(dy: Tensor, data: Tensor, scales: Tensor, zeros: Tensor | None, second_scales: Tensor | None,
               columns: int, format: str, group_size: int) -> Tensor:  # fmt: skip
    """dx = dy @ weight, `[M, K]`. Rounding of activations passes gradients through as they are."""
    weight = weight_of(columns, data, scales, zeros, second_scales, format, group_size)
    with without_autocast(dy.device):
        return dy @ FORMATS[format].dequantize(weight, dy.dtype)


def formula(x: Tensor, bias: Tensor | None, data: Tensor, scales: Tensor, zeros: Tensor | None,
            second_scales: Tensor | None, format: str, group_size: int, activations: str) -> Tensor:  # fmt: skip
    """The same with derivatives of every order: that of the rounding of activations is taken to be one."""
    if activations:
        with torch.no_grad():
            quantize_rows = (int8 if activations == "int8" else fp8).quantize_rows
            values, x_scales = quantize_rows(x.detach())
            rounded = (values.to(x_scales.dtype) * x_scales).to(x.dtype)
        x = x + (rounded - x.detach())
    weight = weight_of(x.shape[1], data, scales, zeros, second_scales, format, group_size, activations)
    return torch_functional.linear(x, FORMATS[format].dequantize(weight, x.dtype), bias)
