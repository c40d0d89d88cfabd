"""scaled_dot_product_attention: torch's signature and meaning, and what torch does not have."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels import _op, _random
from llmkernels._dtypes import autocast_dtype
from llmkernels.ops.attention import arguments
from llmkernels.ops.attention.op import attend

OP = "scaled_dot_product_attention"


def _leading(query: Tensor, key: Tensor, value: Tensor) -> torch.Size:
    """The broadcast shape of what stands before the heads."""
    shapes = query.shape[:-3], key.shape[:-3], value.shape[:-3]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        got = ", ".join(f"{name} {tuple(shape)}" for name, shape in zip(("query", "key", "value"), shapes, strict=True))
        raise ValueError(f"{OP}: the batch dimensions are {got}, expected ones that broadcast") from None


def _four_dimensions(tensor: Tensor, leading: torch.Size) -> Tensor:
    """[..., H, S, D] as [B, H, S, D], `leading` being all that makes up B. Of two dimensions: one batch, one head."""
    while tensor.dim() < 3:
        tensor = tensor[None]
    return tensor.expand(*leading, *tensor.shape[-3:]).reshape(-1, *tensor.shape[-3:])


def _check_shapes(query: torch.Size, key: torch.Size, value: torch.Size, *, grouped: bool) -> None:
    if min(len(query), len(key), len(value)) < (3 if grouped else 2):
        shapes = {"query": query, "key": key, "value": value}
        name = min(shapes, key=lambda name: len(shapes[name]))
        raise ValueError(f"{OP}: {name} has shape {tuple(shapes[name])}, expected (..., heads, length, head_dim)")
    if key[-1] != query[-1]:
        raise ValueError(
            f"{OP}: key has shape {tuple(key)}, expected a last dimension of {query[-1]}, the one of query"
        )
    if value[-2] != key[-2]:
        raise ValueError(f"{OP}: value has shape {tuple(value)}, expected {key[-2]} rows, the number of keys")


def _heads(tensor: Tensor) -> int:
    return tensor.shape[-3] if tensor.dim() > 2 else 1


def _as_many_heads(key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """key and value with different numbers of heads, as torch allows: the only ones of which heads are repeated."""
    common = math.lcm(_heads(key), _heads(value))
    if common == 0 or heads % common:
        return key, value
    return tuple(tensor.repeat_interleave(common // _heads(tensor), -3) for tensor in (key, value))


def _broadcast_heads(tensors: tuple[Tensor, ...], heads: tuple[int, ...]) -> tuple[Tensor, ...]:
    """query, key and value with a single head expanded where needed: torch broadcasts heads as it does batches. Key and
    value stay as they are where both have one, which all the query heads share."""
    most = max(heads)
    expanded = lambda tensor: tensor.expand(*tensor.shape[:-3], most, *tensor.shape[-2:])
    return tuple(expanded(tensor) if of == 1 else tensor for tensor, of in zip(tensors, heads, strict=True))


def _mask(mask: Tensor, query: Tensor, shape: tuple[int, ...], leading: torch.Size) -> Tensor:
    """`mask` as four dimensions, each 1 or that of the scores. `shape`: (heads, S, T)."""
    if mask.dtype not in (torch.bool, query.dtype, torch.float32):
        raise TypeError(f"{OP}: attn_mask has dtype {mask.dtype}, expected bool, {query.dtype} or float32")
    arguments.check_tensor(OP, "attn_mask", mask, query, None)
    whole = (*leading, *shape)
    sizes = (1,) * (len(whole) - mask.dim()) + tuple(mask.shape)
    if len(sizes) != len(whole) or any(size not in (1, full) for size, full in zip(sizes, whole, strict=True)):
        raise ValueError(f"{OP}: attn_mask has shape {tuple(mask.shape)}, expected one that broadcasts to {whole}")
    mask = mask.reshape(sizes)
    if len(leading) == 1:
        return mask
    if all(size == 1 for size in sizes[:-3]):
        return mask.reshape(1, *sizes[-3:])
    return mask.expand(*leading, *sizes[-3:]).reshape(-1, *sizes[-3:])


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As torch's own op: the lower type of autocast for everything floating but fp64."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    kept = (torch.float64, torch.bool)
    return tuple(t if t is None or t.dtype in kept else t.to(dtype) for t in tensors)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal: str | None = None,
    window: Sequence[int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T) @ value; torch.nn.functional.scaled_dot_product_attention's signature.

    Args:
        query: `[..., H, S, D]`, fp64, fp32, bf16 or fp16, any strides; two dimensions are one head.
        key, value: `[..., Hk, T, D]` and `[..., Hk, T, Dv]`, the dtype of `query`; batch dimensions broadcast.
        attn_mask: broadcasts to `[..., H, S, T]`; boolean (True takes part), or added to the scores (the dtype of
            `query`, or fp32), with a gradient. Together with a causal mask or a window both hold.
        dropout_p: probability with which a weight is zero (always: there is no `training` here); drawn from torch's
            generator, see llmkernels/_random.py.
        is_causal: query i sees keys 0 to i, `causal="top_left"`.
        scale: factor of the scores; default 1 / sqrt(D).
        enable_gqa: allow H to be a multiple of Hk: query head h reads key head h // (H / Hk), never copied.
        causal: "top_left", or "bottom_right": query i sees keys 0 to i + T - S (flash-attn's alignment).
        window: (left, right): query i sees the keys from center - left to center + right, -1 being open. The center
            is i + T - S, or i with `causal="top_left"`.
        softcap: scores become softcap * tanh(scores / softcap); 0 is off.
        alibi_slopes: `[H]` or `[B, H]`: subtracts slope * |center - j| from the score of key j.
        sinks: `[H]`: a score for each head that joins the denominator alone, with a gradient.
        return_lse: also return the logarithm of the denominator, `[..., H, S]` in fp32 (fp64 for fp64), with a
            gradient.
        deterministic: every backward here is deterministic, whatever this says: for callers of other libraries.
        backend: "cuda" | "triton" | "cpu" | "torch"; default: the first that can run this call.
    Returns: `[..., H, S, Dv]` in the dtype of `query`, or (that, lse). A query without any key gets zeros, a zero
        gradient and an lse of -inf (its sink, with sinks). NaN in what takes part comes out as NaN.
    Raises: ValueError or TypeError, shapes, devices, dtypes or options disagree; NoBackendError, a forced backend
        cannot run this call (the message says why).
    Reference: Vaswani et al. 2017, arXiv:1706.03762; Dao 2023, arXiv:2307.08691; reference.py has the maths.
    """
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    arguments.check_dtypes(OP, query, key=key, value=value)
    shapes = query.shape, key.shape, value.shape
    _check_shapes(*shapes, grouped=enable_gqa)
    # The usual call is told from others once: its time would be the time of such questions.
    as_given = len(shapes[0]) == len(shapes[1]) == len(shapes[2]) == 4 and (
        shapes[0][0] == shapes[1][0] == shapes[2][0]
    )
    options = arguments.options(
        OP, shapes[0][-1], scale=scale, is_causal=is_causal, causal=causal, window=window, softcap=softcap,
        dropout_p=dropout_p,
    )  # fmt: skip
    leading = shapes[0][:1] if as_given else _leading(query, key, value)
    if enable_gqa and _heads(key) != _heads(value):
        key, value = _as_many_heads(key, value, _heads(query))
    of_each = _heads(query), _heads(key), _heads(value)
    arguments.check_heads(OP, *of_each, grouped=enable_gqa)
    if of_each[0] < of_each[1] or of_each[1] != of_each[2]:
        query, key, value = _broadcast_heads((query, key, value), of_each)
    heads = _heads(query)
    if alibi_slopes is not None:
        arguments.head_vector(OP, "alibi_slopes", alibi_slopes, query, heads, leading.numel())
    if sinks is not None:
        arguments.head_vector(OP, "sinks", sinks, query, heads, None)
    mask = None
    if attn_mask is not None:
        mask = _mask(attn_mask, query, (heads, shapes[0][-2], shapes[1][-2]), leading)
    q, k, v = (query, key, value) if as_given else (_four_dimensions(x, leading) for x in (query, key, value))
    seed = _random.draw_seed(q.device) if options.dropout_p > 0.0 else None
    result = attend(
        OP,
        q,
        k,
        v,
        mask,
        alibi_slopes,
        sinks,
        seed,
        None,
        None,
        shapes[0][-2],
        shapes[1][-2],
        options,
        return_lse,
        backend,
    )
    if as_given:
        return result
    shape = (*leading, heads) if max(map(len, shapes)) > 2 else ()
    out = lambda tensor: tensor.reshape(*shape, *tensor.shape[2:])
    return (out(result[0]), out(result[1])) if return_lse else out(result)


def _public(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, **options):
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, return_lse=True, **options
    )


_op.define_public(
    OP,
    "(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False,"
    " float? scale=None, bool enable_gqa=False, *, str? causal=None, int[]? window=None, float softcap=0.0,"
    " Tensor? alibi_slopes=None, Tensor? sinks=None, bool? deterministic=None) -> (Tensor out, Tensor lse)",
    _public,
)
