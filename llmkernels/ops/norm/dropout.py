"""dropout_add_layer_norm and dropout_add_rms_norm: dropout, residual add and norm in one pass over the rows.

The dropped elements are a pure function of the seed, the row and the column (_random.py), so the backward replays them
and nothing of the size of the input is saved but the sum. Where nothing is dropped, add_*_norm runs instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels import _op, _random, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels.ops.norm import arguments, op, reference

_LAYER_NORM, _RMS_NORM = "dropout_add_layer_norm", "dropout_add_rms_norm"

# --- raw ops --------------------------------------------------------------------------------------------------------


def _layer_norm_fwd_fake(x, residual, weight, bias, seed, normalized_shape, eps, dropout_p):
    return op.like(x), op.like(x), op.stats(x, normalized_shape), op.stats(x, normalized_shape)


def _layer_norm_bwd_fake(dy, dsum, s, weight, mean, rstd, seed, normalized_shape, dropout_p, wanted):
    parameters = (op.parameter_grad(s, weight, normalized_shape, want) for want in wanted[2:])
    return op.like(s, wanted[0]), op.like(s, wanted[1]), *parameters


def _rms_norm_fwd_fake(x, residual, weight, seed, normalized_shape, eps, weight_offset, dropout_p):
    return op.like(x), op.like(x), op.stats(x, normalized_shape)


def _rms_norm_bwd_fake(dy, dsum, s, weight, rstd, seed, normalized_shape, weight_offset, dropout_p, wanted):
    return op.like(s, wanted[0]), op.like(s, wanted[1]), op.parameter_grad(s, weight, normalized_shape, wanted[2])


def _portable_layer_norm_fwd(x, residual, weight, bias, *rest):
    return registry.pick(_LAYER_NORM, (x, residual, weight, bias)).fwd(x, residual, weight, bias, *rest)


def _portable_layer_norm_bwd(dy, dsum, s, weight, *rest):
    return registry.pick(_LAYER_NORM, (s, None, weight, None)).bwd(dy, dsum, s, weight, *rest)


def _portable_rms_norm_fwd(x, residual, weight, *rest):
    return registry.pick(_RMS_NORM, (x, residual, weight, None)).fwd(x, residual, weight, *rest)


def _portable_rms_norm_bwd(dy, dsum, s, weight, *rest):
    return registry.pick(_RMS_NORM, (s, None, weight, None)).bwd(dy, dsum, s, weight, *rest)


# dsum is the gradient that arrives at new_residual, dresidual the one that leaves for residual.
_op.define_kernel(
    f"{_LAYER_NORM}_fwd",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, Tensor seed, SymInt[] normalized_shape, float eps,"
    " float dropout_p) -> (Tensor y, Tensor new_residual, Tensor mean, Tensor rstd)",
    _layer_norm_fwd_fake,
    _portable_layer_norm_fwd,
)
_op.define_kernel(
    f"{_LAYER_NORM}_bwd",
    "(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, Tensor seed,"
    " SymInt[] normalized_shape, float dropout_p, bool[4] wanted)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    _layer_norm_bwd_fake,
    _portable_layer_norm_bwd,
)
_op.define_kernel(
    f"{_RMS_NORM}_fwd",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor seed, SymInt[] normalized_shape, float eps,"
    " float weight_offset, float dropout_p) -> (Tensor y, Tensor new_residual, Tensor rstd)",
    _rms_norm_fwd_fake,
    _portable_rms_norm_fwd,
)
_op.define_kernel(
    f"{_RMS_NORM}_bwd",
    "(Tensor dy, Tensor? dsum, Tensor s, Tensor? weight, Tensor rstd, Tensor seed, SymInt[] normalized_shape,"
    " float weight_offset, float dropout_p, bool[3] wanted) -> (Tensor dx, Tensor dresidual, Tensor dweight)",
    _rms_norm_bwd_fake,
    _portable_rms_norm_bwd,
)
_KERNELS = {name: (f"{name}_fwd", f"{name}_bwd") for name in (_LAYER_NORM, _RMS_NORM)}
_op.lazy_triton("llmkernels.ops.norm.triton_kernels", (*_KERNELS[_LAYER_NORM], *_KERNELS[_RMS_NORM]))

# --- autograd -------------------------------------------------------------------------------------------------------


class DropoutAddLayerNormFunction(torch.autograd.Function):
    """apply(x, residual, weight, bias, seed, normalized_shape, eps, dropout_p, chosen) -> (y, new_residual)."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, normalized_shape, eps, dropout_p, chosen):
        fwd = registry.entry(_LAYER_NORM, chosen).fwd
        y, s, mean, rstd = fwd(x, residual, weight, bias, seed, normalized_shape, eps, dropout_p)
        ctx.save_for_backward(s, weight, bias, mean, rstd, seed)
        ctx.settings = (normalized_shape, eps, dropout_p, chosen)
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, dsum):
        s, weight, bias, mean, rstd, seed = ctx.saved_tensors
        normalized_shape, eps, dropout_p, chosen = ctx.settings
        needs = ctx.needs_input_grad[:4]
        if dy is None:
            dy = torch.zeros_like(s)
        if is_differentiated():
            formula = lambda s, weight, bias: reference.layer_norm(s, None, weight, bias, normalized_shape, eps)
            ds, *rest = differentiable_backward(formula, (s, weight, bias), (dy,))
            grads = (*_of_addends(ds, dsum, seed, normalized_shape, dropout_p), *rest)
        else:
            bwd = registry.entry(_LAYER_NORM, chosen).bwd
            grads = bwd(dy, dsum, s, weight, mean, rstd, seed, normalized_shape, dropout_p, needs)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 5)


