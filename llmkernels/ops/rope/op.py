"""rope: schemas, fakes, argument checks, autograd, backend order."""

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import FLOAT_DTYPES, accumulate_dtype, dtype_error
from llmkernels.ops.rope import reference

# --- raw ops: cos and sin are [L, R/2] or [B, S, R/2], of the dtype of q or that of its sums ------------------------


def _fake(q, k, cos, sin, positions, seq_dim, interleaved):
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _portable_fwd(q, k, cos, sin, positions, seq_dim, interleaved):
    tensors = (q, k, cos, sin, positions)
    return registry.pick("rope", tensors).fwd(*tensors, seq_dim, interleaved)


def _portable_bwd(dq, dk, cos, sin, positions, seq_dim, interleaved):
    tensors = (dq, dk, cos, sin, positions)
    return registry.pick("rope", tensors).bwd(*tensors, seq_dim, interleaved)


def _portable_fwd_(q, k, cos, sin, positions, seq_dim, interleaved):
    tensors = (q, k, cos, sin, positions)
    registry.pick("rope_", tensors).fwd(*tensors, seq_dim, interleaved)


_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? positions, int seq_dim, bool interleaved"
_op.define_kernel("rope_fwd", f"(Tensor q, Tensor? k, {_ARGUMENTS}) -> (Tensor, Tensor)", _fake, _portable_fwd)
_op.define_kernel("rope_bwd", f"(Tensor dq, Tensor? dk, {_ARGUMENTS}) -> (Tensor, Tensor)", _fake, _portable_bwd)
_op.define_kernel("rope_fwd_", f"(Tensor(a!) q, Tensor(b!)? k, {_ARGUMENTS}) -> ()", lambda *_: None, _portable_fwd_)
_op.lazy_triton("llmkernels.ops.rope.triton_kernels", ("rope_fwd", "rope_bwd", "rope_fwd_"))

# --- autograd -------------------------------------------------------------------------------------------------------
# The gradient is turned back by the same angles: of q and k themselves nothing is saved.


def _backward(ctx, dq, dk):
    cos, sin, positions = ctx.saved_tensors
    seq_dim, interleaved, chosen = ctx.settings
    wanted = [
        grad if grad is not None and need else None for grad, need in zip((dq, dk), ctx.needs_input_grad, strict=False)
    ]
    present = [grad for grad in wanted if grad is not None]
    if not present:
        return wanted
    # Made of differentiable operations, the reference's backward can itself be differentiated.
    bwd = reference.rope_bwd if is_differentiated() else registry.entry("rope", chosen).bwd
    turned = iter(bwd(present[0], present[1] if len(present) > 1 else None, cos, sin, positions, seq_dim, interleaved))
    return [None if grad is None else next(turned) for grad in wanted]


class RopeFunction(torch.autograd.Function):
    """apply(q, k, cos, sin, positions, seq_dim, interleaved, chosen) -> (q, k), or q alone if k is None.

    `seq_dim` is -2 or -3, cos and sin are `[L, R/2]` or `[B, S, R/2]`; `chosen` names the backend of both directions.
    """

    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, seq_dim, interleaved, chosen):
        ctx.save_for_backward(cos, sin, positions)
        ctx.settings = (seq_dim, interleaved, chosen)
        ctx.set_materialize_grads(False)
        turned = registry.entry("rope", chosen).fwd(q, k, cos, sin, positions, seq_dim, interleaved)
        return turned[0] if k is None else turned

    @staticmethod
    def backward(ctx, dq, dk=None):
        return *_backward(ctx, dq, dk), *[None] * 6


