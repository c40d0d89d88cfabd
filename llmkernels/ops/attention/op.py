"""The attention kernels' schemas, fakes, autograd and backends. sdpa.py, varlen.py and kvcache.py are what users call.

`scaled_dot_product_attention` and `attention_varlen` are one kernel: a packed batch is q [1, H, total, D] with
cu_seqlens. reference.py has the maths, and what `row_max` and `log_sum` are.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from llmkernels import _op, registry
from llmkernels._autograd import differentiable_backward, is_differentiated, needs_grad, transform_active
from llmkernels._dtypes import accumulate_dtype
from llmkernels.ops.attention import reference
from llmkernels.ops.attention.reference import Options

# --- raw ops --------------------------------------------------------------------------------------------------------

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed,"
    " Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q"
)
_OPTIONS = "float scale, SymInt window_left, SymInt window_right, bool top_left, float softcap, float dropout_p"


def _fwd_fake(q, k, v, *_):
    stats = q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    return reference.empty_out(q, v), stats, torch.empty_like(stats)


def _bwd_fake(dout, dlse, q, k, v, mask, alibi_slopes, sinks, *rest):
    wanted = rest[-1]
    return tuple(
        torch.empty_like(x) if want else q.new_empty(0) for x, want in zip((q, k, v, mask, sinks), wanted, strict=True)
    )


def _name(cu_seqlens_q: Tensor | None) -> str:
    return "scaled_dot_product_attention" if cu_seqlens_q is None else "attention_varlen"


def _entry(chosen: str, cu_seqlens_q: Tensor | None) -> registry.Backend:
    return registry.entry(_name(cu_seqlens_q), chosen)


def _picked(q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q):
    return registry.pick(_name(cu_seqlens_q), (q, k, v, mask, alibi_slopes, sinks))


def _portable_fwd(q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, *rest):
    chosen = _picked(q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q)
    return chosen.fwd(q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, *rest)


def _portable_bwd(dout, dlse, q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, *rest):
    chosen = _picked(q, k, v, mask, alibi_slopes, sinks, cu_seqlens_q)
    return chosen.bwd(dout, dlse, q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, *rest)


def _portable_kvcache(q, k_cache, v_cache, alibi_slopes, sinks, *rest):
    chosen = registry.pick("attention_kvcache", (q, k_cache, v_cache, None, alibi_slopes, sinks))
    return chosen.fwd(q, k_cache, v_cache, alibi_slopes, sinks, *rest)


_op.define_kernel(
    "attention_fwd",
    f"({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor row_max, Tensor log_sum)",
    _fwd_fake,
    _portable_fwd,
)
_op.define_kernel(
    "attention_bwd",
    f"(Tensor dout, Tensor? dlse, {_TENSORS}, SymInt max_seqlen_k, Tensor out, Tensor row_max, Tensor log_sum,"
    f" {_OPTIONS}, bool[5] wanted) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)",
    _bwd_fake,
    _portable_bwd,
)
# A cache is [B, Hk, T, D], or with a block_table paged: [pages, Hk, page_size, D]; row b has the pages of sequence b.
_op.define_kernel(
    "attention_kvcache_fwd",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? alibi_slopes, Tensor? sinks, Tensor? seqlens_k,"
    " Tensor? block_table, float scale, SymInt window_left, SymInt window_right, bool top_left, float softcap)"
    " -> (Tensor out, Tensor row_max, Tensor log_sum)",
    _fwd_fake,
    _portable_kvcache,
)
_op.lazy_triton("llmkernels.ops.attention.triton_kernels", ("attention_fwd", "attention_bwd", "attention_kvcache_fwd"))

# --- autograd -------------------------------------------------------------------------------------------------------


class AttentionFunction(torch.autograd.Function):
    """apply(q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options,
    return_lse, chosen) -> out, or (out, lse).

    4-D tensors as reference.py has them; `options` is a reference.Options, `chosen` the name of
    the backend of both directions. Saves its inputs, out and two numbers per row: nothing of the size of the scores.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                options, return_lse, chosen):  # fmt: skip
        tensors = (q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k)
        entry = _entry(chosen, cu_seqlens_q)
        out, row_max, log_sum = entry.fwd(*tensors, max_seqlen_q, *options)
        ctx.save_for_backward(*tensors, out, row_max, log_sum)
        ctx.settings = (max_seqlen_q, max_seqlen_k, options, chosen)
        ctx.set_materialize_grads(False)
        return (out, row_max + log_sum) if return_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        *tensors, out, row_max, log_sum = ctx.saved_tensors
        max_seqlen_q, max_seqlen_k, options, chosen = ctx.settings
        q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k = tensors
        needs = ctx.needs_input_grad[:6]
        if is_differentiated() or needs[4]:

            def formula(q, k, v, mask, alibi_slopes, sinks):
                rest = (seed, cu_seqlens_q, cu_seqlens_k, options)
                return reference.attention(q, k, v, mask, alibi_slopes, sinks, *rest)

            grads = differentiable_backward(formula, (q, k, v, mask, alibi_slopes, sinks), (dout, dlse))
            if not is_differentiated():
                grads = [None if grad is None else grad.detach() for grad in grads]
        else:
            wanted = (*needs[:4], needs[5])
            bwd = _entry(chosen, cu_seqlens_q).bwd
            dout = torch.zeros_like(out) if dout is None else dout
            dq, dk, dv, dmask, dsinks = bwd(
                dout, dlse, *tensors, max_seqlen_q, max_seqlen_k, out, row_max, log_sum, *options, wanted
            )
            grads = (dq, dk, dv, dmask, None, dsinks)
        return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *(None,) * 8)


