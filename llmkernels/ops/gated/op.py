"""swiglu, geglu and reglu: schemas, fakes, argument checks, autograd, backend order."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import FLOAT_DTYPES, dtype_error
from llmkernels.ops.gated import reference

OP_OF = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu", "relu": "reglu"}  # activation -> op

# --- raw ops: one forward and one backward; without `up`, `gate` is packed --------------------------------------------


def _fwd_fake(gate, up, activation):
    return gate.new_empty(gate.shape if up is not None else (*gate.shape[:-1], gate.shape[-1] // 2))


def _bwd_fake(dy, gate, up, activation, wanted):
    dgate = gate.new_empty(gate.shape if wanted[0] else 0)
    return dgate, gate.new_empty(gate.shape if wanted[1] and up is not None else 0)


def _portable_fwd(gate, up, activation):
    return registry.pick(OP_OF[activation], (gate, up)).fwd(gate, up, activation)


def _portable_bwd(dy, gate, up, activation, wanted):
    return registry.pick(OP_OF[activation], (gate, up)).bwd(dy, gate, up, activation, wanted)


_op.define_kernel("gated_fwd", "(Tensor gate, Tensor? up, str activation) -> Tensor", _fwd_fake, _portable_fwd)
_op.define_kernel(
    "gated_bwd",
    "(Tensor dy, Tensor gate, Tensor? up, str activation, bool[2] wanted) -> (Tensor dgate, Tensor dup)",
    _bwd_fake,
    _portable_bwd,
)
_op.lazy_triton("llmkernels.ops.gated.triton_kernels", ("gated_fwd", "gated_bwd"))

# --- autograd -------------------------------------------------------------------------------------------------------


class GatedFunction(torch.autograd.Function):
    """apply(gate, up, activation, chosen) -> y. Saves its inputs alone; a packed `gate` (up is None) has one gradient.

    `activation` is "silu" | "gelu" | "gelu_tanh" | "relu"; `chosen` names the backend of both directions.
    """

    @staticmethod
    def forward(ctx, gate, up, activation, chosen):
        ctx.save_for_backward(gate, up)
        ctx.settings = (activation, chosen)
        return registry.entry(OP_OF[activation], chosen).fwd(gate, up, activation)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        activation, chosen = ctx.settings
        needs = ctx.needs_input_grad
        if is_differentiated():
            formula = lambda gate, up: reference.gated_fwd(gate, up, activation)
            dgate, dup = differentiable_backward(formula, (gate, up), (dy,))
        else:
            bwd = registry.entry(OP_OF[activation], chosen).bwd
            dgate, dup = bwd(dy, gate, up, activation, (needs[0], needs[1]))
        return dgate if needs[0] else None, dup if needs[1] else None, None, None


# --- arguments ------------------------------------------------------------------------------------------------------


def _check(op: str, gate: Tensor, up: Tensor | None) -> None:
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, name, tensor.dtype)
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(
                f"{op}: packed gate has shape {tuple(gate.shape)}, expected an even last dimension: gate, then up"
            )
        return
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up has shape {tuple(up.shape)}, expected {tuple(gate.shape)}, the shape of gate")
    if up.device != gate.device:
        raise ValueError(f"{op}: up is on {up.device}, expected {gate.device}, the device of gate")


def gated(gate: Tensor, up: Tensor | None, activation: str, backend: str | None) -> Tensor:
    """`activation` of `gate`, times `up`: what the public functions and the module call."""
    op = OP_OF[activation]
    _check(op, gate, up)
    if up is not None and up.dtype != gate.dtype:
        dtype = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(dtype), up.to(dtype)
    chosen = registry.pick(op, (gate, up), backend)
    if chosen.name == "torch" and transform_active():
        return reference.gated_fwd(gate, up, activation)
    if needs_grad(gate, up):
        return GatedFunction.apply(gate, up, activation, chosen.name)
    return chosen.fwd(gate, up, activation)


# --- the public functions -------------------------------------------------------------------------------------------


def swiglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`silu(gate) * up`, the gated unit of LLaMA's MLP, in one pass.

    Args:
        gate: `[*, C]`, fp64, fp32, bf16 or fp16, any strides; without `up` packed, `[*, 2 * C]`: gate, then up.
        up: the shape of `gate`; both are promoted to a common dtype as their product would be.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: `[*, C]`, computed in fp32 (fp64 for fp64) and rounded once. The backward recomputes from `gate` and `up`,
        so that nothing else is kept, and gives a packed input one packed gradient.
    Raises: ValueError or TypeError, shapes, devices or dtypes do not fit; NoBackendError, a forced backend cannot run
        this call (the message says why).
    Reference: Shazeer 2020, arXiv:2002.05202.
    """
    return gated(gate, up, "silu", backend)


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """`gelu(gate) * up` in one pass. `approximate` as torch.nn.functional.gelu's: "none" (exact) or "tanh".

    Other arguments, the result and errors as `swiglu`; ValueError for another `approximate`.
    Reference: Shazeer 2020, arXiv:2002.05202; Hendrycks, Gimpel 2016, arXiv:1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"geglu: approximate is {approximate!r}, expected 'none' or 'tanh'")
    return gated(gate, up, "gelu" if approximate == "none" else "gelu_tanh", backend)


def reglu(gate: Tensor, up: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`relu(gate) * up` in one pass. Arguments, the result and errors as `swiglu`.

    Reference: Shazeer 2020, arXiv:2002.05202.
    """
    return gated(gate, up, "relu", backend)


# --- backends, best first -------------------------------------------------------------------------------------------

for _name in dict.fromkeys(OP_OF.values()):
    registry.register(_name, *_op.backends(_name, "gated_fwd", "gated_bwd", reference.gated_fwd, reference.gated_bwd))

_op.define_public("swiglu", "(Tensor gate, Tensor? up=None) -> Tensor", swiglu)
_op.define_public("geglu", '(Tensor gate, Tensor? up=None, *, str approximate="none") -> Tensor', geglu)
_op.define_public("reglu", "(Tensor gate, Tensor? up=None) -> Tensor", reglu)
