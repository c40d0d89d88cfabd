"""quantized_linear: schemas, fakes, argument checks, autograd, backend order."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, autocast_dtype, dtype_error
from llmkernels.ops.quantized_linear import reference
from llmkernels.quantization.tensor import QuantizedTensor

OP = "quantized_linear"
Parts = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # data, scales, zeros, second_scales
Kind = tuple[str, int, str]  # format, group size (0: the whole row), activations ("": as they are)

# --- raw ops ----------------------------------------------------------------------------------------------------------


def _fwd_fake(x, data, scales, zeros, second_scales, bias, format, group_size, activations):
    return x.new_empty(x.shape[0], data.shape[0])


def _bwd_fake(dy, data, scales, zeros, second_scales, columns, format, group_size):
    return dy.new_empty(dy.shape[0], columns)


def _portable_fwd(x, *rest):
    return registry.pick(OP, (x, *rest)).fwd(x, *rest)


def _portable_bwd(dy, data, scales, zeros, second_scales, columns, format, group_size):
    parts = (data, scales, zeros, second_scales)
    chosen = registry.pick(OP, (dy, *parts, None, format, group_size, ""))
    return chosen.bwd(dy, *parts, columns, format, group_size)


_op.define_kernel(
    "quantized_linear_fwd",
    "(Tensor x, Tensor data, Tensor scales, Tensor? zeros, Tensor? second_scales, Tensor? bias, str format,"
    " int group_size, str activations) -> Tensor",
    _fwd_fake,
    _portable_fwd,
)
_op.define_kernel(
    "quantized_linear_bwd",
    "(Tensor dy, Tensor data, Tensor scales, Tensor? zeros, Tensor? second_scales, SymInt columns, str format,"
    " int group_size) -> Tensor",
    _bwd_fake,
    _portable_bwd,
)

_op.lazy_triton("llmkernels.ops.quantized_linear.triton_kernels", ("quantized_linear_fwd", "quantized_linear_bwd"))

# --- autograd -------------------------------------------------------------------------------------------------------


class QuantizedLinearFunction(torch.autograd.Function):
    """apply(x, bias, parts, kind, chosen) -> y. x is `[M, K]`, bias `[N]` of its dtype or None; the weight is frozen.

    `parts` are the tensors (data, scales, zeros, second_scales) of a QuantizedTensor, `kind` its (format, group size or
    0, activations or ""); `chosen` names the backend of both directions. Nothing of the input is saved: y is linear in
    it, and the rounding of activations passes gradients as they are.
    """

    @staticmethod
    def forward(ctx, x, bias, parts, kind, chosen):
        ctx.save_for_backward(*parts)
        ctx.settings = (x.shape[1], kind[:2], chosen)
        return registry.entry(OP, chosen).fwd(x, *parts, bias, *kind)

    @staticmethod
    def backward(ctx, dy):
        columns, kind, chosen = ctx.settings
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            # The reference is plain PyTorch, which records what is done with dy.
            bwd = reference.linear_bwd if is_differentiated() else registry.entry(OP, chosen).bwd
            dx = bwd(dy, *ctx.saved_tensors, columns, *kind)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
        return dx, dbias, None, None, None


# --- arguments ------------------------------------------------------------------------------------------------------


def _check(input: Tensor, parts: Parts, rows: int, columns: int, bias: Tensor | None, op: str = OP) -> None:
    if input.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "input", input.dtype)
    if input.dim() == 0 or input.shape[-1] != columns:
        raise ValueError(f"{op}: input has shape {tuple(input.shape)}, expected {columns} columns, the weight's")
    device = input.device
    if bias is not None:
        if bias.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, "bias", bias.dtype)
        if tuple(bias.shape) != (rows,):
            raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({rows},), the weight's rows")
        if bias.device != device:
            raise _device_error(op, "bias", bias, device)
    if parts[0].device != device:
        raise _device_error(op, "weight", parts[0], device)


def _device_error(op: str, name: str, tensor: Tensor, device: torch.device) -> ValueError:
    return ValueError(f"{op}: {name} is on {tensor.device}, expected {device}, the device of input")


def run(input: Tensor, parts: Parts, shape: tuple[int, int], kind: Kind, bias: Tensor | None,
        order: Tensor | None = None, backend: str | None = None) -> Tensor:  # fmt: skip
    """`quantized_linear` of a weight's parts: what the public functions and the modules call."""
    sizes = input.shape
    fits = input.dtype in FLOAT_DTYPES and sizes[-1:] == shape[1:] and parts[0].device == input.device
    if not fits or bias is not None:
        _check(input, parts, *shape, bias)
    if torch._C._is_any_autocast_enabled():
        lower = autocast_dtype(input.device)
        if lower is not None and input.dtype != torch.float64:
            input = input.to(lower)  # as torch's linear
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    if order is not None:
        input = input.index_select(-1, order)
    flat = len(sizes) == 2
    x = input if flat else input.reshape(-1, shape[1]) if shape[1] else input.flatten(0, -2)
    chosen = registry.pick(OP, (x, *parts, bias, *kind), backend)
    if chosen.name == "torch" and transform_active():
        y = reference.formula(x, bias, *parts, *kind)
    elif needs_grad(x, bias):
        y = QuantizedLinearFunction.apply(x, bias, parts, kind, chosen.name)
    else:
        y = chosen.fwd(x, *parts, bias, *kind)
    return y if flat else y.view((*sizes[:-1], shape[0]))


