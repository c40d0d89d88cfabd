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

    make: Callable[[], Tensor]

    @staticmethod
    def of(make: Callable[[], Tensor]) -> Tensor:
        found = Tensor._make_subclass(Deferred, _EMPTY)
        found.make = make
        return found

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*made(args), **made(kwargs or {}))


class CachedStates(Deferred):
    """Keys or values `[B, Hk, T, D]` of a `layer` of a cache."""

    layer: object

    @staticmethod
    def of(layer, make: Callable[[], Tensor]) -> Tensor:
        found = Tensor._make_subclass(CachedStates, _EMPTY)
        found.layer, found.make = layer, make
        return found


class KnownMask(Deferred):
    """A mask `[B, 1, S, T]` that says no more than the lengths of a cache: causal, in a `window` of so many keys."""

    window: int | None

    @staticmethod
    def of(window: int | None, make: Callable[[], Tensor]) -> Tensor:
        found = Tensor._make_subclass(KnownMask, _EMPTY)
        found.window, found.make = window, make
        return found


def made(value):
    """The same with real tensors, also in lists, tuples and dicts."""
    if isinstance(value, Deferred):
        return value.make()
    if isinstance(value, dict):
        return {key: made(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(made, value))
    return value