class RopeInplaceFunction(torch.autograd.Function):
    """apply(x, cos, sin, positions, seq_dim, interleaved, chosen) -> x, turned in place; arguments as RopeFunction's.

    One tensor: autograd follows an in-place write to a view only through a Function with one output.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, positions, seq_dim, interleaved, chosen):
        ctx.save_for_backward(cos, sin, positions)
        ctx.settings = (seq_dim, interleaved, chosen)
        ctx.mark_dirty(x)
        registry.entry("rope_", chosen).fwd(x, None, cos, sin, positions, seq_dim, interleaved)
        return x

    @staticmethod
    def backward(ctx, dx):
        return _backward(ctx, dx, None)[0], *[None] * 6


# --- arguments ------------------------------------------------------------------------------------------------------


def _check_heads(q: Tensor, k: Tensor | None, seq_dim: int) -> int:
    """Returns `seq_dim` counted from the end."""
    if q.dtype not in FLOAT_DTYPES:
        raise dtype_error("rope", "q", q.dtype)
    if not 2 <= q.dim() <= 4:
        raise ValueError(f"rope: q has shape {tuple(q.shape)}, expected 2 to 4 dimensions")
    if not isinstance(seq_dim, int):
        raise TypeError(f"rope: seq_dim is {seq_dim!r}, expected an int")
    from_end = seq_dim - q.dim() if seq_dim >= 0 else seq_dim
    if from_end not in (-2, -3) or -from_end > q.dim():
        raise ValueError(f"rope: seq_dim is {seq_dim}, expected -2 ([B, H, S, D]) or -3 ([B, S, H, D]) of {q.dim()}")
    if k is None:
        return from_end
    if k.dtype != q.dtype:
        raise TypeError(f"rope: k has dtype {k.dtype}, expected {q.dtype}, the dtype of q")
    if k.device != q.device:
        raise ValueError(f"rope: k is on {k.device}, expected {q.device}, the device of q")
    heads = -5 - from_end  # the other one of -2 and -3
    expected = list(q.shape)
    if k.dim() == q.dim() >= -heads:
        expected[heads] = k.shape[heads]
    if list(k.shape) != expected:
        raise ValueError(f"rope: k has shape {tuple(k.shape)}, expected {tuple(q.shape)}, but for the number of heads")
    return from_end


def _tables(q: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin as `[*, R/2]`, of a dtype that the kernels read."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in FLOAT_DTYPES:
            raise dtype_error("rope", name, table.dtype)
        if table.device != q.device:
            raise ValueError(f"rope: {name} is on {table.device}, expected {q.device}, the device of q")
    if sin.shape != cos.shape:
        raise ValueError(f"rope: sin has shape {tuple(sin.shape)}, expected {tuple(cos.shape)}, the shape of cos")
    if cos.dim() not in (2, 3):
        raise ValueError(f"rope: cos has shape {tuple(cos.shape)}, expected [L, R/2] or [B, S, R/2]")
    size, columns = q.shape[-1], cos.shape[-1]
    if columns == size and columns % 2 == 0 and columns > 0:
        if interleaved:
            raise ValueError(f"rope: cos has {columns} columns for heads of {size}: interleaved takes one for a pair")
        cos, sin = cos[..., : size // 2], sin[..., : size // 2]
    elif columns == 0 or 2 * columns > size:
        raise ValueError(
            f"rope: cos has {columns} columns for heads of {size}, expected one for each pair of elements, at most "
            f"{size // 2}, or {size}, an even number, with the second half as the first"
        )
    accumulate = accumulate_dtype(q.dtype)
    dtypes = {cos.dtype, sin.dtype}
    if dtypes != {q.dtype} and dtypes != {accumulate}:
        cos, sin = cos.to(accumulate), sin.to(accumulate)
    return cos, sin


def _check_places(q: Tensor, cos: Tensor, positions: Tensor | None, seq_dim: int) -> None:
    """Whether each place of the sequence has a row. The values of `positions` are the backends' affair."""
    seq, batch = q.shape[seq_dim], q.shape[0] if q.dim() == 4 else None
    if cos.dim() == 3:
        if positions is not None:
            raise ValueError(f"rope: positions is given, but cos of shape {tuple(cos.shape)} has its own row for each")
        if batch is None or tuple(cos.shape[:2]) not in ((batch, seq), (1, seq)):
            raise ValueError(f"rope: cos has shape {tuple(cos.shape)}, expected [B or 1, S, R/2] of {tuple(q.shape)}")
        return
    if positions is None:
        if cos.shape[0] < seq:
            raise ValueError(f"rope: cos and sin have {cos.shape[0]} rows, expected {seq} or more, the length of q")
        return
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"rope: positions has dtype {positions.dtype}, expected int64 or int32")
    if positions.device != q.device:
        raise ValueError(f"rope: positions is on {positions.device}, expected {q.device}, the device of q")
    shapes = [(seq,)] if batch is None else [(seq,), (batch, seq)]
    if tuple(positions.shape) not in shapes:
        raise ValueError(
            f"rope: positions has shape {tuple(positions.shape)}, expected {' or '.join(map(str, shapes))}"
        )
    if cos.shape[0] == 0 and positions.numel() > 0:
        raise ValueError("rope: cos and sin have no rows")


def _prepared(q, k, cos, sin, positions, seq_dim, interleaved):
    """The checked arguments of the raw ops."""
    seq_dim = _check_heads(q, k, seq_dim)
    cos, sin = _tables(q, cos, sin, interleaved)
    _check_places(q, cos, positions, seq_dim)
    if cos.dim() == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return q, k, cos, sin, positions, seq_dim, interleaved


