"""Caches of keys and values for transformers' models, `model.generate(..., past_key_values=cache)`."""

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from llmkernels.huggingface.layers import PagedLayer, StaticLayer
from llmkernels.huggingface.pages import Pages
from llmkernels.huggingface.rows import Rows

# Keys. Attention of one query to 8192 of them took 209 us with pages of 16, 200 of 64, 190 of 256 (in one piece 151;
# one thread of a Zen 5), and longer pages leave more of the last empty.
PAGE_SIZE = 64


def _layers(model) -> tuple[list[str], list[dict]]:
    config = getattr(model, "config", model).get_text_config(decoder=True)
    return get_layer_types_and_kwargs(config)


def why_not(model) -> str | None:
    """Why a model or config of transformers cannot have one of these caches, or None."""
    for index, kind in enumerate(_layers(model)[0]):
        if kind not in ("full_attention", "sliding_attention"):
            return f"layer {index} is {kind}, expected full_attention or sliding_attention"
    return None


def _windows(op: str, model) -> list[int | None]:
    """Of each layer."""
    if not hasattr(getattr(model, "config", model), "get_text_config"):
        raise TypeError(f"{op}: got {type(model).__name__}, expected a model of transformers or its config")
    if (reason := why_not(model)) is not None:
        raise ValueError(f"{op}: {reason}")
    return [options.get("sliding_window") for options in _layers(model)[1]]


def _positive(op: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}, expected an int, 1 or more")
    return value


class _Cache(Cache):
    """What both have: `rows`, and every change of rows or lengths for all layers at once."""

    rows: Rows

    def _places(self) -> int:
        """Of the layer that has least: one that a forward did not reach has not what others have."""
        return min(layer.places for layer in self.layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        return self.layers[layer_idx].update(key_states, value_states)

    def reset(self) -> None:
        """Empty again; the memory stays."""
        super().reset()
        self.rows.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last places of every row, as many as the number is below 0."""
        if isinstance(tokens_to_remove, bool) or not isinstance(tokens_to_remove, int) or tokens_to_remove > 0:
            raise ValueError(
                f"{type(self).__name__}: tokens_to_remove is {tokens_to_remove!r}, expected 0 or a negative int"
            )
        for layer in self.layers:
            layer.places = max(layer.places + tokens_to_remove, 0)
        self.rows.crop(self._places())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._places() and self.batch_size > 0:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _select(self, indices: Tensor) -> None:
        self.rows.select(indices.tolist())

    def __repr__(self) -> str:
        places = self._places()
        return f"{type(self).__name__}({len(self.layers)} layers, {places} places of {self.get_max_length()})"


class StaticCache(_Cache):
    """Keys and values in one piece of memory for each layer, `[B, Hk, max_length, D]`, written in place.

    Batch, dtype and device are those of the first keys. Padding on the left of shorter prompts is not stored where
    accelerate has set the model's attention to ours, and only what is there is attended to; layers with a sliding
    window keep all keys and attend to those in the window. Any other attention gets the keys as it expects them.

    Args:
        model: a decoder of transformers, or its config; of an encoder-decoder the decoder counts, and an
            `EncoderDecoderCache(StaticCache(...), StaticCache(...))` has both.
        max_length: how many keys a row has room for.
    Raises: TypeError or ValueError, no model or config, layers of other kinds than full or sliding attention, or
        max_length is no positive int; when used, as `Layer.update` says.
    """

    def __init__(self, model: nn.Module | object, max_length: int):
        op = type(self).__name__
        _positive(op, "max_length", max_length)
        self.rows, self.max_length = Rows(), max_length
        super().__init__(layers=[StaticLayer(self.rows, window, max_length) for window in _windows(op, model)])

    def _select(self, indices: Tensor) -> None:
        for layer in self.layers:
            layer.select(indices)
        super()._select(indices)


class PagedCache(_Cache):
    """Keys and values in pages, which rows take as they grow and share where they began alike.

    Beam search and several answers to one prompt copy no keys: rows share pages, and a page is copied when a row writes
    into one that others have too. Otherwise as StaticCache.

    Args:
        model: as StaticCache's.
        pages: how many there are, for all rows together; each layer has `[pages, Hk, page_size, D]`.
        page_size: how many keys a page has.
    Raises: as StaticCache; when used too, if all pages are taken.
    Reference: Kwon et al. 2023, arXiv:2309.06180.
    """

    def __init__(self, model: nn.Module | object, pages: int, page_size: int = PAGE_SIZE):
        op = type(self).__name__
        self.rows, self.pages = Rows(), Pages(_positive(op, "pages", pages), _positive(op, "page_size", page_size))
        super().__init__(layers=[PagedLayer(self.rows, window, self.pages) for window in _windows(op, model)])

    def reset(self) -> None:
        super().reset()
        self.pages.clear()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.pages.of_rows:
            self.pages.crop(self.rows.lengths(self._places(), len(self.pages.of_rows)))

    def _select(self, indices: Tensor) -> None:
        if self.pages.of_rows:
            self.pages.select(indices.tolist())
        super()._select(indices)
