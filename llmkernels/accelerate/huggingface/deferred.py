"""Tensors that are not made unless something other than our attention asks for them.

transformers hands attention all keys of a cache, in one piece, and a mask. The cache kernel reads neither: it has the
cache itself, and the lengths. So a cache of ours returns a `CachedStates`, and our masks are a `KnownMask`. Any torch
function, method or attribute of these makes the real tensor first, so whoever else gets one computes what he would
have without us.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_EMPTY = torch.empty(0)  # what all of them are made over, and nobody sees


class Deferred(Tensor):
    """A tensor that `make()` gives."""

    def make(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*made(args), **made(kwargs or {}))


class CachedStates(Deferred):
    """The `keys` or `values`, `[B, Hk, T, D]`, that a layer of a cache has when somebody asks."""

    layer: object
    which: str

    @staticmethod
    def of(layer, which: str) -> Tensor:
        found = Tensor._make_subclass(CachedStates, _EMPTY)
        found.layer, found.which = layer, which
        return found

    def make(self) -> Tensor:
        return getattr(self.layer, self.which)


class KnownMask(Deferred):
    """A mask `[B, 1, S, T]` that says no more than the lengths of a cache: causal, in a `window` of so many keys."""

    window: int | None
    mask: Callable[[], Tensor]

    @staticmethod
    def of(window: int | None, mask: Callable[[], Tensor]) -> Tensor:
        found = Tensor._make_subclass(KnownMask, _EMPTY)
        found.window, found.mask = window, mask
        return found

    def make(self) -> Tensor:
        return self.mask()


def made(value):
    """The same with real tensors, also in lists, tuples and dicts."""
    if isinstance(value, Deferred):
        return value.make()
    if isinstance(value, dict):
        return {key: made(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(made, value))
    return value
