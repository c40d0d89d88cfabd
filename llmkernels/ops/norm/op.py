"""layer_norm, rms_norm and their fused residual adds: schemas, fakes, autograd, backend order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import accumulate_dtype
from llmkernels.ops.norm import arguments, reference

# --- raw ops: one forward and one backward per kind; a residual is an optional input --------------------------------


def stats(x: Tensor, normalized_shape) -> Tensor:
    return x.new_empty(x.shape[: x.dim() - len(normalized_shape)], dtype=accumulate_dtype(x.dtype))


def like(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape) if wanted else x.new_empty(0)


def parameter_grad(x: Tensor, weight: Tensor | None, normalized_shape, wanted: bool) -> Tensor:
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(normalized_shape, dtype=dtype) if wanted else x.new_empty(0)


def _layer_norm_fwd_fake(x, residual, weight, bias, normalized_shape, eps):
    return like(x), like(x, residual is not None), stats(x, normalized_shape), stats(x, normalized_shape)


def _layer_norm_bwd_fake(dy, dresidual, x, weight, mean, rstd, normalized_shape, wanted):
    dweight = parameter_grad(x, weight, normalized_shape, wanted[1])
    return like(x, wanted[0]), dweight, parameter_grad(x, weight, normalized_shape, wanted[2])


def _rms_norm_fwd_fake(x, residual, weight, normalized_shape, eps, weight_offset):
    return like(x), like(x, residual is not None), stats(x, normalized_shape)


def _rms_norm_bwd_fake(dy, dresidual, x, weight, rstd, normalized_shape, weight_offset, wanted):
    return like(x, wanted[0]), parameter_grad(x, weight, normalized_shape, wanted[1])


def _portable_layer_norm_fwd(x, residual, weight, bias, normalized_shape, eps):
    op = "layer_norm" if residual is None else "add_layer_norm"
    chosen = registry.pick(op, (x, residual, weight, bias))
    return chosen.fwd(x, residual, weight, bias, normalized_shape, eps)


def _portable_layer_norm_bwd(dy, dresidual, x, weight, mean, rstd, normalized_shape, wanted):
    chosen = registry.pick("layer_norm", (x, None, weight, None))
    return chosen.bwd(dy, dresidual, x, weight, mean, rstd, normalized_shape, wanted)


def _portable_rms_norm_fwd(x, residual, weight, normalized_shape, eps, weight_offset):
    chosen = registry.pick("rms_norm" if residual is None else "add_rms_norm", (x, residual, weight, None))
    return chosen.fwd(x, residual, weight, normalized_shape, eps, weight_offset)


def _portable_rms_norm_bwd(dy, dresidual, x, weight, rstd, normalized_shape, weight_offset, wanted):
    chosen = registry.pick("rms_norm", (x, None, weight, None))
    return chosen.bwd(dy, dresidual, x, weight, rstd, normalized_shape, weight_offset, wanted)


_op.define_kernel(
    "layer_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, SymInt[] normalized_shape, float eps)"
    " -> (Tensor y, Tensor new_residual, Tensor mean, Tensor rstd)",
    _layer_norm_fwd_fake,
    _portable_layer_norm_fwd,
)
_op.define_kernel(
    "layer_norm_bwd",
    "(Tensor dy, Tensor? dresidual, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, SymInt[] normalized_shape,"
    " bool[3] wanted) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_bwd_fake,
    _portable_layer_norm_bwd,
)
_op.define_kernel(
    "rms_norm_fwd",
    "(Tensor x, Tensor? residual, Tensor? weight, SymInt[] normalized_shape, float eps, float weight_offset)"
    " -> (Tensor y, Tensor new_residual, Tensor rstd)",
    _rms_norm_fwd_fake,
    _portable_rms_norm_fwd,
)
_op.define_kernel(
    "rms_norm_bwd",
    "(Tensor dy, Tensor? dresidual, Tensor x, Tensor? weight, Tensor rstd, SymInt[] normalized_shape,"
    " float weight_offset, bool[2] wanted) -> (Tensor dx, Tensor dweight)",
    _rms_norm_bwd_fake,
    _portable_rms_norm_bwd,
)
_op.lazy_triton(
    "llmkernels.ops.norm.triton_kernels", ("layer_norm_fwd", "layer_norm_bwd", "rms_norm_fwd", "rms_norm_bwd")
)

# --- autograd -------------------------------------------------------------------------------------------------------
# `chosen` is the name of the backend: both directions come from the same one. The normed tensor s is saved, not x and
# residual: s = x + residual has the same gradient for both.


class LayerNormFunction(torch.autograd.Function):
    """apply(x, residual, weight, bias, normalized_shape, eps, chosen) -> y, or (y, new_residual) with a residual."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, normalized_shape, eps, chosen):
        fwd = registry.entry("layer_norm", chosen).fwd
        y, new_residual, mean, rstd = fwd(x, residual, weight, bias, normalized_shape, eps)
        ctx.save_for_backward(x if residual is None else new_residual, weight, bias, mean, rstd)
        ctx.settings = (normalized_shape, eps, chosen)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, new_residual)

    @staticmethod
    def backward(ctx, dy, dresidual=None):
        s, weight, bias, mean, rstd = ctx.saved_tensors
        normalized_shape, eps, chosen = ctx.settings
        needs = ctx.needs_input_grad
        if dy is None:
            dy = torch.zeros_like(s)
        if is_differentiated():
            formula = lambda s, weight, bias: reference.layer_norm(s, None, weight, bias, normalized_shape, eps)
            ds, dweight, dbias = differentiable_backward(formula, (s, weight, bias), (dy,))
            if dresidual is not None:
                ds = dresidual if ds is None else ds + dresidual
        else:
            wanted = (needs[0] or needs[1], needs[2], needs[3])
            bwd = registry.entry("layer_norm", chosen).bwd
            ds, dweight, dbias = bwd(dy, dresidual, s, weight, mean, rstd, normalized_shape, wanted)
        return (*_grads(needs, ds, ds, dweight, dbias), None, None, None)


