"""quantized_linear in Triton: the launchers, with the signatures of the raw ops, and what tests compile ahead of time.

docs/quantized-linear-triton.md says which kernel runs when.
"""

import torch
import triton
from torch import Tensor

from llmkernels._dtypes import accumulate_dtype
from llmkernels._triton import as_rows
from llmkernels.ops.quantized_linear.triton_bwd import _quantized_linear_bwd_kernel
from llmkernels.ops.quantized_linear.triton_fwd import _quantized_linear_fwd_kernel, _quantized_linear_sum_kernel
from llmkernels.ops.quantized_linear.triton_rows import _quantized_linear_rows_kernel
from llmkernels.quantization import _groups, fp8

__all__ = ["configurations", "quantized_linear_bwd", "quantized_linear_fwd"]

FOUR_BITS = ("int4", "nf4")
GROUP_SIZES = {"int8": (0,), "fp8": (0, fp8.BLOCK), "int4": (0, 32, 64, 128), "nf4": (0, 32, 64, 128)}

# A part of the sums has at least so many columns (rows of the weight in the backward), and there are about so many
# programs: two for each multiprocessor of the GPUs in sight.
PART_COLUMNS = 512
PROGRAMS = 264
SUM_BLOCK = 512
ROWS_BLOCK = 2048


def fwd_tiles(M: int, itemsize: int, format: str, group: int) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of the forward for M rows of x, of so many bytes an element."""
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64 if M <= 64 else 128
    if itemsize == 4:
        return min(block_m, 64), 64, 32, 4, 2
    return block_m, 128, group or 128, 8 if block_m == 128 else 4, 3 if block_m == 128 else 4


def bwd_tiles(M: int, itemsize: int, format: str) -> tuple[int, int, int, int, int]:
    """(BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) of the backward."""
    block_m = 16 if M <= 16 else 32 if M <= 32 else 64 if M <= 64 else 128
    if itemsize == 4:
        return min(block_m, 64), 32, 64, 4, 2
    return block_m, 64, 128, 8 if block_m == 128 else 4, 3


def parts(tiles: int, length: int, whole: int) -> int:
    """What one part of a sum over `length` has, so that there are enough programs; a multiple of `whole`."""
    count = max(1, min(PROGRAMS // tiles, length // PART_COLUMNS))
    return max(triton.cdiv(triton.cdiv(length, count), whole) * whole, whole)


def scaling(format: str, group: int, plain: bool, block_m: int, is_fp8_product: bool = False) -> str:
    """What the scales multiply in the forward; fewest are sums at the end, then those of a group if x has few rows."""
    if format == "nf4":
        return "weights"  # the levels are no numbers of 16 bits before that
    if is_fp8_product:
        return "sums"  # Hopper adds products of fp8 in 14 bits or so: no more than a block of them
    if group == 0:
        return "end"
    return "sums" if not plain or block_m <= 32 else "weights"


def has_fp8_products(x: Tensor) -> bool:
    """Whether the GPU of x multiplies numbers of fp8."""
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


def _rounded(x: Tensor, row_stride: int, activations: str, to: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows of x rounded to int8 or fp8, in a type that holds it, and their scales)."""
    M, K = x.shape
    values = torch.empty(M, K, dtype=to, device=x.device)
    scales = torch.empty(M, dtype=torch.float32, device=x.device)
    block = min(max(triton.next_power_of_2(K), 128), ROWS_BLOCK)
    _quantized_linear_rows_kernel[(M,)](
        x, values, scales, K, row_stride, FP8=activations == "fp8", BLOCK=block, num_warps=block // 128 if block < 1024 else 8
    )
    return values, scales


def _sum(parts: Tensor, x_scales: Tensor | None, scales: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    M, N = y.shape
    _quantized_linear_sum_kernel[(M * triton.cdiv(N, SUM_BLOCK),)](
        parts, x_scales, scales, bias, y, parts.shape[0], M, N, BLOCK=SUM_BLOCK, num_warps=4
    )


def quantized_linear_fwd(x, data, scales, zeros, second_scales, bias, format, group_size, activations):
    M, K = x.shape
    weight = _Weight("quantized_linear_fwd", data, scales, zeros, second_scales, K, format, group_size)
    y = torch.empty(M, weight.N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    bias = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        x, row_stride = as_rows(x, M, K)
        x_scales, narrow = None, x.dtype != torch.float32
        if activations:
            is_fp8_product = activations == "fp8" and narrow and has_fp8_products(x)
            # A product of int8 has 32 columns at least, and a group of 32 half of them on each side of a byte.
            to = torch.int8 if activations == "int8" and (format == "int8" or group_size != 32) else torch.float16
            x, x_scales = _rounded(x, row_stride, activations, torch.uint8 if is_fp8_product else to)
            row_stride = K
        block_m, block_n, block_k, warps, stages = fwd_tiles(M, x.element_size(), format, group_size)
        how = scaling(format, group_size, not activations, block_m, x.dtype == torch.uint8)
        tiles = triton.cdiv(M, block_m) * triton.cdiv(weight.N, block_n)
        split = parts(tiles, K, max(block_k, group_size))
        splits = max(triton.cdiv(K, split), 1)
        to = y
        if splits > 1:
            kind = torch.int32 if x.dtype == torch.int8 and how == "end" else torch.float32
            to = torch.empty(splits, M, weight.N, dtype=kind, device=x.device)
        _quantized_linear_fwd_kernel[(tiles, splits)](
            x_ptr=x, x_scales_ptr=x_scales, bias_ptr=bias, y_ptr=to, M=M, x_row=row_stride, split=split,
            **weight.arguments, SCALING=how, PARTS=splits > 1,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _sum(to, x_scales, scales.contiguous() if how == "end" else None, bias, y)
    return y


def quantized_linear_bwd(dy, data, scales, zeros, second_scales, columns, format, group_size):
    M, N = dy.shape
    weight = _Weight("quantized_linear_bwd", data, scales, zeros, second_scales, columns, format, group_size)
    dx = torch.empty(M, columns, dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    with torch.cuda.device_of(dy):
        dy, row_stride = as_rows(dy, M, N)
        block_m, block_n, block_k, warps, stages = bwd_tiles(M, dy.element_size(), format)
        tiles = triton.cdiv(M, block_m) * triton.cdiv(columns, block_k)
        split = parts(tiles, N, block_n)
        splits = max(triton.cdiv(N, split), 1)
        to = dx if splits == 1 else torch.empty(splits, M, columns, dtype=torch.float32, device=dy.device)
        _quantized_linear_bwd_kernel[(tiles, splits)](
            dy_ptr=dy, dx_ptr=to, M=M, dy_row=row_stride, split=split, **weight.arguments, PARTS=splits > 1,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        if splits > 1:
            _sum(to, None, None, None, dx)
    return dx
