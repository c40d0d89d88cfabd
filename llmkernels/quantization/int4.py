"""int4: four bits a weight, one scale for a group of columns of a row, symmetric or with a zero point.

    weight[n, k]  ~  scales[n, g] * (q[n, k] - zeros[n, g])            g = k // group_size,  q = 0 ... 15

Two weights share a byte of `data` `[N, (K + 1) // 2]` uint8, the even column in the low half:

      byte j of row n:   bit   7   6   5   4   3   2   1   0
                             +---------------+---------------+
                             | q[n, 2j + 1]  |   q[n, 2j]    |
                             +---------------+---------------+

    symmetric    zeros is None and stands for 8; scales = max |weight| / steps, steps one of SYMMETRIC_STEPS
    asymmetric   `zeros` `[N, G]` uint8, 0 ... 16; scales = (max - min) / steps, steps one of ASYMMETRIC_STEPS, where 0
                 is among the weights

The steps of a group are those with the least sum of squared errors; with more than 7 or 15 of them the outermost
weights are clipped, and all others are finer.

`scales` `[N, G]` are bf16 (what `quantize` writes: the range of fp32 in half the bytes; weights are rounded to the
rounded scale), fp16 or fp32 (what checkpoints of others bring), finite and above zero. A group of zeros has scale 1. Of
a checkpoint a zero point may be 16: GPTQ's first form stores it less one. With odd K the last half byte is zero, and
never read. Groups are 32, 64 or 128 columns or the whole row (None); the last may be shorter.
"""

import torch
from torch import Tensor

from llmkernels.quantization import _checks, _groups
from llmkernels.quantization.tensor import QuantizedTensor

GROUP_SIZES = (32, 64, 128, None)
MIDDLE = 8  # of a symmetric code
CODES = 15
# 7 clips nothing, and 8 nothing negative; so a weight that was rounded once is rounded to itself. Normal weights in
# groups of 64 have 11 % less error than with 7 alone; steps of 0.1 in the place of these would give 1 % more.
SYMMETRIC_STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 10.0, 11.5, 13.0)
ASYMMETRIC_STEPS = (15.0, 15.5, 16.0, 16.5, 17.0, 18.0, 20.0, 22.5)
MAX_ZERO = 16
BLOCK = 2**18  # weights that scales are searched for at a time: their copies in fp64 and fp32 stay in a cache
# With int8 activations a group's sum is of products below 2^11 (16 * 127), in 32 bits.
MAX_COLUMNS = 2**20


