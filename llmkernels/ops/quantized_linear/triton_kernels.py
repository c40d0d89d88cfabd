"""quantized_linear in Triton: the launchers, with the signatures of the raw ops, and what tests compile ahead of time.

docs/quantized-linear-triton.md says which kernel runs when.
"""

import torch
import triton
from torch import Tensor

from llmkernels._triton import as_rows
from llmkernels.ops.norm.triton_kernels import rms_norm_fwd
from llmkernels.ops.quantized_linear.triton_bwd import _quantized_linear_bwd_kernel
from llmkernels.ops.quantized_linear.triton_fwd import _quantized_linear_fwd_kernel, _quantized_linear_sum_kernel
from llmkernels.ops.quantized_linear.triton_rows import _quantized_linear_rows_kernel
from llmkernels.quantization import _groups, fp8

__all__ = ["configurations", "quantized_linear_bwd", "quantized_linear_fwd", "rms_norm_quantized_linear_fwd"]

FOUR_BITS = ("int4", "nf4")
ACTIVATIONS = {"": ("int8", "int4", "nf4", "fp8"), "int8": ("int8", "int4"), "fp8": ("fp8",)}  # of which formats
GROUP_SIZES = {"int8": (0,), "fp8": (0, fp8.BLOCK), "int4": (0, 32, 64, 128), "nf4": (0, 32, 64, 128)}

# A part of the sums has at least so many columns (rows of the weight in the backward), and there are about so many
# programs: two for each of an H100's 132 multiprocessors.
PART_LENGTH = 512
PROGRAMS = 264
SUM_BLOCK = 512
WIDE = 256  # rows of x to which a weight is decoded at once: as long as wgmma multiplies twice as many as 128
# Of the left operand of a product in fp32. From 64 on Triton 3.7 takes tf32 for it on sm_100, whatever is asked for.
FP32_ROWS = 32
ROWS_BLOCK = 2048


def _block_m(M: int) -> int:
    return 16 if M <= 16 else 32 if M <= 32 else 64 if M <= 64 else 128


def fwd_tiles(M: int, itemsize: int, format: str, group: int, wide: bool = False) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of the forward for M rows of x, of so many bytes an element."""
    if wide:
        return WIDE, 128, min(group or 64, 64), 8, 3
    block_m = _block_m(M)
    warps = 8 if block_m == 128 else 4
    if itemsize == 4:
        return block_m, FP32_ROWS, 32, warps, 3 if block_m == 16 else 1
    is_decoded = format in FOUR_BITS or itemsize != 1
    block_k = group or 128
    if is_decoded and block_m > 16:  # which takes registers
        block_k = min(block_k, 64)
    if block_m < 64:
        # Few rows of x: what counts is bytes of the weight that are on their way, 10 KiB or more for each program.
        stages = 6 if format in FOUR_BITS and block_k <= 64 else 4
    elif is_decoded and (itemsize == 1 or format == "nf4"):
        stages = 2
    else:
        stages = 3 if block_m == 128 else 4
    return block_m, 128, block_k, warps, stages


def bwd_tiles(M: int, itemsize: int, group: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of the backward."""
    block_m = _block_m(M)
    if itemsize == 4:
        return min(block_m, FP32_ROWS), 32, 64, 4, 2
    # On sm_80 each warp decodes for itself, and the scales of several groups take registers too.
    block_n = 32 if block_m < 64 or 0 < group < 128 else 64
    return block_m, block_n, 128, *((8, 3) if block_m == 128 else (4, 4))


