"""Cross entropy in plain PyTorch: the `torch` backend, and the maths written out.

Shapes: `input` is `[rows, C]`, `target` `[rows]` (class indices) or `[rows, C]` (probabilities), `weight` `[C]`,
`dloss` `[rows]`. With u = softcap * tanh(input / softcap), or input where softcap is 0, and lse = logsumexp(u):

    loss = sum_c q_c (lse - u_c) + z_loss * lse^2

where q is, with label smoothing s and class weights w, (1 - s) w_t [c == t] + s / C w_c for an index t and
w_c ((1 - s) target_c + s / C) for probabilities.

Szegedy et al. 2015, arXiv:1512.00567 (label smoothing); Chowdhery et al. 2022, arXiv:2204.02311 (z-loss); Gemma Team
2024, arXiv:2408.00118 (softcap).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype


class Settings(NamedTuple):
    """The options of a call that are numbers, in the order of the raw ops."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


def capped(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def losses(input: Tensor, target: Tensor, weight: Tensor | None, settings: Settings) -> Tensor:
    """`[rows]`: the loss of each row, not rounded. Differentiable in `input` and, if it is probabilities, `target`."""
    acc = accumulate_dtype(input.dtype)
    classes, smoothing = input.shape[-1], settings.label_smoothing
    u = capped(input.to(acc), settings.softcap)
    log_p = torch.log_softmax(u, -1)
    if target.is_floating_point():
        q = target.to(acc)
        if smoothing:
            q = q * (1.0 - smoothing) + smoothing / classes
        loss = -(log_p * (q if weight is None else q * weight)).sum(-1)
    else:
        index = target.clamp(0, classes - 1)
        loss = -(1.0 - smoothing) * log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        if weight is not None:
            loss = loss * weight[index]
        if smoothing:
            loss = loss - smoothing / classes * (log_p if weight is None else log_p * weight).sum(-1)
    if settings.z_loss:
        loss = loss + settings.z_loss * torch.logsumexp(u, -1).square()
    if not target.is_floating_point():
        loss = loss.masked_fill((target < 0) | (target >= classes), float("nan"))
        loss = loss.masked_fill(target == settings.ignore_index, 0.0)
    return loss


def denominator(target: Tensor, weight: Tensor | None, rows: int, ignore_index: int) -> Tensor | float:
    """What the mean divides the sum of the losses by: the weight of all targets, or the number of rows."""
    if target.is_floating_point():
        return float(rows)
    kept = target != ignore_index
    if weight is None:
        return kept.sum()
    return (weight[target.clamp(0, weight.shape[0] - 1)] * kept).sum()


def reduced(loss: Tensor, divisor: Tensor | float | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / divisor


def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, settings: Settings, dtype: torch.dtype
) -> Tensor:
    """The differentiable formula, rounded once to `dtype`."""
    loss = losses(input, target, weight, settings)
    divisor = denominator(target, weight, input.shape[0], settings.ignore_index)
    return reduced(loss, divisor, reduction).to(dtype)


# --- the raw ops ----------------------------------------------------------------------------------------------------


def of_rows(input, target, weight, stats, settings):
    """(u, p_c, q_c), in the type of sums."""
    acc = accumulate_dtype(input.dtype)
    classes, smoothing = input.shape[-1], settings.label_smoothing
    u = capped(input.to(acc), settings.softcap)
    p = torch.exp((u - stats[0].unsqueeze(-1)) - stats[1].unsqueeze(-1))
    if target.is_floating_point():
        q = target.to(acc) * (1.0 - smoothing) + smoothing / classes
    else:
        index = target.clamp(0, classes - 1).unsqueeze(-1)
        q = torch.full_like(u, smoothing / classes)
        q.scatter_add_(-1, index, torch.full_like(index, 1.0 - smoothing, dtype=acc))
    return u, p, q if weight is None else q * weight


def cross_entropy_fwd(input, target, weight, dloss, ignore_index, label_smoothing, z_loss, softcap):
    """Returns (loss, stats, dinput): `stats` is (max, log of the sum of exp(u - max), sum of q), `[3, rows]`.

    `dinput`, what `cross_entropy_bwd` would return for `dloss`, is an empty tensor without `dloss`.
    """
    settings = Settings(ignore_index, label_smoothing, z_loss, softcap)
    loss = losses(input, target, weight, settings)
    u = capped(input.to(loss.dtype), softcap)
    largest = u.amax(-1)
    log_sum = torch.log(torch.exp(u - largest.unsqueeze(-1)).sum(-1))
    stats = torch.stack((largest, log_sum, _mass(input, target, weight, settings)))
    if dloss is None:
        return loss, stats, input.new_empty(0)
    dinput = cross_entropy_bwd(dloss, input, target, weight, stats, *settings)
    return loss, stats, dinput


def _mass(input, target, weight, settings):
    """`[rows]`: the sum of q."""
    acc = accumulate_dtype(input.dtype)
    classes, smoothing = input.shape[-1], settings.label_smoothing
    ones = torch.ones(classes, dtype=acc, device=input.device) if weight is None else weight
    if target.is_floating_point():
        return (target.to(acc) * ones).sum(-1) * (1.0 - smoothing) + smoothing * ones.mean()
    return (1.0 - smoothing) * ones[target.clamp(0, classes - 1)] + smoothing * ones.mean()


def cross_entropy_bwd(dloss, input, target, weight, stats, ignore_index, label_smoothing, z_loss, softcap):
    """Returns dinput, `[rows, C]`."""
    settings = Settings(ignore_index, label_smoothing, z_loss, softcap)
    u, p, q = of_rows(input, target, weight, stats, settings)
    of_p = stats[2] + 2.0 * z_loss * (stats[0] + stats[1])
    dinput = dloss.unsqueeze(-1) * (of_p.unsqueeze(-1) * p - q)
    if softcap:
        dinput = dinput * (1.0 - (u / softcap).square())
    if not target.is_floating_point():
        known = (target >= 0) & (target < input.shape[-1])
        dinput = torch.where(known.unsqueeze(-1), dinput, float("nan"))
        dinput = torch.where((target == ignore_index).unsqueeze(-1), 0.0, dinput)
    return dinput.to(input.dtype)


def cross_entropy_dtarget(dloss, input, target, weight, stats, settings):
    """The gradient of probabilities, `[rows, C]`: (1 - s) w_c (lse - u_c). Seldom wanted, so backends share it."""
    u = capped(input.to(stats.dtype), settings.softcap)
    distance = (stats[1].unsqueeze(-1) - (u - stats[0].unsqueeze(-1))) * (1.0 - settings.label_smoothing)
    if weight is not None:
        distance = distance * weight
    return (dloss.unsqueeze(-1) * distance).to(target.dtype)
