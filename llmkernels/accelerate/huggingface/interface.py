"""Fused attention as an implementation of transformers' AttentionInterface, from keys or from a cache of ours."""

import functools
import math

import torch
from torch import Tensor

from llmkernels import functional
from llmkernels.accelerate.huggingface import masks
from llmkernels.accelerate.huggingface.deferred import CachedStates, KnownMask, made

NAME = "llmkernels"

# What a model may hand to its attention beside q, k, v and the mask. The others of these say nothing that the mask,
# the shapes and the module do not say too; as for transformers' sdpa, they need not be read.
KNOWN = frozenset(
    {"dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "position_bias", "output_attentions",
     "deterministic", "position_ids", "use_cache", "past_key_values", "cache_position"}
)  # fmt: skip


@functools.cache
def register(backend: str | None) -> str:
    """Make the name known to transformers, for attention and, without which padding would be dropped, for masks.

    Returns the name: another one for each backend that is forced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    name = NAME if backend is None else f"{NAME}_{backend}"
    AttentionInterface.register(name, functools.partial(attention, backend=backend))
    AttentionMaskInterface.register(name, masks.attention_mask)
    return name


def attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, position_bias: Tensor | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, cache=None, output_attentions: bool | None = False,
    *, backend: str | None = None, **unread,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The function that models call.

    Args:
        module: the attention module, whose `is_causal` counts where the argument is None.
        query: `[B, H, S, D]`; key, value: `[B, Hk, T, D]`, H a multiple of Hk; or those of a cache of ours, which is
            then attended to as it is, if the mask says nothing that it does not know.
        attention_mask: broadcasts to `[B, H, S, T]`: boolean (True takes part), or added to the scores; or None.
            Without one a causal module sees the first keys up to its own, if there is more than one query.
        position_bias: added to the scores.
        s_aux: `[H]`: sinks, a score of each head that joins the denominator alone.
        output_attentions: also return the weights, which plain PyTorch computes then.
    Returns: (`[B, S, H, D]`, weights `[B, H, S, T]` or None).
    Raises: NotImplementedError, a paged cache of transformers' continuous batching is given.
    """
    if type(key) is CachedStates or type(attention_mask) is KnownMask:
        plain = dropout == 0.0 and position_bias is None and not output_attentions
        if plain and type(attention_mask) is KnownMask and type(key) is CachedStates and key.layer.takes(query):
            options = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "backend": backend}
            return key.layer.attend(query, attention_mask.window, **options), None
        key, value, attention_mask = made((key, value, attention_mask))
    if cache is not None:
        raise NotImplementedError(
            "llmkernels: attention got a paged cache (continuous batching), expected none; restore the model for that"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = query.shape[2] > 1 and attention_mask is None and causal
    mask = _mask(attention_mask, position_bias, query.dtype)
    if scaling is None:
        scaling = 1.0 / math.sqrt(query.shape[-1])
    options = {"softcap": softcap or 0.0, "sinks": s_aux, "backend": backend}
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scaling, grouped, **options)
    weights = _weights(query, key, mask, causal, scaling, softcap, s_aux) if output_attentions else None
    return out.transpose(1, 2).contiguous(), weights


def _mask(mask: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask with the bias in it."""
    if mask is not None and mask.dtype not in (torch.bool, dtype, torch.float32):
        mask = mask.to(dtype)
    if bias is None or mask is None:
        return mask if bias is None else bias
    return torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask


def _weights(query, key, mask, causal: bool, scaling: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """The weights before dropout, in plain PyTorch."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    scores = scores if not softcap else softcap * torch.tanh(scores / softcap)
    if causal:
        kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~kept, -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores).view(-1, 1, 1).expand(*scores.shape[:-1], 1)), -1)
    return torch.softmax(scores, -1)[..., : key.shape[2]].nan_to_num(0.0).to(query.dtype)
