"""Activations that are rounded row by row when they arrive, which int8 and fp8 share."""

import torch
from torch import Tensor


def scaled(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """(x / scale `[.., K]`, within -largest ... largest but for rounding; scale `[.., 1]`), both fp32.

    The scale is max |x| / largest of a row, 1 in a row of zeros. In a row with a NaN or an infinity it is NaN, and the
    first result zero where x is not finite.
    """
    wide = x.detach().float()
    scales = wide.abs().amax(-1, keepdim=True) / largest if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    scales = torch.where(scales == 0.0, 1.0, scales)
    values = torch.nan_to_num(wide / scales, 0.0, 0.0, 0.0)
    # Without this an infinite scale times a product of zero would be the only NaN.
    return values, torch.where(scales.isfinite(), scales, torch.nan)
