"""Packed weights in Triton: tiles of bytes as numbers, and their scales. The bits are drawn in llmkernels/quantization.

Codes become numbers without a conversion of integers, which runs at a quarter of the speed: they are put into the
mantissa of a power of two, which is then subtracted.
"""

import triton
import triton.language as tl

from llmkernels.quantization import fp8, int4, nf4

_LEVELS = tl.constexpr(nf4.LEVELS)
_SECOND = tl.constexpr(nf4.SECOND)
_MIDDLE = tl.constexpr(int4.MIDDLE)
FP8_MAX = tl.constexpr(fp8.MAX)


@triton.jit
def less(codes, zeros, TYPE: tl.constexpr):
    """codes - zeros in TYPE, exact: codes are bytes up to 15, zeros int32 up to 16."""
    if tl.int8 == TYPE:
        value = codes.to(tl.int8) - zeros.to(tl.int8)
    elif tl.bfloat16 == TYPE:
        value = (codes.to(tl.int16) | 0x4300).to(TYPE, bitcast=True) - (zeros + 128).to(TYPE)
    elif tl.float16 == TYPE:
        value = (codes.to(tl.int16) | 0x6400).to(TYPE, bitcast=True) - (zeros + 1024).to(TYPE)
    else:
        value = (codes.to(tl.int32) | 0x4B000000).to(TYPE, bitcast=True) - (zeros + 8388608).to(TYPE)
    return value


@triton.jit
def from_int8(codes, TYPE: tl.constexpr):
    """int8 in TYPE, exact: 128 more than it, a byte, is put into the mantissa. For bf16, which has no room for that,
    Triton has a way of its own."""
    if tl.float16 == TYPE:
        value = (codes.to(tl.int16) & 0xFF ^ 0x6480).to(TYPE, bitcast=True) - tl.full((), 1152.0, TYPE)
    elif tl.float32 == TYPE:
        value = (codes.to(tl.int32) & 0xFF ^ 0x4B000080).to(TYPE, bitcast=True) - 8388736.0
    else:
        value = codes.to(TYPE)
    return value


@triton.jit
def from_fp8(codes, TYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Bytes of e4m3 in TYPE, exact; by an instruction where NATIVE. Otherwise sign, exponent and fraction are moved to
    where TYPE has them, which is right for subnormal numbers too, and is too small by the difference of the exponents'
    offsets."""
    if NATIVE:
        # To bf16 by way of fp16: there is no instruction, and Triton's own way takes twice as many.
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(TYPE)
    elif tl.float16 == TYPE:
        wide = codes.to(tl.int8, bitcast=True).to(tl.int16)
        value = ((wide << 7) & -0x4080).to(TYPE, bitcast=True) * tl.full((), 2.0**8, TYPE)
    elif tl.bfloat16 == TYPE:
        wide = codes.to(tl.int8, bitcast=True).to(tl.int16)
        value = ((wide << 4) & -0x7810).to(TYPE, bitcast=True) * tl.full((), 2.0**120, TYPE)
    else:
        wide = codes.to(tl.int8, bitcast=True).to(tl.int32)
        value = ((wide << 20) & -0x78100000).to(TYPE, bitcast=True) * tl.full((), 2.0**120, TYPE)
    return value


@triton.jit
def to_fp8(value):
    """fp32 of -448 ... 448 as bytes of e4m3, rounded to nearest, ties to even."""
    bits = value.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are 2^-9: added to 2^14, they are the last bits of the sum.
    small = (tl.abs(value) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    return (tl.where(size < 0x3C800000, small, normal) | (bits >> 24) & 0x80).to(tl.uint8)


@triton.jit
def levels():
    """[256] fp32: the levels of nf4, again and again. It goes to shared memory, where 256 threads store 256 numbers;
    of 16, several would store the same one. They are read from 16 banks, without conflicts."""
    index = tl.arange(0, 256) % 16
    table = tl.zeros([256], tl.float32)
    for i in tl.static_range(16):
        table = tl.where(index == i, _LEVELS[i], table)
    return table


@triton.jit
def decoded(packed, zeros, table, FORMAT: tl.constexpr, TYPE: tl.constexpr, NATIVE_FP8: tl.constexpr):
    """A tile of codes, one a byte, in TYPE without its scales; of nf4 in fp32. zeros `[rows, 1]` int32."""
    if FORMAT == "int4":
        value = less(packed, zeros, TYPE)
    elif FORMAT == "nf4":
        at = tl.reshape(packed.to(tl.int32), [packed.shape[0] * packed.shape[1]])
        value = tl.reshape(tl.gather(table, at, 0), packed.shape)
    elif FORMAT == "int8":
        value = from_int8(packed, TYPE)
    elif tl.float8e4nv == TYPE:
        value = packed.to(TYPE, bitcast=True)
    else:
        value = from_fp8(packed, TYPE, NATIVE_FP8)
    return value


@triton.jit
def load_scales(scales_ptr, second_ptr, at, mask):
    """Scales number `at` in fp32; those of nf4 may be quantized."""
    scales = tl.load(scales_ptr + at, mask=mask, other=0).to(tl.float32)
    if second_ptr is not None:
        steps = tl.load(second_ptr + 1 + at // _SECOND, mask=mask, other=0.0)
        scales = tl.load(second_ptr) + steps * scales
    return scales


@triton.jit
def load_zeros(zeros_ptr, at, mask):
    """Zero points number `at`, int32."""
    if zeros_ptr is not None:
        zeros = tl.load(zeros_ptr + at, mask=mask, other=0).to(tl.int32)
    else:
        zeros = tl.full(at.shape, _MIDDLE, tl.int32)
    return zeros
