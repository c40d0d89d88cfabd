"""softmax and log_softmax with scale and mask in plain PyTorch: the `torch` backend, and the maths written out.

s = scale * x + mask, or -inf where a boolean mask is False; softmax = exp(s) / sum(exp(s)) along the last dimension and
log_softmax its logarithm. A row that is -inf everywhere gives 0, or -inf. What is -inf has no gradient.
"""

import torch
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype


def scores(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """s, in fp32 (fp64 for fp64)."""
    acc = accumulate_dtype(x.dtype)
    s = x.to(acc) * scale
    if mask is None:
        return s
    return torch.where(mask, s, float("-inf")) if mask.dtype == torch.bool else s + mask.to(acc)


def softmax_fwd(x: Tensor, mask: Tensor | None, scale: float, log: bool) -> Tensor:
    """The differentiable formula over the last dimension, rounded once."""
    s = scores(x, mask, scale)
    if s.numel() == 0:
        return s.to(x.dtype)
    dead = (s == float("-inf")).all(-1, keepdim=True)  # where torch's own functions give NaN
    safe = s.masked_fill(dead, 0.0)
    if log:
        y = torch.where(s == float("-inf"), s.detach(), torch.log_softmax(safe, -1))
    else:
        y = torch.softmax(safe, -1).masked_fill(dead, 0.0)
    return y.to(x.dtype)


def softmax_bwd(dy: Tensor, y: Tensor, scale: float, log: bool, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    """(dx, ds), the second in the dtype of sums; what is not wanted is an empty tensor."""
    acc = accumulate_dtype(y.dtype)
    dy, wide = dy.to(acc), y.to(acc)
    if log:
        dy = torch.where(wide == float("-inf"), 0.0, dy)
        ds = dy - wide.exp() * dy.sum(-1, keepdim=True)
    else:
        ds = wide * (dy - (dy * wide).sum(-1, keepdim=True))
    return (
        (ds * scale).to(y.dtype) if wanted[0] else y.new_empty(0),
        ds if wanted[1] else y.new_empty(0, dtype=acc),
    )