def rows_warps(block: int) -> int:
    """Of the kernel that rounds activations: eight columns a thread."""
    return max(block // 256, 1)


def parts(tiles: int, length: int, block: int, whole: int = 1) -> tuple[int, int]:
    """(parts of a sum over `length`, blocks of each part), so that there are enough programs. A part has a multiple of
    `whole` elements."""
    count = max(1, min(PROGRAMS // tiles, length // PART_LENGTH))
    size = max(block, whole)
    split = max(triton.cdiv(triton.cdiv(length, count), size), 1) * size
    return max(triton.cdiv(length, split), 1), split // block


def scaling(format: str, group: int, plain: bool, block_m: int, is_fp8_product: bool = False) -> str:
    """What the scales multiply in the forward; fewest are sums at the end, then those of a group if x has few rows."""
    if format == "nf4":
        return "weights"  # the levels are no numbers of 16 bits before that
    if is_fp8_product:
        return "sums"  # Hopper adds products of fp8 in 14 bits or so: no more than a block of them
    if group == 0:
        return "end"
    return "sums" if not plain or block_m <= 32 else "weights"


def takes_wide_tiles(x: Tensor, N: int) -> bool:
    """Whether tiles have WIDE rows of x: on Hopper alone, where their sums and a decoded weight fit in registers, and
    where there are rows for them and enough of them."""
    M = x.shape[0]
    if not x.is_cuda or x.element_size() != 2 or M <= 128:
        return False
    is_hopper = torch.cuda.get_device_capability(x.device)[0] == 9
    return is_hopper and triton.cdiv(M, WIDE) * triton.cdiv(N, 128) >= PROGRAMS // 2


def has_fp8(x: Tensor) -> bool:
    """Whether the GPU of x has e4m3."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)


class _Weight:
    """A weight's parts as arguments of kernels."""

    def __init__(self, op, data, scales, zeros, second_scales, columns, format, group_size):
        if format not in GROUP_SIZES:
            raise ValueError(f"{op}: format is {format!r}, expected one of {', '.join(GROUP_SIZES)}")
        if group_size not in GROUP_SIZES[format]:
            known = ", ".join(map(str, GROUP_SIZES[format]))
            raise ValueError(f"{op}: group_size is {group_size}, expected one of {known} (0: the whole row)")
        data, scales = data.contiguous(), scales.contiguous()
        self.format, self.group = format, group_size
        self.N, self.K = data.shape[0], columns
        self.scales = scales
        self.arguments = {
            "data_ptr": data if format == "int8" else data.view(torch.uint8), "scales_ptr": scales,
            "zeros_ptr": None if zeros is None else zeros.contiguous(),
            "second_ptr": None if second_scales is None else second_scales.contiguous(),
            "N": self.N, "K": self.K, "data_row": data.shape[1], "groups": _groups.count(columns, group_size),
            "FORMAT": format, "GROUP": group_size,
            "SCALE_ROWS": fp8.BLOCK if format == "fp8" and group_size else 1,
        }  # fmt: skip


def _rounded(x: Tensor, row_stride: int, activations: str, to: torch.dtype,
             norm: tuple[Tensor | None, float, Tensor] | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(rows of x rounded to int8 or fp8, in a type that holds it, and their scales).

    `norm`: (weight or None, eps, rstd `[M]` to be filled), of the norm of x before that.
    """
    M, K = x.shape
    values = torch.empty(M, K, dtype=to, device=x.device)
    scales = torch.empty(M, dtype=torch.float32, device=x.device)
    block = min(max(triton.next_power_of_2(K), 128), ROWS_BLOCK)
    is_fp8, warps = activations == "fp8", rows_warps(block)
    norm_weight, eps, rstd = (None, 0.0, None) if norm is None else norm
    _quantized_linear_rows_kernel[(M,)](
        x, norm_weight, rstd, values, scales, K, row_stride, eps, FP8=is_fp8, BLOCK=block, num_warps=warps
    )
    return values, scales


def _sum(parts: Tensor, x_scales: Tensor | None, scales: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    M, N = y.shape
    _quantized_linear_sum_kernel[(M * triton.cdiv(N, SUM_BLOCK),)](
        parts, x_scales, scales, bias, y, parts.shape[0], M, N, BLOCK=SUM_BLOCK, num_warps=4
    )


def quantized_linear_fwd(x, data, scales, zeros, second_scales, bias, format, group_size, activations):
    packed = (data, scales, zeros, second_scales)
    return _fwd("quantized_linear_fwd", x, packed, bias, format, group_size, activations)


def rms_norm_quantized_linear_fwd(x, norm_weight, eps, data, scales, zeros, second_scales, bias, format, group_size,
                                  activations):  # fmt: skip
    """The norm in the kernel that rounds activations, or where they are not rounded in one of its own."""
    (M, K), packed = x.shape, (data, scales, zeros, second_scales)
    if not activations or not data.shape[0]:
        x, _, rstd = rms_norm_fwd(x, None, norm_weight, (K,), eps, 0.0)
        return _fwd("rms_norm_quantized_linear_fwd", x, packed, bias, format, group_size, activations), rstd
    rstd = torch.empty(M, dtype=torch.float32, device=x.device)
    norm = (None if norm_weight is None else norm_weight.contiguous(), eps, rstd)
    return _fwd("rms_norm_quantized_linear_fwd", x, packed, bias, format, group_size, activations, norm), rstd


def _fwd(op, x, packed, bias, format, group_size, activations, norm=None):
    M, K = x.shape
    weight = _Weight(op, *packed, K, format, group_size)
    if format not in ACTIVATIONS.get(activations, ()):
        raise ValueError(
            f"{op}: activations is {activations!r} with format {format!r}, expected a pair of {ACTIVATIONS}"
        )
    y = torch.empty(M, weight.N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        x, row_stride = as_rows(x, M, K)
        x_scales, native, wide = None, has_fp8(x), not activations and takes_wide_tiles(x, weight.N)
        if activations:
            # Not for fp32, which expects sums in fp32.
            is_fp8_product = activations == "fp8" and native and x.dtype != torch.float32
            # A product of int8 has 32 columns at least, and a group of 32 half of them on each side of a byte.
            to = torch.int8 if activations == "int8" and (format == "int8" or group_size != 32) else torch.float16
            x, x_scales = _rounded(x, row_stride, activations, torch.uint8 if is_fp8_product else to, norm)
            row_stride = K
        block_m, block_n, block_k, warps, stages = fwd_tiles(M, x.element_size(), format, group_size, wide)
        how = scaling(format, group_size, not activations, block_m, x.dtype == torch.uint8)
        tiles = triton.cdiv(M, block_m) * triton.cdiv(weight.N, block_n)
        splits, split = parts(tiles, K, block_k, group_size)
        to = y
        if splits > 1:
            kind = torch.int32 if x.dtype == torch.int8 and how == "end" else torch.float32
            to = torch.empty(splits, M, weight.N, dtype=kind, device=x.device)
        _quantized_linear_fwd_kernel[(tiles, splits)](
            x_ptr=x, x_scales_ptr=x_scales, bias_ptr=bias, y_ptr=to, M=M, x_row=row_stride, split=split,
            **weight.arguments, SCALING=how, PARTS=splits > 1, NATIVE_FP8=native,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _sum(to, x_scales, weight.scales if how == "end" else None, bias, y)
    return y


def quantized_linear_bwd(dy, data, scales, zeros, second_scales, columns, format, group_size):
    M, N = dy.shape
    weight = _Weight("quantized_linear_bwd", data, scales, zeros, second_scales, columns, format, group_size)
    dx = torch.empty(M, columns, dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    with torch.cuda.device_of(dy):
        native = has_fp8(dy)
        dy, row_stride = as_rows(dy, M, N)
        block_m, block_n, block_k, warps, stages = bwd_tiles(M, dy.element_size(), group_size)
        tiles = triton.cdiv(M, block_m) * triton.cdiv(columns, block_k)
        splits, split = parts(tiles, N, block_n)
        to = dx if splits == 1 else torch.empty(splits, M, columns, dtype=torch.float32, device=dy.device)
        _quantized_linear_bwd_kernel[(tiles, splits)](
            dy_ptr=dy, dx_ptr=to, M=M, dy_row=row_stride, split=split,
            **weight.arguments, PARTS=splits > 1, NATIVE_FP8=native,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _sum(to, None, None, None, dx)
    return dx


# --- for testing/triton_aot.py ----------------------------------------------------------------------------------------

_TYPES = {"x_scales_ptr": "fp32", "second_ptr": "fp32", "zeros_ptr": "*u8", "parts_ptr": "fp32"}
_NATIVE = (90, 100)  # of the architectures that are compiled for, those with e4m3
_HOPPER = (90,)


def _weight_constants(format: str, group: int, scales: str, zeros: bool) -> tuple[dict, dict]:
    """(types of pointers, constants) that a weight's arguments have."""
    constants = {"FORMAT": format, "GROUP": group, "SCALE_ROWS": fp8.BLOCK if format == "fp8" and group else 1}
    constants |= {} if zeros else {"zeros_ptr": None}
    constants |= {} if scales == "*i8" else {"second_ptr": None}
    return _TYPES | {"data_ptr": "*i8" if format == "int8" else "*u8", "scales_ptr": scales}, constants


def _configuration(kernel, types: dict, constants: dict, warps: int, only: tuple[int, ...] = ()):
    found = [types.get(name, "i32") for name in kernel.arg_names if name not in constants]
    return kernel, found, constants, warps, only


def _fwd_configuration(M, x, T, format, group, scales="fp32", zeros=False, activations=False, parts=False, only=()):
    """Of x as the kernel has it, in the type `x`, and bias and y in `T`."""
    itemsize = {"*i8": 1, "*u8": 1, "fp32": 4}.get(x, 2)
    block_m, block_n, block_k, warps, stages = fwd_tiles(M, itemsize, format, group, only == _HOPPER)
    how = scaling(format, group, not activations, block_m, x == "*u8")
    types, constants = _weight_constants(format, group, scales, zeros)
    types |= {"x_ptr": x, "bias_ptr": T, "y_ptr": T}
    if parts:
        types["y_ptr"] = "*i32" if x == "*i8" and how == "end" else "fp32"
    constants |= {"SCALING": how, "PARTS": parts, "NATIVE_FP8": bool(only)}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": stages}
    constants |= {} if activations else {"x_scales_ptr": None}
    return _configuration(_quantized_linear_fwd_kernel, types, constants, warps, only)


def _bwd_configuration(M, T, format, group, scales="fp32", zeros=False, parts=False, only=()):
    block_m, block_n, block_k, warps, stages = bwd_tiles(M, 4 if T == "fp32" else 2, group)
    types, constants = _weight_constants(format, group, scales, zeros)
    types |= {"dy_ptr": T, "dx_ptr": "fp32" if parts else T}
    constants |= {"PARTS": parts, "NATIVE_FP8": bool(only)}
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "STAGES": stages}
    return _configuration(_quantized_linear_bwd_kernel, types, constants, warps, only)


def configurations():
    """Every tile with the formats that need most registers, and every format, activation and type at least once."""
    fwd, bwd = _fwd_configuration, _bwd_configuration
    for index, M in enumerate((1, 32, 64, 1024)):
        T = ("bf16", "fp16")[index % 2]
        yield fwd(M, T, T, "int4", 128, "bf16", zeros=True, parts=M == 1)
        yield fwd(M, T, T, "nf4", 64, "*i8")
        yield fwd(M, T, T, "int8", 0)
        yield fwd(M, "fp32", "fp32", "int4", 64, "fp16", zeros=True)
        yield fwd(M, "*i8", T, "int8", 0, activations=True, parts=M == 1)
        yield fwd(M, "*i8", T, "int4", 64, "bf16", zeros=True, activations=True)
        yield fwd(M, "*u8", T, "fp8", (0, 128)[index % 2], activations=True, only=_NATIVE)
        yield bwd(M, T, "int4", 32, "bf16", zeros=True)
        yield bwd(M, T, "int8", 0, parts=M == 1)
        yield bwd(M, "fp32", "nf4", 64, "*i8")
    yield fwd(WIDE, "bf16", "bf16", "nf4", 64, "*i8", only=_HOPPER)
    yield fwd(WIDE, "fp16", "fp16", "int4", 128, "bf16", zeros=True, only=_HOPPER)
    yield fwd(WIDE, "bf16", "bf16", "int4", 32, "bf16", zeros=True, only=_HOPPER)
    yield fwd(WIDE, "bf16", "bf16", "int8", 0, only=_HOPPER)
    yield fwd(WIDE, "bf16", "bf16", "fp8", 128, only=_HOPPER)
    for M in (1, 1024):
        yield fwd(M, "bf16", "bf16", "int4", 32, "fp32")
        yield fwd(M, "bf16", "bf16", "fp8", 128)
        yield fwd(M, "bf16", "bf16", "fp8", 128, only=_NATIVE)
        yield fwd(M, "fp32", "fp32", "fp8", 0)
        yield fwd(M, "fp16", "fp32", "fp8", 0, activations=True)
        yield fwd(M, "fp16", "bf16", "int4", 32, "bf16", activations=True)
        yield fwd(M, "*i8", "bf16", "int4", 0, "fp32", activations=True, parts=M == 1)
        yield bwd(M, "bf16", "fp8", 128)
        yield bwd(M, "bf16", "fp8", 0, only=_NATIVE)
        yield bwd(M, "bf16", "nf4", 64, "bf16")
        yield bwd(M, "fp32", "int8", 0)
    for to, FP8, norm in (("*i8", False, False), ("*u8", True, False), ("fp16", True, False), ("*i8", False, True)):
        types = {"x_ptr": "bf16", "to_ptr": to, "scales_ptr": "fp32", "norm_ptr": "bf16", "rstd_ptr": "fp32"}
        types["eps"] = "scalar"
        constants = {"FP8": FP8, "BLOCK": ROWS_BLOCK} | ({} if norm else {"norm_ptr": None, "rstd_ptr": None})
        yield _configuration(_quantized_linear_rows_kernel, types, constants, rows_warps(ROWS_BLOCK))
    types = _TYPES | {"scales_ptr": "fp32", "bias_ptr": "bf16", "y_ptr": "bf16"}
    yield _configuration(_quantized_linear_sum_kernel, types | {"parts_ptr": "*i32"}, {"BLOCK": SUM_BLOCK}, 4)
    constants = dict.fromkeys(("x_scales_ptr", "scales_ptr", "bias_ptr"))
    yield _configuration(_quantized_linear_sum_kernel, types, {**constants, "BLOCK": SUM_BLOCK}, 4)
