"""The masks that transformers' models make when their attention is ours: its sdpa's, or none where a cache knows."""

import torch
from torch import Tensor

from llmkernels.accelerate.huggingface.deferred import KnownMask


class KeyCount(int):
    """How many keys there are with the new ones, as the `layer` of a cache of ours answers.

    transformers asks the cache for this number and hands it to the function that makes the mask, which learns of the
    cache in this way alone.
    """

    layer: object

    @classmethod
    def of(cls, count: int, layer) -> "KeyCount":
        found = cls(count)
        found.layer = layer
        return found


def attention_mask(
    *, kv_length: int, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **options
) -> Tensor | None:
    """What AttentionMaskInterface asks for: a boolean mask `[B, 1, S, T]`, or None where causal is all there is to say.

    A cache of ours that knows what `attention_mask` says gets a KnownMask: padding on the left is not in such a cache,
    and causal, with or without a window, is all that `allow_is_causal_skip` leaves. The arguments are sdpa_mask's.
    """
    from transformers.masking_utils import sdpa_mask

    # A compiler knows numbers and no more of them, and traces the mask.
    layer = None if torch.compiler.is_compiling() else getattr(kv_length, "layer", None)
    if layer is not None:
        window = options.get("local_size")
        if allow_is_causal_skip and layer.window == window and layer.knows(attention_mask, options["q_length"]):
            return KnownMask.of(window, lambda: _of_cache(layer, kv_length, attention_mask, options))
        if attention_mask is None:
            attention_mask = layer.rows.mask(kv_length, options.get("device"))
    return sdpa_mask(
        kv_length=kv_length, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **options
    )


def _of_cache(layer, kv_length: int, mask: Tensor | None, options: dict) -> Tensor:
    """The mask after all: whoever asks for it wants a tensor."""
    from transformers.masking_utils import sdpa_mask

    if mask is None:
        mask = layer.rows.mask(kv_length, options.get("device"))
    return sdpa_mask(kv_length=kv_length, attention_mask=mask, allow_is_causal_skip=False, **options)