# --- the public functions -------------------------------------------------------------------------------------------


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    inplace: bool = False,
    seq_dim: int = -2,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Rotary position embedding of queries and keys in one pass.

    Args:
        q: `[B, H, S, D]` with `seq_dim=-2`, `[B, S, H, D]` with `seq_dim=-3`, either without `B`, and without `H` too
            if `seq_dim` is -2; so packed sequences are `[total, H, D]` with `seq_dim=-3` and `positions`. fp64, fp32,
            bf16 or fp16, any strides.
        k: as `q`, with any number of heads; or None.
        cos, sin: `[L, R/2]`, a row for each position and a column for each pair of elements, R of D elements turned,
            the rest kept; `[B or 1, S, R/2]` holds the rows already taken. Any floating dtype: that of `q`, and fp32
            with 16 bits (fp64 with fp64), are read as they are, others converted first. With D columns, unless
            `interleaved`, all D elements are turned and the second half of the columns, taken to be as the first, is
            not read: the form that Hugging Face's models have.
        positions: `[S]` or `[B, S]`, int64 or int32: the row of `cos` and `sin` for each place; None: 0, 1, ...
        interleaved: the pairs are elements (2j, 2j + 1), as in GPT-J; else (j, j + R/2), as in LLaMA and GPT-NeoX.
        inplace: `rope_`: the results are written over `q` and `k`, which are returned.
        seq_dim: which dimension of `q` and `k` is the sequence.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: `(q, k)`, turned, in the dtype of `q`: computed in fp32 (fp64 for fp64) and rounded once. The gradient is
        turned back by the same angles. A gradient for `cos` or `sin` comes from the torch backend alone.
    Raises: ValueError or TypeError, shapes, devices or dtypes do not fit, or on a CPU a position has no row; a row of
        NaN instead on a GPU, whose values are not looked at, and in a compiled graph on the torch backend.
        NoBackendError, a forced backend cannot run this call (the message says why).
    Reference: Su et al. 2021, arXiv:2104.09864.
    """
    if inplace:
        return rope_(q, k, cos, sin, positions, interleaved=interleaved, seq_dim=seq_dim, backend=backend)
    arguments = _prepared(q, k, cos, sin, positions, seq_dim, interleaved)
    chosen = registry.pick("rope", arguments[:5], backend)
    if needs_grad(cos, sin) or (chosen.name == "torch" and transform_active()):
        turned = reference.rope_fwd(*arguments)
        return turned if k is not None else (turned[0], None)
    if needs_grad(q, k):
        turned = RopeFunction.apply(*arguments, chosen.name)
        return turned if k is not None else (turned, None)
    turned = chosen.fwd(*arguments)
    return turned if k is not None else (turned[0], None)


def rope_(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    seq_dim: int = -2,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`rope` in place: `q` and `k` are overwritten and returned. Arguments and errors as `rope`.

    Raises besides: RuntimeError, as torch's in-place operations do, for a leaf that requires a gradient, and ValueError
        for a tensor with several elements in one place of memory, as `expand` makes them.
    """
    arguments = _prepared(q, k, cos, sin, positions, seq_dim, interleaved)
    for name, tensor in (("q", q), ("k", k)):
        if (
            tensor is not None
            and 0 in tensor.stride()
            and any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        ):
            raise ValueError(f"rope: {name} is expanded, expected memory of its own for each element to be overwritten")
    chosen = registry.pick("rope_", arguments[:5], backend)
    recorded = needs_grad(q, k)
    learned = needs_grad(cos, sin)
    in_formula = learned or (chosen.name == "torch" and transform_active())
    if in_formula or (recorded and torch.compiler.is_compiling()):
        # What a gradient of cos and sin is made of must not be overwritten.
        given = [x.clone() if learned and x is not None else x for x in (q, k)]
        turned = rope(*given, cos, sin, positions, interleaved=interleaved, seq_dim=seq_dim, backend=backend)
        for tensor, values in zip((q, k), turned, strict=True):
            if tensor is not None:
                tensor.copy_(values)
        return q, k
    if not recorded:
        chosen.fwd(*arguments)
        return q, k
    rest = (*arguments[2:], chosen.name)
    q = RopeInplaceFunction.apply(q, *rest)
    return q, None if k is None else RopeInplaceFunction.apply(k, *rest)


# --- backends, best first -------------------------------------------------------------------------------------------


def _refuses(q, k=None, cos=None, sin=None, positions=None) -> str | None:
    if needs_grad(cos, sin):
        return "cos or sin requires a gradient, which only plain PyTorch gives"
    return None


_REFUSE = dict.fromkeys(_op.KERNEL_NAMESPACES, _refuses)

for _name, _fwd, _reference_fwd in (
    ("rope", "rope_fwd", reference.rope_fwd),
    ("rope_", "rope_fwd_", reference.rope_fwd_),
):
    _entries = _op.backends(_name, _fwd, "rope_bwd", _reference_fwd, reference.rope_bwd, refuse=_REFUSE)
    registry.register(_name, *_entries)

_OPTIONS = "Tensor cos, Tensor sin, Tensor? positions=None, *, bool interleaved=False, int seq_dim=-2"
_op.define_public("rope", f"(Tensor q, Tensor k, {_OPTIONS}) -> (Tensor, Tensor)", rope)
_op.define_public("rope_", f"(Tensor(a!) q, Tensor(b!) k, {_OPTIONS}) -> (Tensor(a!), Tensor(b!))", rope_)
