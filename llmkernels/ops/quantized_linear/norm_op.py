"""rms_norm_quantized_linear: schemas, fakes, argument checks, autograd, backend order.

Where activations are rounded to int8 or fp8, the kernel that rounds a row norms it first, so that a normed row is
never written out (int8 in CUDA C++, both in Triton). Everything else is rms_norm and quantized_linear of the same
backend, one after the other. The backward is theirs too.

Why an op of its own and not a quantized_linear of rows that were rounded before, which several projections could share:
rounded rows have no gradient, their layout is the kernel's (int4 weights want even columns apart), and projections of
one norm are one weight with their rows under each other.
"""

from dataclasses import replace

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, autocast_dtype, dtype_error
from llmkernels.ops.norm import reference as norm_reference
from llmkernels.ops.norm.op import rms_norm
from llmkernels.ops.quantized_linear import op, reference
from llmkernels.ops.quantized_linear.op import Kind, Parts
from llmkernels.quantization.tensor import QuantizedTensor

OP, KERNEL = "rms_norm_quantized_linear", "rms_norm_quantized_linear_fwd"

# --- the raw op -------------------------------------------------------------------------------------------------------


def _fake(x, norm_weight, eps, data, scales, zeros, second_scales, bias, format, group_size, activations):
    return x.new_empty(x.shape[0], data.shape[0]), x.new_empty(x.shape[0], dtype=accumulate_dtype(x.dtype))


def _portable(x, norm_weight, eps, *rest):
    return registry.pick(OP, (x, *rest)).fwd(x, norm_weight, eps, *rest)


_op.define_kernel(
    KERNEL,
    "(Tensor x, Tensor? norm_weight, float eps, Tensor data, Tensor scales, Tensor? zeros, Tensor? second_scales,"
    " Tensor? bias, str format, int group_size, str activations) -> (Tensor y, Tensor rstd)",
    _fake,
    _portable,
)
_op.lazy_triton("llmkernels.ops.quantized_linear.triton_kernels", (KERNEL,))


# --- backends, best first -------------------------------------------------------------------------------------------

_CPU_NORM, _CPU_LINEAR = _op.kernel("cpu", "rms_norm_fwd"), _op.kernel("cpu", "quantized_linear_fwd")


def _cpu_fwd(x, norm_weight, eps, *rest):
    """No op of its own: a call of one that is written in Python would take longer than both of these."""
    normed, _, rstd = _CPU_NORM(x, None, norm_weight, (x.shape[1],), eps, 0.0)
    return _CPU_LINEAR(normed, *rest), rstd


def _reference_fwd(x, norm_weight, eps, *rest):
    """Returns (y, rstd)."""
    normed, _, rstd = norm_reference.rms_norm_fwd(x, None, norm_weight, (x.shape[1],), eps, 0.0)
    return reference.linear_fwd(normed, *rest), rstd


_entries = _op.backends(OP, KERNEL, None, _reference_fwd, None, refuse=op.REFUSE)
registry.register(OP, *(replace(entry, fwd=_cpu_fwd) if entry.name == "cpu" else entry for entry in _entries))

# --- autograd -------------------------------------------------------------------------------------------------------


class RMSNormQuantizedLinearFunction(torch.autograd.Function):
    """apply(x, norm_weight, bias, eps, parts, kind, chosen) -> y. Others as QuantizedLinearFunction; x is saved."""

    @staticmethod
    def forward(ctx, x, norm_weight, bias, eps, parts, kind, chosen):
        y, rstd = registry.entry(OP, chosen).fwd(x, norm_weight, eps, *parts, bias, *kind)
        ctx.save_for_backward(x, norm_weight, rstd, *parts)
        ctx.settings = (eps, kind[:2], chosen)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, norm_weight, rstd, *parts = ctx.saved_tensors
        eps, kind, chosen = ctx.settings
        columns, needs = x.shape[1], ctx.needs_input_grad
        dx = dweight = dbias = None
        if needs[0] or needs[1]:
            if is_differentiated():
                dnormed = reference.linear_bwd(dy, *parts, columns, *kind)
                formula = lambda x, weight: norm_reference.rms_norm(x, None, weight, (columns,), eps, 0.0)
                dx, dweight = differentiable_backward(formula, (x, norm_weight), (dnormed,))
            else:
                dnormed = registry.entry(op.OP, chosen).bwd(dy, *parts, columns, *kind)
                of_norm = registry.entry("rms_norm", chosen).bwd
                dx, dweight = of_norm(dnormed, None, x, norm_weight, rstd, (columns,), 0.0, needs[:2])
        if needs[2]:
            dbias = dy.sum(0, dtype=accumulate_dtype(dy.dtype)).to(dy.dtype)
        return dx if needs[0] else None, dweight if needs[1] else None, dbias, None, None, None, None


