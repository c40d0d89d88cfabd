"""softmax and log_softmax: schemas, fakes, argument checks, autograd, backend order."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, dtype_error, dtype_names
from llmkernels.ops.softmax import reference

# --- raw ops, over the last dimension ---------------------------------------------------------------------------------


def _name(log: bool) -> str:
    return "log_softmax" if log else "softmax"


def _fwd_fake(x, mask, scale, log):
    return x.new_empty(x.shape)


def _bwd_fake(dy, y, scale, log, wanted):
    dx = y.new_empty(y.shape if wanted[0] else 0)
    return dx, y.new_empty(y.shape if wanted[1] else 0, dtype=accumulate_dtype(y.dtype))


def _portable_fwd(x, mask, scale, log):
    return registry.pick(_name(log), (x, mask)).fwd(x, mask, scale, log)


def _portable_bwd(dy, y, scale, log, wanted):
    return registry.pick(_name(log), (y, None)).bwd(dy, y, scale, log, wanted)


_op.define_kernel("softmax_fwd", "(Tensor x, Tensor? mask, float scale, bool log) -> Tensor", _fwd_fake, _portable_fwd)
_op.define_kernel(
    "softmax_bwd",
    "(Tensor dy, Tensor y, float scale, bool log, bool[2] wanted) -> (Tensor dx, Tensor ds)",
    _bwd_fake,
    _portable_bwd,
)
_op.lazy_triton("llmkernels.ops.softmax.triton_kernels", ("softmax_fwd", "softmax_bwd"))

# --- autograd -------------------------------------------------------------------------------------------------------


class SoftmaxFunction(torch.autograd.Function):
    """apply(x, mask, scale, log, chosen) -> y over the last dimension. Saves its result alone.

    `mask` is boolean, of the dtype of `x` or of its sums, or None; `chosen` names the backend of both directions.
    """

    @staticmethod
    def forward(ctx, x, mask, scale, log, chosen):
        y = registry.entry(_name(log), chosen).fwd(x, mask, scale, log)
        ctx.save_for_backward(y)
        ctx.settings = (scale, log, chosen)
        ctx.mask = None if mask is None else (mask.shape, mask.dtype)
        return y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        scale, log, chosen = ctx.settings
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        # Made of differentiable operations on the result, the reference's backward can itself be differentiated.
        bwd = reference.softmax_bwd if is_differentiated() else registry.entry(_name(log), chosen).bwd
        dx, ds = bwd(dy, y, scale, log, wanted)
        dmask = None
        if wanted[1]:
            shape, dtype = ctx.mask
            dmask = ds.sum_to_size(shape).to(dtype)
        return dx if wanted[0] else None, dmask, None, None, None


# --- arguments ------------------------------------------------------------------------------------------------------


def _checked_mask(op: str, input: Tensor, mask: Tensor) -> Tensor:
    """`mask` with as many dimensions as `input`, of a dtype that the kernels read."""
    if mask.dtype != torch.bool and mask.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: mask has dtype {mask.dtype}, expected bool or one of {dtype_names()}")
    if mask.device != input.device:
        raise ValueError(f"{op}: mask is on {mask.device}, expected {input.device}, the device of input")
    pairs = zip(reversed(mask.shape), reversed(input.shape), strict=False)
    if mask.dim() > input.dim() or any(given not in (1, size) for given, size in pairs):
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, expected one that expands to {tuple(input.shape)}")
    mask = mask.reshape((1,) * (input.dim() - mask.dim()) + tuple(mask.shape))
    acc = accumulate_dtype(input.dtype)
    return mask if mask.dtype in (torch.bool, input.dtype, acc) else mask.to(acc)


def _softmax(
    log: bool, input: Tensor, dim: int, scale: float, mask: Tensor | None, dtype, backend: str | None
) -> Tensor:
    op = _name(log)
    if input.dtype not in FLOAT_DTYPES:
        raise dtype_error(op, "input", input.dtype)
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}, expected one of {dtype_names()}")
    if not -max(input.dim(), 1) <= dim < max(input.dim(), 1):
        raise ValueError(f"{op}: dim is {dim}, expected one of the {input.dim()} dimensions of input")
    x = input if dtype is None else input.to(dtype)
    if x.dim() == 0:
        x = x.reshape(1)
    if mask is not None:
        mask = _checked_mask(op, x, mask)
    last = x.dim() - 1
    moved = dim % (last + 1) != last
    if moved:
        x, mask = x.movedim(dim, -1), None if mask is None else mask.movedim(dim, -1)
    y = _over_last(op, log, x, float(scale), mask, backend)
    return (y.movedim(-1, dim) if moved else y).reshape(input.shape)


def _over_last(op: str, log: bool, x: Tensor, scale: float, mask: Tensor | None, backend: str | None) -> Tensor:
    chosen = registry.pick(op, (x, mask), backend)
    if chosen.name == "torch" and transform_active():
        return reference.softmax_fwd(x, mask, scale, log)
    if needs_grad(x, mask):
        return SoftmaxFunction.apply(x, mask, scale, log, chosen.name)
    return chosen.fwd(x, mask, scale, log)


# --- the public functions -------------------------------------------------------------------------------------------


def softmax(
    input: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax of `scale * input`, masked, in one pass.

    Args:
        input: `[*]`, fp64, fp32, bf16 or fp16, any strides.
        dim: the dimension along which the result sums to 1; the last is the fast one, others are copied.
        mask: expands to the shape of `input`: boolean, True where an element takes part, or floating, added to
            `scale * input`; its gradient is summed over what it was expanded along.
        dtype: the input is converted to it first, as in torch.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: the shape of `input`, computed in fp32 (fp64 for fp64) and rounded once. A row in which nothing takes part,
        or all is -inf, gives 0, where torch gives NaN. The backward keeps nothing but the result.
    Raises: ValueError or TypeError, shapes, devices or dtypes do not fit; NoBackendError, a forced backend cannot run
        this call (the message says why).
    """
    return _softmax(False, input, dim, scale, mask, dtype, backend)


def log_softmax(
    input: Tensor,
    dim: int = -1,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The logarithm of `softmax`, with the digits of small results. Arguments and errors as `softmax`.

    Returns: as `softmax`; -inf for what takes no part and in a row in which nothing does. What is -inf has no gradient.
    """
    return _softmax(True, input, dim, scale, mask, dtype, backend)


# --- backends, best first -------------------------------------------------------------------------------------------

for _op_name in ("softmax", "log_softmax"):
    registry.register(
        _op_name,
        *_op.backends(_op_name, "softmax_fwd", "softmax_bwd", reference.softmax_fwd, reference.softmax_bwd),
    )

_OPTIONS = "int dim=-1, *, float scale=1.0, Tensor? mask=None, ScalarType? dtype=None"
_op.define_public("softmax", f"(Tensor input, {_OPTIONS}) -> Tensor", softmax)
_op.define_public("log_softmax", f"(Tensor input, {_OPTIONS}) -> Tensor", log_softmax)