class DropoutAddRMSNormFunction(torch.autograd.Function):
    """apply(x, residual, weight, seed, normalized_shape, eps, weight_offset, dropout_p, chosen): (y, new_residual)."""

    @staticmethod
    def forward(ctx, x, residual, weight, seed, normalized_shape, eps, weight_offset, dropout_p, chosen):
        fwd = registry.entry(_RMS_NORM, chosen).fwd
        y, s, rstd = fwd(x, residual, weight, seed, normalized_shape, eps, weight_offset, dropout_p)
        ctx.save_for_backward(s, weight, rstd, seed)
        ctx.settings = (normalized_shape, eps, weight_offset, dropout_p, chosen)
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    def backward(ctx, dy, dsum):
        s, weight, rstd, seed = ctx.saved_tensors
        normalized_shape, eps, weight_offset, dropout_p, chosen = ctx.settings
        needs = ctx.needs_input_grad[:3]
        if dy is None:
            dy = torch.zeros_like(s)
        if is_differentiated():
            formula = lambda s, weight: reference.rms_norm(s, None, weight, normalized_shape, eps, weight_offset)
            ds, *rest = differentiable_backward(formula, (s, weight), (dy,))
            grads = (*_of_addends(ds, dsum, seed, normalized_shape, dropout_p), *rest)
        else:
            bwd = registry.entry(_RMS_NORM, chosen).bwd
            grads = bwd(dy, dsum, s, weight, rstd, seed, normalized_shape, weight_offset, dropout_p, needs)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 6)


