"""int4: four bits a weight, one scale for a group of columns of a row, symmetric or with a zero point.

    weight[n, k]  ~  scales[n, g] * (q[n, k] - zeros[n, g])            g = k // group_size,  q = 0 ... 15

Two weights share a byte of `data` `[N, (K + 1) // 2]` uint8, the even column in the low half:

      byte j of row n:   bit   7   6   5   4   3   2   1   0
                             +---------------+---------------+
                             | q[n, 2j + 1]  |   q[n, 2j]    |
                             +---------------+---------------+

    symmetric    zeros is None and stands for 8, scales = max |weight| / 7; q is 1 ... 15
    asymmetric   `zeros` `[N, G]` uint8, 0 ... 16; scales = (max - min) / 15, where 0 is among the weights

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
MAX = 7
CODES = 15
MAX_ZERO = 16
# With int8 activations a group's sum is of products below 2^11 (16 * 127), in 32 bits.
MAX_COLUMNS = 2**20


def quantize(
    weight: Tensor,
    name: str = "weight",
    *,
    group_size: int | None = 64,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    activations: str | None = None,
    **options,
) -> QuantizedTensor:
    """A weight `[N, K]` of any floating dtype as int4, for activations as they are or rounded to "int8".

    Args:
        group_size: 32, 64, 128, or None for one scale a row.
        symmetric: False stores a zero point for each group too, for weights that are not about zero.
        scale_dtype: bfloat16, float16 or float32.
    Raises: ValueError or TypeError: `weight` is not a floating matrix of finite values that `scale_dtype` can scale, or
        an option is none of these. `name` is what the messages call it.
    """
    _checks.no_option("int4", options)
    _checks.group("int4", group_size, GROUP_SIZES)
    if scale_dtype not in _checks.SCALE_DTYPES:
        names = ", ".join(map(str, _checks.SCALE_DTYPES))
        raise ValueError(f"int4: scale_dtype is {scale_dtype}, expected one of {names}")
    groups = _groups.split(_checks.finite_matrix("int4", weight, name), group_size)
    if symmetric:
        scales = _checks.finite_scales("int4", groups.abs().amax(2), MAX, scale_dtype, name)
        zeros = None
        codes = (groups / scales.double()[..., None]).round().clamp(-MAX, MAX) + MIDDLE
    else:
        low, high = groups.amin(2).clamp(max=0.0), groups.amax(2).clamp(min=0.0)
        scales = _checks.finite_scales("int4", high - low, CODES, scale_dtype, name)
        wide = scales.double()
        zeros = (-low / wide).round().clamp(0, CODES)
        codes = ((groups / wide[..., None]).round() + zeros[..., None]).clamp(0, CODES)
        zeros = zeros.to(torch.uint8)
    data = pack(_groups.join(codes, weight.shape[1]))
    shape = tuple(weight.shape)
    return QuantizedTensor("int4", shape, data, scales, weight.dtype, zeros, None, group_size, activations)


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