def quantize(
    weight: Tensor,
    name: str = "weight",
    *,
    group_size: int | None = 64,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
    activations: str | None = None,
    **options,
) -> QuantizedTensor:
    """A weight `[N, K]` of any floating dtype as int4, for activations as they are or rounded to "int8".

    Args:
        group_size: 32, 64, 128, or None for one scale a row.
        symmetric: False stores a zero point for each group too, for weights that are not about zero.
        scale_dtype: bfloat16, float16 or float32.
        importance: `[K]`, what the squared error of a column counts where scales are chosen, for instance the mean
            square of its input; None: all alike.
    Raises: ValueError or TypeError: `weight` is not a floating matrix of finite values that `scale_dtype` can scale, or
        an option is none of these. `name` is what the messages call it.
    """
    _checks.no_option("int4", options)
    _checks.group("int4", group_size, GROUP_SIZES)
    _checks.scale_dtype("int4", scale_dtype)
    shape = (rows, columns) = _checks.matrix_shape("int4", weight, name)
    if importance is not None:
        if tuple(importance.shape) != (columns,) or not bool((importance.isfinite() & (importance >= 0.0)).all()):
            got = f"shape {tuple(importance.shape)}"
            raise ValueError(f"int4: importance has {got}, expected ({columns},), finite and not below zero")
        importance = _groups.split((importance / importance.max().clamp(min=1e-30)).float()[None], group_size)
    count = max(1, BLOCK // max(columns, 1))
    parts = []
    for first in range(0, max(rows, 1), count):
        groups = _groups.split(_checks.finite_matrix("int4", weight[first : first + count], name, first), group_size)
        scales, zeros = _best(groups, symmetric, scale_dtype, importance, (name, first))
        codes = _codes(groups, scales.double(), None if zeros is None else zeros.double())
        parts.append((pack(_groups.join(codes, columns)), scales, zeros))
    data, scales, zeros = (None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    return QuantizedTensor("int4", shape, data, scales, weight.dtype, zeros, None, group_size, activations)


def empty(
    shape: tuple[int, int],
    device=None,
    *,
    group_size: int | None = 64,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    activations: str | None = None,
    **options,
) -> QuantizedTensor:
    """Zeros of a shape `[N, K]` and the options of `quantize`, for what is loaded later. Raises: as `quantize`."""
    _checks.no_option("int4", options)
    _checks.group("int4", group_size, GROUP_SIZES)
    _checks.scale_dtype("int4", scale_dtype)
    groups = (shape[0], _groups.count(shape[1], group_size))
    data = torch.full((shape[0], (shape[1] + 1) // 2), MIDDLE * 17, dtype=torch.uint8, device=device)
    if shape[1] % 2:
        data[:, -1:] = MIDDLE
    scales = torch.ones(groups, dtype=scale_dtype, device=device)
    zeros = None if symmetric else torch.full(groups, MIDDLE, dtype=torch.uint8, device=device)
    return QuantizedTensor("int4", shape, data, scales, torch.float32, zeros, None, group_size, activations)


def _best(groups: Tensor, symmetric: bool, dtype: torch.dtype, importance: Tensor | None,
          where: tuple[str, int]) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(scales `[N, G]` in `dtype`, zeros `[N, G]` uint8 or None) of the least error for `[N, G, group_size]`.

    `where` is (what errors call the weight, its row that is the first here).
    """
    low, high = groups.amin(2).clamp(max=0.0), groups.amax(2).clamp(min=0.0)
    size = torch.maximum(-low, high) if symmetric else high - low
    unit = torch.where(size > 0.0, size, 1.0)
    near = (groups / unit[..., None]).float()  # within -1 ... 1: fp32 is enough to compare errors
    best = None
    for steps in SYMMETRIC_STEPS if symmetric else ASYMMETRIC_STEPS:
        scales = _checks.finite_scales("int4", size, steps, dtype, *where)
        wide = scales.double()
        # What is clipped is clipped at both ends alike.
        zeros = None if symmetric else (-low / wide - (steps - CODES) / 2.0).round().clamp(0, CODES)
        step = (wide / unit).float()[..., None]
        middle = MIDDLE if zeros is None else zeros.float()[..., None]
        squares = ((_codes(near, step[..., 0], zeros) - middle) * step - near).square_()
        error = (squares if importance is None else squares.mul_(importance)).sum(2)
        if best is None:
            best = [scales, zeros, error]
            continue
        less = error < best[2]
        best = [None if new is None else torch.where(less, new, old)
                for new, old in zip((scales, zeros, error), best, strict=True)]  # fmt: skip
    scales, zeros, _ = best
    return scales, None if zeros is None else zeros.to(torch.uint8)


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """The nearest codes 0 ... 15 of weights `[N, G, group_size]`, in their dtype."""
    middle = MIDDLE if zeros is None else zeros.to(groups.dtype)[..., None]
    return ((groups / scales[..., None]).round() + middle).clamp(0, CODES)


pack = _groups.pack_nibbles
unpack = _groups.unpack_nibbles


def check(tensor: QuantizedTensor) -> None:
    """Raises ValueError where the parts do not have the shapes and dtypes that this file says."""
    rows, columns = tensor.shape
    _checks.absent("int4", second_scales=tensor.second_scales)
    _checks.group("int4", tensor.group_size, GROUP_SIZES)
    if columns > MAX_COLUMNS:
        raise ValueError(f"int4: shape is {tensor.shape}, expected [N, K] with K up to {MAX_COLUMNS}")
    groups = (rows, _groups.count(columns, tensor.group_size))
    _checks.part("int4", "data", tensor.data, (torch.uint8,), (rows, (columns + 1) // 2))
    _checks.part("int4", "data's scales", tensor.scales, _checks.SCALE_DTYPES, groups)
    if tensor.zeros is not None:
        _checks.part("int4", "data's zeros", tensor.zeros, (torch.uint8,), groups)


def check_values(tensor: QuantizedTensor, name: str = "data") -> None:
    """Raises ValueError for scales and zero points that `quantize` never writes; for what comes from a file."""
    _checks.finite_positive("int4", tensor.scales, name)
    if tensor.zeros is not None and bool((tensor.zeros > MAX_ZERO).any()):
        raise ValueError(f"int4: {name}'s zeros have a {int(tensor.zeros.max())}, expected 0 to {MAX_ZERO}")


def dequantize(tensor: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """scales * (q - zeros), `[N, K]` in the order that is stored, in `dtype` or the weight's own."""
    dtype, columns = dtype or tensor.dtype, tensor.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack(tensor.data, columns).to(wide)
    if tensor.zeros is None:
        codes -= MIDDLE
    else:
        codes -= _groups.spread(tensor.zeros.to(wide), columns, tensor.group_size)
    return (codes * _groups.spread(tensor.scales.to(wide), columns, tensor.group_size)).to(dtype)