class RMSNormFunction(torch.autograd.Function):
    """apply(x, residual, weight, normalized_shape, eps, weight_offset, chosen) -> y, or (y, new_residual)."""

    @staticmethod
    def forward(ctx, x, residual, weight, normalized_shape, eps, weight_offset, chosen):
        fwd = registry.entry("rms_norm", chosen).fwd
        y, new_residual, rstd = fwd(x, residual, weight, normalized_shape, eps, weight_offset)
        ctx.save_for_backward(x if residual is None else new_residual, weight, rstd)
        ctx.settings = (normalized_shape, eps, weight_offset, chosen)
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, new_residual)

    @staticmethod
    def backward(ctx, dy, dresidual=None):
        s, weight, rstd = ctx.saved_tensors
        normalized_shape, eps, weight_offset, chosen = ctx.settings
        needs = ctx.needs_input_grad
        if dy is None:
            dy = torch.zeros_like(s)
        if is_differentiated():
            formula = lambda s, weight: reference.rms_norm(s, None, weight, normalized_shape, eps, weight_offset)
            ds, dweight = differentiable_backward(formula, (s, weight), (dy,))
            if dresidual is not None:
                ds = dresidual if ds is None else ds + dresidual
        else:
            bwd = registry.entry("rms_norm", chosen).bwd
            wanted = (needs[0] or needs[1], needs[2])
            ds, dweight = bwd(dy, dresidual, s, weight, rstd, normalized_shape, weight_offset, wanted)
        return (*_grads(needs, ds, ds, dweight), None, None, None, None)


def _grads(needs, *grads):
    return tuple(grad if need else None for need, grad in zip(needs, grads, strict=False))


# --- checked arguments to results ------------------------------------------------------------------------------------


def run_layer_norm(op: str, tensors, shape, eps, backend):
    """y, or (y, new_residual): the choice of backend and of autograd's way. `tensors`: x, residual, weight, bias."""
    chosen = registry.pick(op, tensors, backend)
    if chosen.name == "torch" and transform_active():
        return reference.layer_norm(*tensors, shape, eps)
    if needs_grad(*tensors):
        return LayerNormFunction.apply(*tensors, shape, eps, chosen.name)
    y, new_residual, _, _ = chosen.fwd(*tensors, shape, eps)
    return y if tensors[1] is None else (y, new_residual)


def run_rms_norm(op: str, tensors, shape, eps, weight_offset, backend):
    """As run_layer_norm. `tensors`: x, residual, weight."""
    chosen = registry.pick(op, (*tensors, None), backend)
    if chosen.name == "torch" and transform_active():
        return reference.rms_norm(*tensors, shape, eps, weight_offset)
    if needs_grad(*tensors):
        return RMSNormFunction.apply(*tensors, shape, eps, weight_offset, chosen.name)
    y, new_residual, _ = chosen.fwd(*tensors, shape, eps, weight_offset)
    return y if tensors[1] is None else (y, new_residual)


