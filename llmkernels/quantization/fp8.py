"""fp8: one byte a weight, a floating-point number of eight bits (e4m3), with a scale for a row or for a block.

    weight[n, k]  ~  scale * q[n, k]            scale = max |weight| / 448 of the row, or of the block of 128 x 128

`data` `[N, K]` float8_e4m3fn, row-major, one byte each:

      bit   7   6   5   4   3   2   1   0
          +---+---------------+-----------+
          | s |   exponent    | fraction  |   (-1)^s * 2^(exponent - 7) * (1 + fraction / 8)
          +---+---------------+-----------+

    exponent 0 is 2^-6 * fraction / 8; exponent 15 with fraction 7 is NaN and never written; there is no infinity.
    The largest is 448. q is rounded to nearest, ties to even.

    group_size None   `scales` `[N]` fp32, one for each row
    group_size 128    `scales` `[ceil(N / 128), ceil(K / 128)]` fp32, one for each block; those at the edges are smaller

Scales are finite and above zero; a row or block of zeros has scale 1.

Activations may be fp8 too, dynamically: each row of x `[.., K]` has its own scale, max |x| / 448, found when it
arrives. A row of x with a NaN or an infinity gives a row of NaN.

Reference: Micikevicius et al. 2022, arXiv:2209.05433; blocks: DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.
"""

import torch
from torch import Tensor

from llmkernels.quantization import _checks, _groups, _rows
from llmkernels.quantization.tensor import QuantizedTensor

MAX = 448.0
BLOCK = 128
GROUP_SIZES = (None, BLOCK)


def quantize(
    weight: Tensor,
    name: str = "weight",
    *,
    group_size: int | None = None,
    activations: str | None = None,
    **options,
) -> QuantizedTensor:
    """A weight `[N, K]` of any floating dtype as fp8, for activations as they are or rounded to "fp8".

    Args:
        group_size: None for a scale for each row, 128 for one for each block of 128 x 128.
    Raises: ValueError or TypeError: `weight` is not a floating matrix of finite values that fp32 can scale, or an
        option is none of these. `name` is what the messages call it.
    """
    _checks.no_option("fp8", options)
    _checks.group("fp8", group_size, GROUP_SIZES)
    wide = _checks.finite_matrix("fp8", weight, name)
    largest = wide.abs()
    if group_size is None:
        largest = largest.amax(1) if wide.shape[1] else wide.new_zeros(len(wide))
    else:
        largest = _groups.split(largest, BLOCK).amax(2)  # [N, blocks of columns]
        largest = _groups.split(largest.t(), BLOCK).amax(2).t()
    scales = _checks.finite_scales("fp8", largest, MAX, torch.float32, name)
    values = wide / spread(scales, tuple(weight.shape), group_size).double()
    data = round_to_fp8(values)
    return QuantizedTensor("fp8", tuple(weight.shape), data, scales, weight.dtype, None, None, group_size, activations)


def empty(
    shape: tuple[int, int], device=None, *, group_size: int | None = None, activations: str | None = None, **options
) -> QuantizedTensor:
    """Zeros of a shape `[N, K]` and the options of `quantize`, for what is loaded later. Raises: as `quantize`."""
    _checks.no_option("fp8", options)
    _checks.group("fp8", group_size, GROUP_SIZES)
    data = torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    sizes = (_groups.count(shape[0], BLOCK), _groups.count(shape[1], BLOCK)) if group_size else shape[:1]
    scales = torch.ones(sizes, dtype=torch.float32, device=device)
    return QuantizedTensor("fp8", shape, data, scales, torch.float32, None, None, group_size, activations)


def round_to_fp8(values: Tensor) -> Tensor:
    """Values of -448 to 448 to the nearest number of fp8; others to the largest of their sign."""
    # torch rounds fp64 by way of fp32, which has room enough: a tie of fp8 is never made by rounding to fp32 first,
    # but for values within 2^-24 of one.
    return values.clamp(-MAX, MAX).float().to(torch.float8_e4m3fn)


def spread(scales: Tensor, shape: tuple[int, int], group_size: int | None) -> Tensor:
    """The scale of each weight: `[N, K]`, or `[N, 1]` with one for each row."""
    if group_size is None:
        return scales[:, None]
    return scales.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]


def check(tensor: QuantizedTensor) -> None:
    """Raises ValueError where the parts do not have the shapes and dtypes that this file says."""
    rows, columns = tensor.shape
    _checks.absent("fp8", zeros=tensor.zeros, second_scales=tensor.second_scales)
    _checks.group("fp8", tensor.group_size, GROUP_SIZES)
    _checks.part("fp8", "data", tensor.data, (torch.float8_e4m3fn,), (rows, columns))
    blocks = (_groups.count(rows, BLOCK), _groups.count(columns, BLOCK))
    _checks.part("fp8", "data's scales", tensor.scales, (torch.float32,), blocks if tensor.group_size else (rows,))


def check_values(tensor: QuantizedTensor, name: str = "data") -> None:
    """Raises ValueError for bytes and scales that `quantize` never writes; for what comes from a file."""
    if bool((tensor.data.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError(f"fp8: {name} has a NaN, expected finite numbers")
    _checks.finite_positive("fp8", tensor.scales, name)


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """scale * q, `[N, K]` in the order that is stored, in `dtype` or the weight's own."""
    dtype = dtype or tensor.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (tensor.data.to(wide) * spread(tensor.scales, tensor.shape, tensor.group_size).to(wide)).to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations `[.., K]` as (fp8 `[.., K]`, scales fp32 `[.., 1]`)."""
    values, scales = _rows.scaled(x, MAX)
    return round_to_fp8(values), scales
