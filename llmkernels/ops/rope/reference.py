"""rope in plain PyTorch: the `torch` backend, and the maths written out.

A pair of elements (a, b) of a head is turned by the angle of its position: (a cos - b sin, b cos + a sin). The pairs of
the first R of D elements are (j, j + R/2), "half-rotated" as in LLaMA and GPT-NeoX, or (2j, 2j + 1), "interleaved" as
in GPT-J; elements from R on stay. Su et al. 2021, arXiv:2104.09864.
"""

import torch
from torch import Tensor

from llmkernels._autograd import transform_active
from llmkernels._dtypes import accumulate_dtype


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """`x` `[*, D]` turned by `cos`, `sin`, one row for each of its rows: broadcastable to `[*, R/2]`.

    Computed in fp32 (fp64 for fp64) and rounded once; differentiable in all three.
    """
    half = cos.shape[-1]
    rotary = 2 * half
    acc = accumulate_dtype(x.dtype)
    turned, cos, sin = x[..., :rotary].to(acc), cos.to(acc), sin.to(acc)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    pair = (a * cos - b * sin, b * cos + a * sin)
    y = (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype)
    return y if rotary == x.shape[-1] else torch.cat((y, x[..., rotary:]), -1)


def check_positions(positions: Tensor, length: int) -> None:
    """Raises ValueError for a position that has no row in a table of `length` rows."""
    if positions.numel() == 0:
        return
    low, high = (int(value) for value in positions.aminmax())
    if low < 0:
        raise ValueError(f"rope: positions has {low}, expected 0 or more")
    if high >= length:
        raise ValueError(f"rope: positions has {high}, but cos and sin have {length} rows")


def rows_of(table: Tensor, positions: Tensor | None, seq_dim: int, seq: int) -> Tensor:
    """The rows of `table` for a tensor with `seq` places along `seq_dim`, broadcastable to it.

    `table` is `[L, C]`, taken at `positions` (`[S]` or `[B, S]`; None: 0, 1, ...), or `[B, S, C]`, taken as it is.
    A position outside of the table takes NaN where its value cannot be looked at: on a GPU, in a compiled graph.
    """
    if table.dim() == 3:
        rows = table
    elif positions is None:
        rows = table[:seq]
    else:
        inside = (positions >= 0) & (positions < table.shape[0])
        rows = table[positions.clamp(0, max(table.shape[0] - 1, 0)).long()]
        rows = torch.where(inside.unsqueeze(-1), rows, float("nan"))
    # [S, C] or [B, S, C]: a one for the heads, where they stand in x.
    batched = rows.dim() == 3
    if seq_dim == -3:
        rows = rows.unsqueeze(-2)
    elif batched:
        rows = rows.unsqueeze(1)
    return rows


def _rope(q, k, cos, sin, positions, seq_dim: int, interleaved: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    visible = q.device.type == "cpu" and not (torch.compiler.is_compiling() or transform_active())
    if positions is not None and visible:
        check_positions(positions, cos.shape[0])
    cos, sin = (rows_of(table, positions, seq_dim, q.shape[seq_dim]) for table in (cos, sin))
    sin = -sin if inverse else sin
    return rotate(q, cos, sin, interleaved), q.new_empty(0) if k is None else rotate(k, cos, sin, interleaved)


def rope_fwd(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    seq_dim: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """`q` and `k` turned; an empty tensor where there is no `k`. `seq_dim` is -2 or -3."""
    return _rope(q, k, cos, sin, positions, seq_dim, interleaved, False)


def rope_bwd(dq, dk, cos, sin, positions, seq_dim, interleaved) -> tuple[Tensor, Tensor]:
    """The gradients of `rope_fwd`: the arriving ones turned back by the same angles."""
    return _rope(dq, dk, cos, sin, positions, seq_dim, interleaved, True)


def rope_fwd_(q, k, cos, sin, positions, seq_dim, interleaved) -> None:
    """`rope_fwd` with its results written over `q` and `k`."""
    for tensor, turned in zip((q, k), rope_fwd(q, k, cos, sin, positions, seq_dim, interleaved), strict=True):
        if tensor is not None:
            tensor.copy_(turned)