def attend(op: str, q, k, v, mask, alibi_slopes, sinks, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
           options: Options, return_lse: bool, backend: str | None):  # fmt: skip
    """Checked 4-D tensors to out, or (out, lse): the choice of the backend, and of autograd's way."""
    differentiable = (q, k, v, mask, alibi_slopes, sinks)
    chosen = registry.pick(op, differentiable, backend)
    if chosen.name == "torch" and transform_active():
        out, lse = reference.attention(*differentiable, seed, cu_seqlens_q, cu_seqlens_k, options)
        return (out, lse) if return_lse else out
    tensors = (*differentiable, seed, cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    if needs_grad(*differentiable):
        return AttentionFunction.apply(*tensors, max_seqlen_k, options, return_lse, chosen.name)
    out, row_max, log_sum = chosen.fwd(*tensors, *options)
    return (out, row_max + log_sum) if return_lse else out


# --- backends, best first -------------------------------------------------------------------------------------------


def _kernels_refuse(q, k, v, mask, alibi_slopes, sinks, *_) -> str | None:
    if q.dtype == torch.float64:
        return "fp64 runs on torch alone"
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "alibi_slopes requires a gradient, which torch alone computes"
    return None


def _refuses_above(most: int) -> Callable[..., str | None]:
    """The kernels' refusals, and heads of more than `most` elements, which no tile can hold."""

    def refuses(q, k, v, *rest) -> str | None:
        if (dim := max(q.shape[-1], v.shape[-1])) > most:
            return f"head_dim is {dim}, more than {most}"
        return _kernels_refuse(q, k, v, *rest)

    return refuses


_REFUSE = {"cpu": _kernels_refuse, "cuda": _refuses_above(256), "triton": _refuses_above(512)}

_KERNELS = ("attention_fwd", "attention_bwd")
_REFERENCES = (reference.attention_fwd, reference.attention_bwd)

registry.register(
    "scaled_dot_product_attention",
    *_op.backends("scaled_dot_product_attention", *_KERNELS, *_REFERENCES, refuse=_REFUSE),
)
# The lengths of packed sequences are values, by which the reference cuts its tensors.
_OPAQUE = map(_op.opaque_reference, _KERNELS, _REFERENCES)
registry.register("attention_varlen", *_op.backends("attention_varlen", *_KERNELS, *_OPAQUE, refuse=_REFUSE))
registry.register(
    "attention_kvcache",
    *_op.backends(
        "attention_kvcache",
        "attention_kvcache_fwd",
        None,
        _op.opaque_reference("attention_kvcache_fwd", reference.attention_kvcache_fwd),
        None,
        refuse=_REFUSE,
    ),
)