def parts_of(weight: QuantizedTensor, op: str = OP) -> tuple[Parts, Kind]:
    """What kernels take of a weight. Raises: TypeError, it is none."""
    if not isinstance(weight, QuantizedTensor):
        got = type(weight).__name__
        raise TypeError(f"{op}: weight is a {got}, expected a QuantizedTensor: quantize_tensor(weight, 'int8')")
    parts = (weight.data, weight.scales, weight.zeros, weight.second_scales)
    return parts, (weight.format, weight.group_size or 0, weight.activations or "")


# --- the public functions -------------------------------------------------------------------------------------------


def quantized_linear(
    input: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """torch.nn.functional.linear with a quantized weight: `input @ weight.T + bias`.

    Args:
        input: `[*, K]`, fp64, fp32, bf16 or fp16, any strides; under autocast it is converted as linear's is.
        weight: `[N, K]`, from `llmkernels.quantization.quantize_tensor`; where it says so, each row of the input is
            rounded to int8 or fp8 first.
        bias: `[N]` of any floating dtype, converted to the input's.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: `[*, N]` in the dtype of `input`, added in fp32 (fp64 for fp64). Input and bias have gradients, of every
        order; the weight is frozen. The gradient passes the rounding of activations as if there were none.
    Raises: ValueError or TypeError, shapes, devices or dtypes do not fit; NoBackendError, a forced backend cannot run
        this call (the message says why).
    """
    parts, kind = parts_of(weight)
    return run(input, parts, weight.shape, kind, bias, weight.order, backend)


def _public(input, data, scales, zeros, second_scales, order, bias, columns, *, format, group_size=0, activations=""):
    weight = reference.weight_of(columns, data, scales, zeros, second_scales, format, group_size, activations)
    kind = (format, group_size, activations)
    return run(input, (data, scales, zeros, second_scales), weight.shape, kind, bias, order)


# --- backends, best first -------------------------------------------------------------------------------------------

# Rows of x that the CUDA kernels of unrounded activations take: more belong on Triton's tiles, and of fp32 on FMAs that
# share a weight among many rows.
_MOST_ROWS, _MOST_FLOAT_ROWS = 64, 8


def _refuses_fp64(x: Tensor, *_) -> str | None:
    return "float64 needs plain PyTorch" if x.dtype == torch.float64 else None


def _cuda_refuses(x, data, scales, zeros, second_scales, bias, format, group_size, activations) -> str | None:
    if x.dtype == torch.float64:
        return _refuses_fp64(x)
    if group_size not in (0, 32, 64, 128):
        return f"group_size is {group_size}, not 32, 64, 128 or the whole row"
    if activations:
        return None if activations == "int8" else f"{activations} activations have no CUDA kernel"
    most = _MOST_FLOAT_ROWS if x.dtype == torch.float32 else _MOST_ROWS
    return f"input has {x.shape[0]} rows, more than {most}" if x.shape[0] > most else None


_FUNCTIONS = ("quantized_linear_fwd", "quantized_linear_bwd", reference.linear_fwd, reference.linear_bwd)
REFUSE = {"cuda": _cuda_refuses, "cpu": _refuses_fp64, "triton": _refuses_fp64}
registry.register(OP, *_op.backends(OP, *_FUNCTIONS, refuse=REFUSE))

_op.define_public(
    OP,
    "(Tensor input, Tensor data, Tensor scales, Tensor? zeros, Tensor? second_scales, Tensor? order, Tensor? bias,"
    ' SymInt columns, *, str format, int group_size=0, str activations="") -> Tensor',
    _public,
)
