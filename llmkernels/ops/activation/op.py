"""gelu and silu with a bias: schemas, fakes, argument checks, autograd, backend order."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, dtype_error
from llmkernels.ops.activation import reference

OP_OF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu"}  # activation -> op

# --- raw ops: one forward and one backward ----------------------------------------------------------------------------


def _fwd_fake(input, bias, activation):
    return input.new_empty(input.shape)


def _bwd_fake(dy, input, bias, activation, wanted):
    cols = input.shape[-1] if input.dim() else 1
    dbias = input.new_empty(cols if wanted[1] else 0, dtype=accumulate_dtype(input.dtype))
    return input.new_empty(input.shape if wanted[0] else 0), dbias


def _portable_fwd(input, bias, activation):
    return registry.pick(OP_OF[activation], (input, bias)).fwd(input, bias, activation)


def _portable_bwd(dy, input, bias, activation, wanted):
    return registry.pick(OP_OF[activation], (input, bias)).bwd(dy, input, bias, activation, wanted)


_op.define_kernel("activation_fwd", "(Tensor input, Tensor? bias, str activation) -> Tensor", _fwd_fake, _portable_fwd)
_op.define_kernel(
    "activation_bwd",
    "(Tensor dy, Tensor input, Tensor? bias, str activation, bool[2] wanted) -> (Tensor dinput, Tensor dbias)",
    _bwd_fake,
    _portable_bwd,
)
_op.lazy_triton("llmkernels.ops.activation.triton_kernels", ("activation_fwd", "activation_bwd"))

# --- autograd -------------------------------------------------------------------------------------------------------


class ActivationFunction(torch.autograd.Function):
    """apply(input, bias, activation, chosen) -> y. Saves its inputs alone; `bias` may be None.

    `activation` is "silu" | "gelu" | "gelu_tanh"; `bias` is of the type of sums; `chosen` names the backend of both
    directions.
    """

    @staticmethod
    def forward(ctx, input, bias, activation, chosen):
        ctx.save_for_backward(input, bias)
        ctx.settings = (activation, chosen)
        return registry.entry(OP_OF[activation], chosen).fwd(input, bias, activation)

    @staticmethod
    def backward(ctx, dy):
        input, bias = ctx.saved_tensors
        activation, chosen = ctx.settings
        needs = ctx.needs_input_grad
        if is_differentiated():
            formula = lambda input, bias: reference.activation_fwd(input, bias, activation)
            dinput, dbias = differentiable_backward(formula, (input, bias), (dy,))
        else:
            bwd = registry.entry(OP_OF[activation], chosen).bwd
            dinput, dbias = bwd(dy, input, bias, activation, (needs[0], needs[1]))
        return dinput if needs[0] else None, dbias if needs[1] else None, None, None


# --- arguments ------------------------------------------------------------------------------------------------------


def _check(op: str, input: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, name, tensor.dtype)
    if bias is None:
        return
    if input.dim() == 0 or tuple(bias.shape) != tuple(input.shape[-1:]):
        expected = tuple(input.shape[-1:]) if input.dim() else "(C,) with an input of [*, C]"
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected {expected}, the last dimension of input")
    if bias.device != input.device:
        raise ValueError(f"{op}: bias is on {bias.device}, expected {input.device}, the device of input")


def _activation(input: Tensor, bias: Tensor | None, activation: str, backend: str | None) -> Tensor:
    op = OP_OF[activation]
    _check(op, input, bias)
    if bias is not None:
        dtype = torch.promote_types(input.dtype, bias.dtype)
        if dtype != input.dtype:
            input = input.to(dtype)
        bias = bias.to(accumulate_dtype(dtype))
    chosen = registry.pick(op, (input, bias), backend)
    if chosen.name == "torch" and transform_active():
        return reference.activation_fwd(input, bias, activation)
    if needs_grad(input, bias):
        return ActivationFunction.apply(input, bias, activation, chosen.name)
    return chosen.fwd(input, bias, activation)


# --- the public functions -------------------------------------------------------------------------------------------


def gelu(input: Tensor, bias: Tensor | None = None, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """`torch.nn.functional.gelu(input + bias)` in one pass, and one pass for both gradients.

    Args:
        input: `[*, C]`, fp64, fp32, bf16 or fp16, any strides.
        bias: `[C]`, of any of these dtypes; the two are promoted as their sum would be.
        approximate: as torch's: "none" (exact) or "tanh".
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: `[*, C]`, computed in fp32 (fp64 for fp64) and rounded once. The backward recomputes from `input` and
        `bias`; the gradient of `bias` is summed in fp32, in the same order in every run.
    Raises: ValueError or TypeError, shapes, devices, dtypes or `approximate` do not fit; NoBackendError, a forced
        backend cannot run this call (the message says why).
    Reference: Hendrycks, Gimpel 2016, arXiv:1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return _activation(input, bias, "gelu" if approximate == "none" else "gelu_tanh", backend)


def silu(input: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`torch.nn.functional.silu(input + bias)` in one pass, and one pass for both gradients.

    Arguments, the result and errors as `gelu`, without `approximate`.
    Reference: Hendrycks, Gimpel 2016, arXiv:1606.08415.
    """
    return _activation(input, bias, "silu", backend)


# --- backends, best first -------------------------------------------------------------------------------------------

_RAW = ("activation_fwd", "activation_bwd", reference.activation_fwd, reference.activation_bwd)
for _name in dict.fromkeys(OP_OF.values()):
    registry.register(_name, *_op.backends(_name, *_RAW))

_op.define_public("gelu", '(Tensor input, Tensor? bias=None, *, str approximate="none") -> Tensor', gelu)
_op.define_public("silu", "(Tensor input, Tensor? bias=None) -> Tensor", silu)
