"""The tolerance rule. It is a rule and not a table, and it is per row.

For every output row the rms error against the fp64 truth is at most `factor` times that of plain PyTorch in the same
dtype for that row, plus some ulp of the row's rms; the largest error is at most 1.5 `factor` times PyTorch's, plus
four times as many ulp of the row's largest value. OUTPUT and GRADIENT below are the factors and ulps. The ulps are
there because PyTorch's own error is sometimes luckily zero; a gradient, a sum of several rounded terms, needs more of
them. A rule over a whole tensor passes wrong kernels: large rows hide the errors of small ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """`factor` times PyTorch's rms error plus `ulp` of the row's rms.

    16-bit results, computed in fp32 and rounded once, always get 0.5 ulp: their rounding is PyTorch's error too.
    """

    factor: float
    ulp: float


OUTPUT = Tolerance(2.0, 1.0)
GRADIENT = Tolerance(3.0, 2.0)


@dataclass(frozen=True)
class Difference:
    """How far a result is from the truth. `message` is None if the rule accepts it.

    `max_error` and `baseline_error` are the largest absolute errors of the result and of plain PyTorch.
    """

    max_error: float
    baseline_error: float
    message: str | None


def compare_rows(
    actual: Tensor,
    truth: Tensor,
    baseline: Tensor,
    tolerance: Tolerance = OUTPUT,
    *,
    floor: Tensor | None = None,
) -> Difference:
    """Judge `actual` against the fp64 `truth` by the error that `baseline` makes.

    Args:
        actual, baseline: `[rows, cols]`, the dtype under test.
        truth: `[rows, cols]`, fp64.
        floor: `[rows]`, fp64: the rms size of the terms that a row is the sum of, which may cancel. Ulps are counted
            of the larger of this and the row itself.
    """
    if actual.shape != truth.shape:
        return Difference(float("inf"), 0.0, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if actual.dtype != baseline.dtype:
        return Difference(float("inf"), 0.0, f"dtype {actual.dtype}, expected {baseline.dtype}")
    if truth.numel() == 0:
        return Difference(0.0, 0.0, None)
    ulps = tolerance.ulp if actual.dtype.itemsize > 2 else 0.5
    if actual.dtype == torch.float64:
        ulps += 2.0  # the truth has no more digits than the result
    ulp = ulps * torch.finfo(actual.dtype).eps
    actual, baseline = actual.double(), baseline.double()
    special = _special_values(actual, truth, baseline)
    if special is not None:
        return Difference(float("inf"), 0.0, special)
    finite = torch.isfinite(truth) & torch.isfinite(baseline)
    truth = truth.where(finite, 0.0)
    error = (actual - truth).where(finite, 0.0).abs()
    reference_error = (baseline - truth).where(finite, 0.0).abs()
    rms_size, max_size = _rms(truth), truth.abs().amax(-1)
    if floor is not None:
        rms_size, max_size = torch.maximum(rms_size, floor), torch.maximum(max_size, floor)
    rms_allowed = tolerance.factor * _rms(reference_error) + ulp * rms_size
    max_allowed = 1.5 * tolerance.factor * reference_error.amax(-1) + 4.0 * ulp * max_size
    message = _worst(_rms(error), rms_allowed, "rms error") or _worst(error.amax(-1), max_allowed, "largest error")
    return Difference(error.max().item(), reference_error.max().item(), message)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(-1).sqrt()


def _worst(error: Tensor, allowed: Tensor, what: str) -> str | None:
    if bool((error <= allowed).all()):
        return None
    row = (error - allowed).nan_to_num(nan=float("inf")).argmax().item()
    return f"{what} of row {row} is {error[row].item():.3g}, allowed {allowed[row].item():.3g}"


def _special_values(actual: Tensor, truth: Tensor, baseline: Tensor) -> str | None:
    """NaN and Inf must stand where the truth has them, or where plain PyTorch of this dtype overflows."""
    if bool((torch.isnan(actual) != torch.isnan(truth)).logical_and(~torch.isnan(baseline)).any()):
        where = (torch.isnan(actual) != torch.isnan(truth)).nonzero()[0].tolist()
        return f"NaN at {where} is {torch.isnan(actual)[tuple(where)].item()}, expected otherwise"
    infinite = torch.isinf(truth) | torch.isinf(baseline)
    if bool((torch.isinf(actual) & ~infinite).any()):
        return f"Inf at {(torch.isinf(actual) & ~infinite).nonzero()[0].tolist()}, expected a finite value"
    return None
