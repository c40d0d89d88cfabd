"""What Triton kernels and launchers of two families share. Imported where they are: importing Triton takes 0.3 s."""

import ctypes
import math
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

TL_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}

# Triton's interpreter truncates when it stores bf16, where a GPU rounds to nearest even; its arithmetic on bf16, also
# that of a product, is wrong.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def cast(value, to: tl.constexpr):
    """`value` rounded to nearest even."""
    if INTERPRETED and to == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        value = tl.where(value == value, rounded.to(tl.float32, bitcast=True), value)
    return value.to(to)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, fp32 in full precision."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def wide(number):
    """A number as int64, also the plain number that a loop of the interpreter has."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def load_block(descriptor, batch, head, row, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] of what `described` describes, from `row` on."""
    at = [batch.to(tl.int32), head.to(tl.int32), row, 0]
    return tl.reshape(descriptor.load(at), [ROWS, COLS])


@triton.jit
def kept(seed_ptr, numbers, cols, threshold):
    """Which elements dropout keeps: llmkernels/_random.py. `numbers` (int64) and `cols` broadcast."""
    z = tl.load(seed_ptr).to(tl.uint64, bitcast=True) + (numbers + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    h = cols.to(tl.uint32) + (z & 0xFFFFFFFF).to(tl.uint32)
    h = ((h ^ (h >> 16)) * 0x21F0AAAD) ^ (z >> 32).to(tl.uint32)
    h = (h ^ (h >> 15)) * 0x735A2D97
    return ((h ^ (h >> 15)) >> 8).to(tl.int32) >= threshold


@triton.jit
def number(bits, to: tl.constexpr):
    """The fp64 scalar argument that `bits_of` made an integer, rounded to `to`."""
    return tl.full((), bits, tl.int64).to(tl.float64, bitcast=True).to(to)


def bits_of(value: float) -> int:
    """An fp64 scalar, at least 1, as the argument of a kernel: exactly, where an argument that is a float is fp32."""
    return ctypes.c_int64.from_buffer(ctypes.c_double(value)).value


def split_scalar(value: float) -> tuple[float, float]:
    """`value` as two numbers that fp32 arguments hold and whose sum it is, to 48 bits.

    A tensor would hold it exactly, at the price of a copy to the GPU in every call, which graph capture forbids.
    """
    first = ctypes.c_float(value).value
    return first, value - first if math.isfinite(first) else 0.0


def has_tma(tensor: Tensor) -> bool:
    """Whether the GPU of `tensor` copies tiles by descriptor: from Hopper on. An interpreter does it anywhere."""
    return not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= (9, 0)


def described(tensor: Tensor, *block: int) -> TensorDescriptor | None:
    """A descriptor of the blocks of the last two of four dimensions, or None where the hardware has none for this.

    It fills with zeros what is beyond either dimension. It wants addresses and strides of whole 16 bytes, and rows
    without gaps between their elements.
    """
    unit = 16 // tensor.element_size()
    # The stride of a dimension of one element is never used.
    strides = [unit if size == 1 else step for size, step in zip(tensor.shape[:3], tensor.stride(), strict=False)]
    if min(tensor.shape) == 0 or min(strides) <= 0 or any(step % unit for step in strides):
        return None
    if (tensor.stride(3) != 1 and tensor.shape[3] > 1) or tensor.data_ptr() % 16 or not has_tma(tensor):
        return None
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, *block])


def as_rows(tensor: Tensor | None, rows: int, cols: int) -> tuple[Tensor | None, int]:
    """`tensor` as [rows, cols] with unit inner stride (copied if it must be), and its row stride."""
    if tensor is None:
        return None, 0
    flat = tensor.reshape(rows, cols)
    if cols > 1 and flat.stride(1) != 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)