def _of_addends(ds, dsum, seed, normalized_shape, dropout_p) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and of residual from the two that meet at their sum."""
    if dsum is not None:
        ds = dsum if ds is None else ds + dsum
    return None if ds is None else reference.dropped(ds, seed, normalized_shape, dropout_p), ds


# --- the public functions -------------------------------------------------------------------------------------------


def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`layer_norm(dropout(input) + residual)` and the sum itself, in one pass (pre-norm residual blocks in training).

    The dropped elements are drawn again in the backward and never stored. Other arguments, promotion of dtypes and
    errors as `add_layer_norm`; without dropout the result is exactly that of `add_layer_norm`.

    Args:
        dropout_p: probability with which an element of `input` is zero; the others are divided by 1 - dropout_p. 1
            drops everything.
        training: False: nothing is dropped.
        seed: int64, shape (), on the device of `input`: the same seed drops the same elements, on every backend. None:
            drawn from torch's generator of the device. Unused where nothing is dropped.
    Returns: (normed, new_residual), both `[*, *normalized_shape]` in the promoted dtype. Kept elements are rounded to
        that dtype after the division and again after the addition, as those of the unfused functions are.
    Raises: also ValueError, dropout_p is no probability, or seed has another shape or device; TypeError, its dtype.
    Reference: Srivastava et al. 2014, JMLR 15(56) (dropout); Ba, Kiros, Hinton 2016, arXiv:1607.06450.
    """
    name = _LAYER_NORM
    tensors, shape = arguments.of_layer_norm(name, input, residual, weight, bias, normalized_shape)
    if not arguments.drops(name, dropout_p, training, seed, input):
        return op.run_layer_norm("add_layer_norm", tensors, shape, eps, backend)
    seed = _random.draw_seed(input.device) if seed is None else seed
    chosen = registry.pick(name, tensors, backend)
    if chosen.name == "torch" and transform_active():
        x, *others = tensors
        return reference.layer_norm(reference.dropped(x, seed, shape, dropout_p), *others, shape, eps)
    settings = (seed, shape, eps, float(dropout_p))
    if needs_grad(*tensors):
        return DropoutAddLayerNormFunction.apply(*tensors, *settings, chosen.name)
    return tuple(chosen.fwd(*tensors, *settings)[:2])


def dropout_add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    weight_offset: float = 0.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm(dropout(input) + residual)` and the sum itself, in one pass (pre-norm residual blocks in training).

    `dropout_p`, `training` and `seed` as in `dropout_add_layer_norm`; other arguments, promotion of dtypes and errors
    as `add_rms_norm`, whose result it is exactly where nothing is dropped.
    Returns: (normed, new_residual), both `[*, *normalized_shape]` in the promoted dtype.
    Raises: also ValueError, dropout_p is no probability, or seed has another shape or device; TypeError, its dtype.
    Reference: Srivastava et al. 2014, JMLR 15(56) (dropout); Zhang, Sennrich 2019, arXiv:1910.07467.
    """
    name = _RMS_NORM
    tensors, shape, eps = arguments.of_rms_norm(name, input, residual, weight, normalized_shape, eps, weight_offset)
    if not arguments.drops(name, dropout_p, training, seed, input):
        return op.run_rms_norm("add_rms_norm", tensors, shape, eps, weight_offset, backend)
    seed = _random.draw_seed(input.device) if seed is None else seed
    chosen = registry.pick(name, (*tensors, None), backend)
    if chosen.name == "torch" and transform_active():
        x, *others = tensors
        return reference.rms_norm(reference.dropped(x, seed, shape, dropout_p), *others, shape, eps, weight_offset)
    settings = (seed, shape, eps, weight_offset, float(dropout_p))
    if needs_grad(*tensors):
        return DropoutAddRMSNormFunction.apply(*tensors, *settings, chosen.name)
    return tuple(chosen.fwd(*tensors, *settings)[:2])


# --- backends, best first -------------------------------------------------------------------------------------------

_REFERENCES = {
    _LAYER_NORM: (reference.dropout_add_layer_norm_fwd, reference.dropout_add_layer_norm_bwd),
    _RMS_NORM: (reference.dropout_add_rms_norm_fwd, reference.dropout_add_rms_norm_bwd),
}
for _name, _kernels in _KERNELS.items():
    registry.register(_name, *_op.backends(_name, *_kernels, *_REFERENCES[_name]))

_OPTIONS = "float dropout_p=0.0, bool training=True, Tensor? seed=None"
_op.define_public(
    _LAYER_NORM,
    "(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None,"
    f" float eps=1e-05, *, {_OPTIONS}) -> (Tensor, Tensor)",
    dropout_add_layer_norm,
)
_op.define_public(
    _RMS_NORM,
    "(Tensor input, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None, *,"
    f" float weight_offset=0.0, {_OPTIONS}) -> (Tensor, Tensor)",
    dropout_add_rms_norm,
)
