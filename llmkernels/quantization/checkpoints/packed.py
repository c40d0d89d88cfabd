"""Layers of AWQ and GPTQ: eight codes of four bits in an int32, [K, N] where ours are [N, K].

GPTQ          qweight [K / 8, N]: word r has rows 8r ... 8r + 7, the first in the lowest bits
              qzeros  [G, N / 8]: word c has columns 8c ... 8c + 7, the first in the lowest bits
              scales  [G, N] fp16;  g_idx [K]: the group of each row, which need not ascend (desc_act)
              weight[k, n] = scales[g, n] * (q[k, n] - z[g, n])
              in version 1 of the format qzeros has z - 1, in version 2 it has z

AWQ (gemm)    qweight [K, N / 8], qzeros [G, N / 8]: word c has columns 8c ... 8c + 7, in the order

                  bits   31-28 27-24 23-20 19-16 15-12 11-8  7-4   3-0
                        +-----+-----+-----+-----+-----+-----+-----+-----+
                        |  7  |  5  |  3  |  1  |  6  |  4  |  2  |  0  |
                        +-----+-----+-----+-----+-----+-----+-----+-----+

              scales [G, N] fp16;  weight[k, n] = scales[g, n] * (q[k, n] - z[g, n]),  g = k // group_size
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmkernels.ops.quantized_linear.module import WHOLE_ROW, QuantizedLinear
from llmkernels.quantization import int4
from llmkernels.quantization.tensor import QuantizedTensor

BITS = 4
NIBBLES = 8  # in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of columns, from the lowest bits up
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def from_awq(
    tensors: Mapping[str, Tensor], prefix: str = "", *, group_size: int = 128, bits: int = BITS
) -> QuantizedLinear:
    """The layer whose `qweight`, `qzeros`, `scales` and perhaps `bias` have the names `prefix`.qweight, ...

    Args:
        group_size: 32, 64, 128, or -1 for the whole row.
    Raises: ValueError: a tensor is missing, or has another dtype, shape or values than AWQ's gemm layout has.
    """
    who = f"AWQ: {prefix or 'the layer'}"
    found = _found(who, tensors, prefix, bits)
    codes = _columns(found["qweight"], AWQ_ORDER).t()
    rows, columns = codes.shape
    zeros = _columns(found["qzeros"], AWQ_ORDER).t()
    return _layer(who, found, codes, zeros, None, group_size, (rows, columns))


def from_gptq(
    tensors: Mapping[str, Tensor],
    prefix: str = "",
    *,
    group_size: int = 128,
    bits: int = BITS,
    version: int = 1,
    symmetric: bool = False,
) -> QuantizedLinear:
    """The layer whose `qweight`, `qzeros`, `scales` and perhaps `g_idx` and `bias` have the names `prefix`.qweight, ...

    Args:
        group_size: 32, 64, 128, or -1 for the whole row.
        version: of the format: 1 stores each zero point less one, 2 as it is.
        symmetric: all zero points are 8. Some files store that as it is and are called version 1 all the same; so with
            `symmetric`, a layer whose stored ones are all 8 is read as version 2.
    Raises: ValueError: a tensor is missing, or has another dtype, shape or values than the layout has.
    """
    who = f"GPTQ: {prefix or 'the layer'}"
    if version not in (1, 2):
        raise ValueError(f"{who}: version is {version!r}, expected 1 or 2")
    found = _found(who, tensors, prefix, bits)
    qweight = found["qweight"]
    codes = _nibbles(qweight.t()).flatten(1)  # [N, K]
    zeros = _columns(found["qzeros"], range(NIBBLES)).t()
    if zeros.shape[0] > codes.shape[0]:  # N that is no multiple of 8
        zeros = zeros[: codes.shape[0]]
    if version == 1 and not (symmetric and bool((zeros == int4.MIDDLE).all())):
        zeros = zeros + 1
    if symmetric and not bool((zeros == int4.MIDDLE).all()):
        raise ValueError(f"{who}: has zero points of {int(zeros.min())} to {int(zeros.max())}, expected 8: symmetric")
    order = None
    if found["g_idx"] is not None:
        codes, order = _ordered(who, found["g_idx"], codes, group_size)
    return _layer(who, found, codes, zeros, order, group_size, tuple(codes.shape))


def _found(who: str, tensors: Mapping[str, Tensor], prefix: str, bits: int) -> dict[str, Tensor | None]:
    if bits != BITS:
        raise ValueError(f"{who}: has {bits} bits, expected {BITS}")
    names = {name: f"{prefix}.{name}".lstrip(".") for name in ("qweight", "qzeros", "scales", "g_idx", "bias")}
    found = {name: tensors.get(full) for name, full in names.items()}
    for name, dtypes in {"qweight": (torch.int32,), "qzeros": (torch.int32,), "scales": SCALE_DTYPES}.items():
        tensor = found[name]
        if tensor is None:
            raise ValueError(f"{who}: {names[name]} is missing")
        if tensor.dtype not in dtypes or tensor.dim() != 2:
            got, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", " or ".join(map(str, dtypes))
            raise ValueError(f"{who}: {name} is {got}, expected {wanted} of two dimensions")
    bias = found["bias"]
    if bias is not None and (bias.dtype not in SCALE_DTYPES or bias.dim() != 1):
        raise ValueError(f"{who}: bias is {bias.dtype} {tuple(bias.shape)}, expected a floating vector")
    return found


def _nibbles(words: Tensor) -> Tensor:
    """The codes of each word, the lowest bits first: uint8 `[.., 8]`."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8)


