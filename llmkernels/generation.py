"""`generate(model, input_ids)`: a small loop around a causal language model: prefill, decode, sample, stop.

For models that are called and answer as those of Hugging Face's transformers: `model(input_ids, attention_mask,
past_key_values, use_cache)` gives `logits` and `past_key_values`.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llmkernels.accelerate import huggingface
from llmkernels.accelerate.huggingface import attention
from llmkernels.ops.softmax.sample import sample

OP = "generate"


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
    stop_tokens: int | Iterable[int] | None = None,
    pad_token: int | None = None,
    on_tokens: Callable[[Tensor], Any] | None = None,
    cache: Any = None,
) -> Tensor:
    """Continue each row of `input_ids`, token by token; greedily it gives what transformers' own generate gives.

    Args:
        model: a causal language model, in eval mode or not: it runs as it is.
        input_ids: `[B, S]` int64, S at least 1.
        attention_mask: `[B, S]`, 0 where a row is padded on its left, else 1; default: no padding.
        max_new_tokens: so many at most.
        temperature, top_k, top_p, min_p, generator: as `functional.sample`'s; temperature 0 takes the likeliest.
        stop_tokens: one or several that end a row; they are part of the result. Default: those of the model's
            `generation_config`; () for none.
        pad_token: what follows in a row that has ended while others go on. Default: the `generation_config`'s, or the
            first of the stop tokens.
        on_tokens: called with the new tokens `[B]` of each step, on the model's device; padding in rows that have
            ended. Returning False stops.
        cache: "static" or "paged", which make a cache of llmkernels.huggingface with the room that is needed (models of
            transformers); or a cache to go on with, whose keys are those of the first tokens of `input_ids`. Default:
            "static" where accelerate has made the model's attention ours, else what the model itself makes.
    Returns: `[B, S + new]` int64: the prompts and what follows them, until all rows have ended.
    Raises: TypeError or ValueError: shapes, dtypes or options do not fit, padding is not on the left alone, an
        encoder-decoder is given, the cache is too small, or the model gives no logits and cache.
    """
    prompt = _checked_mask(model, input_ids, attention_mask)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"{OP}: max_new_tokens is {max_new_tokens!r}, expected an int, 0 or more")
    stops = _stops(model, stop_tokens)
    pad = _pad(model, pad_token, stops)
    ends = torch.tensor(stops, dtype=torch.int64, device=input_ids.device)
    length = input_ids.shape[1] + max(max_new_tokens - 1, 0)  # the last token's keys are never needed
    step = _Step(model, input_ids, prompt, _cache(model, cache, len(input_ids), length))
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    tokens = [input_ids]
    for index in range(max_new_tokens):
        logits = step(tokens[-1] if index else input_ids[:, step.seen :])
        new = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, generator=generator)
        if stops:
            new = torch.where(ended, pad, new)
            ended = ended | torch.isin(new, ends)
        tokens.append(new[:, None])
        if on_tokens is not None and on_tokens(new) is False:
            break
        if stops and index + 1 < max_new_tokens and bool(ended.all()):
            break
    return torch.cat(tokens, 1)


class _Step:
    """Logits `[B, V]` after the tokens that it is given, beside the cache of all before them."""

    def __init__(self, model: nn.Module, input_ids: Tensor, mask: Tensor | None, cache):
        self.model, self.mask, self.cache = model, mask, cache
        self.known = inspect.signature(model.forward).parameters
        self.seen = 0 if cache is None else int(cache.get_seq_length())
        if self.seen >= input_ids.shape[1]:
            raise ValueError(f"{OP}: cache has {self.seen} tokens, expected fewer than input_ids, {input_ids.shape[1]}")
        # Without padding the model knows positions and mask by itself, and makes no mask at all.
        self.positions = None if mask is None else (mask.cumsum(1) - 1).clamp_(min=0)[:, self.seen :]
        self.prompted = False
        self.options = {"use_cache": True}
        if "logits_to_keep" in self.known:
            self.options["logits_to_keep"] = 1  # of a prompt's logits only the last are asked for
        if "return_dict" in self.known:
            self.options["return_dict"] = True

    def __call__(self, tokens: Tensor) -> Tensor:
        options = dict(self.options)
        if self.cache is not None:
            options["past_key_values"] = self.cache
        if self.prompted and self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(tokens), 1)), 1)
            self.positions = self.positions[:, -1:] + 1
        self.prompted = True
        if self.mask is not None:
            options["attention_mask"] = self.mask
            if "position_ids" in self.known:
                options["position_ids"] = self.positions
        result = self.model(input_ids=tokens, **options)
        logits, self.cache = (getattr(result, name, None) for name in ("logits", "past_key_values"))
        if logits is None or self.cache is None:
            raise TypeError(
                f"{OP}: {type(self.model).__name__} gave {type(result).__name__} without "
                f"{'logits' if logits is None else 'past_key_values'}, expected a causal language model with a cache"
            )
        return logits[:, -1]


def _cache(model: nn.Module, given: Any, batch: int, length: int) -> Any:
    """The cache to begin with, or None: the model makes one."""
    if given is not None and not isinstance(given, str):
        if not callable(getattr(given, "get_seq_length", None)):
            raise TypeError(f"{OP}: cache is {type(given).__name__}, expected 'static', 'paged' or a cache")
        room = getattr(given, "max_length", length)
        if room < length:
            raise ValueError(
                f"{OP}: cache has room for {room} tokens, expected {length}, all of the result but the last"
            )
        return given
    if given not in (None, "static", "paged"):
        raise ValueError(f"{OP}: cache is {given!r}, expected 'static', 'paged' or a cache")
    if not huggingface.is_pretrained(model):
        if given is None:
            return None
        raise TypeError(f"{OP}: cache is {given!r}, expected None for {type(model).__name__}, not a transformers model")
    from llmkernels.huggingface import caches

    if given is None and not (attention.is_ours(model.config.get_text_config()) and caches.why_not(model) is None):
        return None
    if given == "paged":
        return caches.PagedCache(model, batch * -(-length // caches.PAGE_SIZE))
    return caches.StaticCache(model, length)


def _checked_mask(model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask as int64, or None where nothing is padded."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{OP}: {type(model).__name__} is an encoder-decoder, expected a causal language model")
    if input_ids.dtype != torch.int64:
        raise TypeError(f"{OP}: input_ids has dtype {input_ids.dtype}, expected torch.int64")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"{OP}: input_ids has shape {tuple(input_ids.shape)}, expected [B, S], 1 or more of each")
    if mask is None:
        return None
    if mask.shape != input_ids.shape:
        raise ValueError(f"{OP}: attention_mask has shape {tuple(mask.shape)}, expected {tuple(input_ids.shape)}")
    if mask.device != input_ids.device:
        raise ValueError(f"{OP}: attention_mask is on {mask.device}, expected {input_ids.device}, that of input_ids")
    kept = mask != 0
    if bool(kept.all()):
        return None
    if not bool(kept[:, -1].all()):
        row = int((~kept[:, -1]).nonzero()[0])
        raise ValueError(f"{OP}: row {row} of attention_mask ends with 0, expected padding on the left alone")
    if bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        row = int((kept[:, :-1] & ~kept[:, 1:]).nonzero()[0, 0])
        raise ValueError(f"{OP}: row {row} of attention_mask has a 0 after a 1, expected padding on the left alone")
    return kept.long()


def _stops(model: nn.Module, given: int | Iterable[int] | None) -> list[int]:
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return []
    stops = [given] if isinstance(given, int) else list(given)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in stops):
        raise ValueError(f"{OP}: stop_tokens is {given!r}, expected ints, 0 or more")
    return stops


def _pad(model: nn.Module, given: int | None, stops: list[int]) -> int:
    if given is None:
        given = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    return (stops[0] if stops else 0) if given is None else given