def _layer_norm(op, x, residual, normalized_shape, weight, bias, eps, backend):
    tensors, shape = arguments.of_layer_norm(op, x, residual, weight, bias, normalized_shape)
    return run_layer_norm(op, tensors, shape, eps, backend)


def _rms_norm(op, x, residual, normalized_shape, weight, eps, weight_offset, backend):
    tensors, shape, eps = arguments.of_rms_norm(op, x, residual, weight, normalized_shape, eps, weight_offset)
    return run_rms_norm(op, tensors, shape, eps, weight_offset, backend)


# --- the public functions -------------------------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the trailing dimensions `normalized_shape`; torch.nn.functional.layer_norm's signature.

    Args:
        input: `[*, *normalized_shape]`, fp64, fp32, bf16 or fp16, any strides.
        normalized_shape: the dimensions that share a mean and a variance; an int means `(int,)`.
        weight, bias: `normalized_shape`; the dtype of `input`, or fp32 with a 16-bit `input`.
        eps: added to the (biased) variance, not to the standard deviation.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: the shape and dtype of `input`. Statistics are computed and saved in fp32 (fp64 for fp64).
    Raises: ValueError or TypeError, shapes, devices or dtypes disagree; NoBackendError, a forced backend cannot
        run this call (the message says why).
    Reference: Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """
    return _layer_norm("layer_norm", input, None, normalized_shape, weight, bias, eps, backend)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """RMS normalisation over the trailing dimensions `normalized_shape`; torch.nn.functional.rms_norm's signature.

    Args:
        input: `[*, *normalized_shape]`, fp64, fp32, bf16 or fp16, any strides.
        normalized_shape: the dimensions that share a mean square; an int means `(int,)`.
        weight: `normalized_shape`, any of the four dtypes.
        eps: added to the mean square; None means the machine epsilon of the type of the statistics (fp32's for
            16-bit input), as in torch.
        weight_offset: added to `weight` before the product; 1.0 is Gemma's form.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: the shape and dtype of `input`; one rounding, after the product with the weight.
    Raises: ValueError or TypeError, shapes, devices or dtypes disagree; NoBackendError, a forced backend cannot
        run this call (the message says why).
    Reference: Zhang, Sennrich 2019, arXiv:1910.07467.
    """
    return _rms_norm("rms_norm", input, None, normalized_shape, weight, eps, weight_offset, backend)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm(input + residual)` and the sum itself, in one pass (pre-norm residual blocks).

    `residual` has the shape of `input`; both are promoted to a common dtype as `input + residual` would be, and the
    norm is taken of the sum as rounded to that dtype. Other arguments and errors as `layer_norm`.
    Returns: (normed, new_residual), both `[*, *normalized_shape]` in the promoted dtype.
    """
    return _layer_norm("add_layer_norm", input, residual, normalized_shape, weight, bias, eps, backend)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(input + residual)` and the sum itself, in one pass (pre-norm residual blocks).

    `residual` has the shape of `input`; both are promoted to a common dtype as `input + residual` would be, and the
    norm is taken of the sum as rounded to that dtype. Other arguments and errors as `rms_norm`.
    Returns: (normed, new_residual), both `[*, *normalized_shape]` in the promoted dtype.
    """
    return _rms_norm("add_rms_norm", input, residual, normalized_shape, weight, eps, weight_offset, backend)


# --- backends, best first -------------------------------------------------------------------------------------------

_LAYER_NORM = ("layer_norm_fwd", "layer_norm_bwd", reference.layer_norm_fwd, reference.layer_norm_bwd)
_RMS_NORM = ("rms_norm_fwd", "rms_norm_bwd", reference.rms_norm_fwd, reference.rms_norm_bwd)

for _name, _kind in (
    ("layer_norm", _LAYER_NORM),
    ("add_layer_norm", _LAYER_NORM),
    ("rms_norm", _RMS_NORM),
    ("add_rms_norm", _RMS_NORM),
):
    registry.register(_name, *_op.backends(_name, *_kind))

_op.define_public(
    "layer_norm",
    "(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, float eps=1e-05) -> Tensor",
    layer_norm,
)
_op.define_public(
    "rms_norm",
    "(Tensor input, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *, float weight_offset=0.0)"
    " -> Tensor",
    rms_norm,
)
_op.define_public(
    "add_layer_norm",
    "(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None,"
    " float eps=1e-05) -> (Tensor, Tensor)",
    add_layer_norm,
)
_op.define_public(
    "add_rms_norm",
    "(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *,"
    " float weight_offset=0.0) -> (Tensor, Tensor)",
    add_rms_norm,
)