def _columns(words: Tensor, order) -> Tensor:
    """Words `[R, N / 8]` whose codes are of the columns `order`, from the lowest bits up: `[R, N]`."""
    place = torch.tensor(sorted(range(NIBBLES), key=lambda nibble: order[nibble]), device=words.device)
    return _nibbles(words)[..., place].flatten(1)


def _ordered(who: str, g_idx: Tensor, codes: Tensor, group_size: int) -> tuple[Tensor, Tensor | None]:
    """(codes with their columns sorted by group, the order they then have, None: as they were)."""
    columns = codes.shape[1]
    if g_idx.dtype not in (torch.int32, torch.int64) or tuple(g_idx.shape) != (columns,):
        raise ValueError(f"{who}: g_idx is {g_idx.dtype} {tuple(g_idx.shape)}, expected torch.int32 ({columns},)")
    groups = torch.arange(columns, device=g_idx.device) // (columns if group_size == WHOLE_ROW else group_size)
    if torch.equal(g_idx.long(), groups):
        return codes, None
    order = g_idx.long().argsort(stable=True)
    if not torch.equal(g_idx.long()[order], groups):
        raise ValueError(f"{who}: g_idx does not put {group_size} rows in each group")
    return codes[:, order], order


def _layer(who: str, found: dict, codes: Tensor, zeros: Tensor, order: Tensor | None, group_size: int,
           shape: tuple[int, int]) -> QuantizedLinear:  # fmt: skip
    """The layer of codes `[N, K]` and zero points `[N, G]`."""
    scales = found["scales"].t()
    groups = 1 if group_size == WHOLE_ROW else -(-shape[1] // group_size)
    for name, tensor in (("scales", scales), ("qzeros", zeros)):
        if tuple(tensor.shape) != (shape[0], groups):
            got, expected = tuple(tensor.shape[::-1]), (groups, shape[0])
            raise ValueError(f"{who}: {name} has {got}, expected {expected}: groups of {group_size} in {shape[1]} rows")
    if bool((unused := scales == 0.0).any()):
        # All weights of such a group are zero, which we write with a scale of one.
        size = shape[1] if group_size == WHOLE_ROW else group_size
        scales, zeros = scales.masked_fill(unused, 1.0), zeros.masked_fill(unused, int4.MIDDLE)
        codes = codes.masked_fill(unused.repeat_interleave(size, 1)[:, : shape[1]], int4.MIDDLE)
    if bool((zeros == int4.MIDDLE).all()):
        zeros = None
    size = None if group_size == WHOLE_ROW else group_size
    try:
        weight = QuantizedTensor("int4", shape, int4.pack(codes), scales.contiguous(), scales.dtype,
                                 None if zeros is None else zeros.contiguous(), None, size, None, order)  # fmt: skip
        made = QuantizedLinear.from_tensor(weight, found["bias"])
        made.check_values("weight")
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from error
    return made