# --- arguments ------------------------------------------------------------------------------------------------------


def _check_norm(input: Tensor, norm_weight: Tensor | None) -> None:
    if norm_weight is None:
        return
    if norm_weight.dtype not in FLOAT_DTYPES:
        raise dtype_error(OP, "norm_weight", norm_weight.dtype)
    if norm_weight.shape != input.shape[-1:]:
        got, expected = tuple(norm_weight.shape), tuple(input.shape[-1:])
        raise ValueError(f"{OP}: norm_weight has shape {got}, expected {expected}, the columns of input")
    if norm_weight.device != input.device:
        raise ValueError(f"{OP}: norm_weight is on {norm_weight.device}, expected {input.device}, the device of input")


def run(input: Tensor, parts: Parts, shape: tuple[int, int], kind: Kind, bias: Tensor | None,
        norm_weight: Tensor | None, eps: float | None, order: Tensor | None = None,
        backend: str | None = None) -> Tensor:  # fmt: skip
    """`rms_norm_quantized_linear` of a weight's parts."""
    op._check(input, parts, *shape, bias, OP)
    _check_norm(input, norm_weight)
    if order is not None or autocast_dtype(input.device) is not None:  # which has rules of its own for either op
        normed = rms_norm(input, input.shape[-1:], norm_weight, eps, backend=backend)
        return op.run(normed, parts, shape, kind, bias, order, backend)
    acc = accumulate_dtype(input.dtype)
    eps = torch.finfo(acc).eps if eps is None else eps
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    if norm_weight is not None and norm_weight.dtype != input.dtype:
        norm_weight = norm_weight.to(acc)
    x = input if input.dim() == 2 else input.reshape(-1, shape[1]) if shape[1] else input.flatten(0, -2)
    chosen = registry.pick(OP, (x, *parts, bias, *kind), backend)
    if chosen.name == "torch" and transform_active():
        normed = norm_reference.rms_norm(x, None, norm_weight, (shape[1],), eps, 0.0)
        y = reference.formula(normed, bias, *parts, *kind)
    elif needs_grad(x, norm_weight, bias):
        y = RMSNormQuantizedLinearFunction.apply(x, norm_weight, bias, eps, parts, kind, chosen.name)
    else:
        y, _ = chosen.fwd(x, norm_weight, eps, *parts, bias, *kind)
    return y if input.dim() == 2 else y.view(*input.shape[:-1], shape[0])


# --- the public function --------------------------------------------------------------------------------------------


def rms_norm_quantized_linear(
    input: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """`quantized_linear(rms_norm(input, (K,), norm_weight, eps), weight, bias)`: the start of a pre-norm block.

    Of a weight that rounds its input, the normed rows are rounded where they are made and never written out.

    Args:
        input: `[*, K]`, fp64, fp32, bf16 or fp16, any strides.
        weight, bias: as `quantized_linear`'s.
        norm_weight: `[K]`, any of the four dtypes; None: ones.
        eps: added to the mean square; None: the machine epsilon of the type of the statistics, as `rms_norm`'s.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: `[*, N]` in the dtype of `input`. The normed rows are rounded to that dtype first. Input, norm_weight and
        bias have gradients, of every order; the weight is frozen.
    Raises: as `quantized_linear`.
    Reference: Zhang, Sennrich 2019, arXiv:1910.07467.
    """
    parts, kind = op.parts_of(weight, OP)
    return run(input, parts, weight.shape, kind, bias, norm_weight, eps, weight.order, backend)


def _public(input, data, scales, zeros, second_scales, order, bias, norm_weight, columns, *, format, group_size=0,
            activations="", eps=None):  # fmt: skip
    weight = reference.weight_of(columns, data, scales, zeros, second_scales, format, group_size, activations)
    kind, parts = (format, group_size, activations), (data, scales, zeros, second_scales)
    return run(input, parts, weight.shape, kind, bias, norm_weight, eps, order)


_op.define_public(
    OP,
    "(Tensor input, Tensor data, Tensor scales, Tensor? zeros, Tensor? second_scales, Tensor? order, Tensor? bias,"
    ' Tensor? norm_weight, SymInt columns, *, str format, int group_size=0, str activations="", float? eps=None)'
    " -> Tensor",
    _public,
)
