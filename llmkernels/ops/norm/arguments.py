"""What the norms ask of their arguments, once for every backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, dtype_error


def _checked_shape(op: str, x: Tensor, normalized_shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, int):
        normalized_shape = (normalized_shape,)
    shape = tuple(normalized_shape)
    if not shape:
        raise ValueError(f"{op}: normalized_shape is (), expected at least one dimension")
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"{op}: input has shape {tuple(x.shape)}, expected (*, {', '.join(map(str, shape))})")
    return shape


def _check_tensor(op: str, name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], shape_name: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} = {shape_name}")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {x.device}, the device of input")
    if tensor.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, name, tensor.dtype)


def _prepare(op, x, residual, weight, bias, normalized_shape):
    """Check the meaning of the arguments, once for every backend; cast what torch's own op would cast."""
    if x.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "input", x.dtype)
    shape = _checked_shape(op, x, normalized_shape)
    if residual is not None:
        _check_tensor(op, "residual", residual, x, x.shape, "input.shape")
    if weight is not None:
        _check_tensor(op, "weight", weight, x, shape, "normalized_shape")
    if bias is not None:
        _check_tensor(op, "bias", bias, x, shape, "normalized_shape")
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        # torch's CUDA autocast runs both norms in fp32 (fp64 stays); CPU autocast leaves them alone.
        x, residual, weight, bias = (
            t if t is None or t.dtype == torch.float64 else t.float() for t in (x, residual, weight, bias)
        )
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return x, residual, weight, bias, shape


def _check_mixed_dtype(op, name, parameter, x):
    if parameter.dtype != torch.float32 or x.dtype not in (torch.bfloat16, torch.float16):
        allowed = f"{x.dtype}" if x.dtype in (torch.float32, torch.float64) else f"{x.dtype} or torch.float32"
        raise TypeError(f"{op}: {name} has dtype {parameter.dtype}, expected {allowed} with a {x.dtype} input")


def of_layer_norm(op, x, residual, weight, bias, normalized_shape):
    """((x, residual, weight, bias), normalized_shape), checked and cast as torch's own op would cast them."""
    x, residual, weight, bias, shape = _prepare(op, x, residual, weight, bias, normalized_shape)
    if weight is not None and weight.dtype != x.dtype:
        _check_mixed_dtype(op, "weight", weight, x)
    if bias is not None and bias.dtype != x.dtype:
        _check_mixed_dtype(op, "bias", bias, x)
    if bias is not None:
        if weight is None:
            weight = torch.ones_like(bias)
        elif weight.dtype != bias.dtype:
            raise TypeError(f"{op}: bias has dtype {bias.dtype}, expected {weight.dtype}, the dtype of weight")
    return (x, residual, weight, bias), shape


def of_rms_norm(op, x, residual, weight, normalized_shape, eps, weight_offset):
    """((x, residual, weight), normalized_shape, eps), checked and cast as torch's own op would cast them."""
    x, residual, weight, _, shape = _prepare(op, x, residual, weight, None, normalized_shape)
    if weight is None:
        if weight_offset != 0.0:
            raise ValueError(f"{op}: weight_offset is {weight_offset} without a weight, expected 0.0")
    elif weight.dtype != x.dtype:
        # As torch: any floating weight, multiplied in the type of the statistics.
        weight = weight.to(accumulate_dtype(x.dtype))
    if eps is None:
        eps = torch.finfo(accumulate_dtype(x.dtype)).eps
    return (x, residual, weight), shape, eps


def drops(op: str, dropout_p: float, training: bool, seed: Tensor | None, x: Tensor) -> bool:
    """Whether anything is dropped, of checked arguments of dropout."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability between 0 and 1")
    if seed is not None:
        if seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed has dtype {seed.dtype}, expected torch.int64")
        if seed.dim() != 0:
            raise ValueError(f"{op}: seed has shape {tuple(seed.shape)}, expected ()")
        if seed.device != x.device:
            raise ValueError(f"{op}: seed is on {seed.device}, expected {x.device}, the device of input")
    return training and dropout_p > 0.0
