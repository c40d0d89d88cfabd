"""nf4: four bits a weight, an index into sixteen quantiles of the normal distribution, and one scale for a group.

    weight[n, k]  ~  scale[n, g] * LEVELS[q[n, k]]            g = k // group_size,  scale = max |weight| of the group

Two weights share a byte of `data` `[N, (K + 1) // 2]` uint8, as in int4:

      byte j of row n:   bit   7   6   5   4   3   2   1   0
                             +---------------+---------------+
                             | q[n, 2j + 1]  |   q[n, 2j]    |
                             +---------------+---------------+

    plain    `scales` `[N, G]` bf16, fp16 or fp32, finite and above zero
    double   `scales` `[N, G]` int8, themselves quantized: with i = n * G + g,

                 scale[n, g] = second_scales[0] + second_scales[1 + i // 256] * scales[n, g]

             `second_scales` `[1 + ceil(N * G / 256)]` fp32: the mean of all scales, then the step of each 256

A group of zeros has scale 1 (plain) and codes 7, the level zero. LEVELS are fp32. Groups are 32, 64 or 128 columns or
the whole row (None); the last may be shorter. With odd K the last half byte is zero, and never read.

Reference: Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, arXiv:2305.14314, section 3 and appendix E.
"""

import torch
from torch import Tensor

from llmkernels.quantization import _checks, _groups
from llmkernels.quantization.tensor import QuantizedTensor

GROUP_SIZES = (32, 64, 128, None)
SECOND = 256  # scales that share a step
MAX = 127
ZERO = 7  # the code of the level zero
# Table of appendix E.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def quantize(
    weight: Tensor,
    name: str = "weight",
    *,
    group_size: int | None = 64,
    double: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    activations: str | None = None,
    **options,
) -> QuantizedTensor:
    """A weight `[N, K]` of any floating dtype as nf4.

    Args:
        group_size: 32, 64, 128, or None for one scale a row.
        double: quantize the scales too: 8 bits and 1/8 of one instead of 16 a group.
        scale_dtype: bfloat16, float16 or float32; with `double` it must be left as it is.
    Raises: ValueError or TypeError: `weight` is not a floating matrix of finite values that `scale_dtype` can scale, or
        an option is none of these. `name` is what the messages call it.
    """
    _checked(group_size, double, scale_dtype, activations, options)
    groups = _groups.split(_checks.finite_matrix("nf4", weight, name), group_size)
    largest = groups.abs().amax(2)
    if double:
        scales, second = _quantize_scales(largest)
        wide = read_scales(scales, second, torch.float64)
    else:
        scales, second = _checks.finite_scales("nf4", largest, 1.0, scale_dtype, name), None
        wide = scales.double()
    # A scale that was rounded to zero or below has zeros only.
    scaled = torch.where(wide[..., None] > 0.0, groups / wide[..., None], 0.0)
    codes = _nearest(scaled)
    data = pack(_groups.join(codes, weight.shape[1]))
    return QuantizedTensor("nf4", tuple(weight.shape), data, scales, weight.dtype, None, second, group_size)


def empty(
    shape: tuple[int, int],
    device=None,
    *,
    group_size: int | None = 64,
    double: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    activations: str | None = None,
    **options,
) -> QuantizedTensor:
    """Zeros of a shape `[N, K]` and the options of `quantize`, for what is loaded later. Raises: as `quantize`."""
    _checked(group_size, double, scale_dtype, activations, options)
    groups = (shape[0], _groups.count(shape[1], group_size))
    data = torch.full((shape[0], (shape[1] + 1) // 2), ZERO * 17, dtype=torch.uint8, device=device)
    if shape[1] % 2:
        data[:, -1:] = ZERO
    scales, second = torch.ones(groups, dtype=torch.int8 if double else scale_dtype, device=device), None
    if double:
        second = torch.ones(1 + _groups.count(groups[0] * groups[1], SECOND), dtype=torch.float32, device=device)
    return QuantizedTensor("nf4", shape, data, scales, torch.float32, None, second, group_size)


def _checked(group_size, double: bool, scale_dtype: torch.dtype, activations: str | None, options: dict) -> None:
    _checks.no_option("nf4", options | ({"activations": activations} if activations else {}))
    _checks.group("nf4", group_size, GROUP_SIZES)
    _checks.scale_dtype("nf4", scale_dtype)
    if double and scale_dtype != torch.bfloat16:
        raise ValueError(f"nf4: scale_dtype is {scale_dtype} with double=True, expected it left out: scales are int8")


def _nearest(values: Tensor) -> Tensor:
    """The index of the nearest level of each value, uint8."""
    levels = torch.tensor(LEVELS, dtype=values.dtype, device=values.device)
    return torch.bucketize(values, (levels[1:] + levels[:-1]) / 2.0).to(torch.uint8)


def _quantize_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    flat = largest.flatten()
    mean = flat.mean().float() if flat.numel() else flat.new_zeros((), dtype=torch.float32)
    parts = _groups.split((flat - mean.double())[None], SECOND)[0]
    steps = parts.abs().amax(1).div(MAX).float()
    steps = torch.where(steps == 0.0, 1.0, steps)
    codes = (parts / steps.double()[:, None]).round().clamp(-MAX, MAX).to(torch.int8)
    return codes.flatten()[: flat.numel()].view(largest.shape), torch.cat((mean[None], steps))


def read_scales(scales: Tensor, second_scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The scale of each group `[N, G]` in `dtype`, computed in it; plain or double."""
    if second_scales is None:
        return scales.to(dtype)
    steps = second_scales[1:].to(dtype).repeat_interleave(SECOND)[: scales.numel()].view(scales.shape)
    return second_scales[0].to(dtype) + steps * scales.to(dtype)


pack = _groups.pack_nibbles
unpack = _groups.unpack_nibbles


def check(tensor: QuantizedTensor) -> None:
    """Raises ValueError where the parts do not have the shapes and dtypes that this file says."""
    rows, columns = tensor.shape
    _checks.absent("nf4", zeros=tensor.zeros)
    _checks.group("nf4", tensor.group_size, GROUP_SIZES)
    groups = (rows, _groups.count(columns, tensor.group_size))
    _checks.part("nf4", "data", tensor.data, (torch.uint8,), (rows, (columns + 1) // 2))
    if tensor.second_scales is None:
        _checks.part("nf4", "data's scales", tensor.scales, _checks.SCALE_DTYPES, groups)
    else:
        _checks.part("nf4", "data's scales", tensor.scales, (torch.int8,), groups)
        steps = _groups.count(rows * groups[1], SECOND)
        _checks.part("nf4", "data's second_scales", tensor.second_scales, (torch.float32,), (1 + steps,))


def check_values(tensor: QuantizedTensor, name: str = "data") -> None:
    """Raises ValueError for scales that `quantize` never writes; for what comes from a file."""
    if tensor.second_scales is None:
        _checks.finite_positive("nf4", tensor.scales, name)
    elif not bool(tensor.second_scales.isfinite().all()):
        raise ValueError(f"nf4: {name}'s second_scales have a value that is not finite")


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """scale * LEVELS[q], `[N, K]` in the order that is stored, in `dtype` or the weight's own."""
    dtype, columns = dtype or tensor.dtype, tensor.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    levels = torch.tensor(LEVELS, dtype=torch.float32, device=tensor.data.device).to(wide)
    scales = read_scales(tensor.scales, tensor.second_scales, wide)
    codes = unpack(tensor.data, columns).int()
    return (levels[codes] * _groups.spread(scales, columns, tensor.group_size)).to(dtype)
