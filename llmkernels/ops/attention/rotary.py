"""Rotary position embeddings of what is appended to a cache. Su et al. 2021, arXiv:2104.09864."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkernels._dtypes import FLOAT_DTYPES, dtype_error
from llmkernels.ops.attention import arguments
from llmkernels.ops.rope.op import rope


def check(op: str, rotary, query: Tensor, k: Tensor | None, turned: int, lengths: list[int] | None) -> None:
    """`turned`: how many positions the query takes; `lengths` before the append, where they can be looked at."""
    kinds = (Tensor, Tensor, bool)
    if not isinstance(rotary, Sequence) or len(rotary) not in (2, 3) or not all(map(isinstance, rotary, kinds)):
        got = tuple(type(x).__name__ for x in rotary) if isinstance(rotary, Sequence) else type(rotary).__name__
        raise TypeError(f"{op}: rotary is {got}, expected tensors (cos, sin) or with a bool (cos, sin, interleaved)")
    if k is None:
        raise ValueError(f"{op}: rotary is given without k and v, expected the new keys that it turns")
    cos, sin = rotary[:2]
    for name, tensor in (("cos", cos), ("sin", sin)):
        arguments.check_tensor(op, name, tensor, query, None)
        if tensor.dtype not in FLOAT_DTYPES:
            raise dtype_error(op, name, tensor.dtype)
    if cos.dim() != 2 or 2 * cos.shape[1] > query.shape[3]:
        raise ValueError(
            f"{op}: cos has shape {tuple(cos.shape)}, expected (positions, pairs) and no more than"
            f" {query.shape[3] // 2} pairs"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"{op}: sin has shape {tuple(sin.shape)}, expected {tuple(cos.shape)}, the shape of cos")
    if lengths and max(lengths) + max(k.shape[1], turned) > cos.shape[0]:
        needed = max(lengths) + max(k.shape[1], turned)
        raise ValueError(f"{op}: cos has {cos.shape[0]} positions, expected at least {needed}")


def turn(query, k, rotary, start: int | Tensor, turned: int, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The query and the new keys turned as at their positions; `start` is one number or `[B]`."""
    appended, queries = k.shape[1], query.shape[1]
    options = {"interleaved": len(rotary) == 3 and rotary[2], "seq_dim": -3, "backend": backend}

    def positions(count: int) -> Tensor:
        steps = torch.arange(count, device=query.device)
        return start[:, None] + steps if isinstance(start, Tensor) else steps + start

    if turned == appended == queries:
        return rope(query, k, *rotary[:2], positions(queries), **options)
    places = positions(turned)
    places = places if turned == queries else places.expand(*places.shape[:-1], queries)
    query, _ = rope(query, None, *rotary[:2], places, **options)
    k, _ = rope(k, None, *rotary[:2], positions(appended), **options)
    return query, k
