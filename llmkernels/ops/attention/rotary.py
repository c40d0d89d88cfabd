"""Rotary position embeddings of what is appended to a cache. Su et al. 2021, arXiv:2104.09864."""

import torch
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`x` `[*, D]` with its pairs (a, b) turned to (a cos - b sin, b cos + a sin).

    `cos` and `sin` broadcast to `[*, R/2]`. The pairs of the first R elements are (2j, 2j + 1) where interleaved, else
    (j, j + R/2); elements from R on stay. Computed in fp32 (fp64 for fp64) and rounded once.
    """
    acc = accumulate_dtype(x.dtype)
    cos, sin = cos.to(acc), sin.to(acc)
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(acc), x[..., 2 * half :]
    a, b = turned.unflatten(-1, (half, 2) if interleaved else (2, half)).unbind(-1 if interleaved else -2)
    pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if interleaved else -2)
    return torch.cat((pairs.flatten(-2).to(x.dtype), rest), -1)


def rows_at(table: Tensor, start: int | Tensor, count: int) -> Tensor:
    """The rows start .. start + count of `table` `[L, C]`: `[1 or B, count, C]`; `start` is one number or `[B]`.

    A row that the table has not got is NaN: on a GPU nobody has looked at `start`.
    """
    if not isinstance(start, Tensor):
        return table[None, start : start + count]
    rows = start[:, None] + torch.arange(count, device=start.device)
    inside = (rows >= 0) & (rows < table.shape[0])
    return torch.where(inside[..., None], table[rows.clamp(0, table.shape[0] - 1)], torch.nan)
