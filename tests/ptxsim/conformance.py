"""What the scalar conformance kernels should compute: for each word that a thread puts, the instruction and its result.

A row is (instruction, kind, expected). The kind says how words are compared: "bits" exactly; "f32", "f16x2", "bf16x2"
likewise, but any NaN is as good as another; "fp8x2" but for the signs of zeros, which .relu leaves open; "approx" as
floats, to the relative error given as a fourth member, where the expected value is finite. Rows of 64 bits are two
words, low first, and kinds "bits64" and "f64".
"""

import math
from collections.abc import Iterator

import numpy as np
import torch

from tests.ptxsim import exact
from tests.ptxsim.exact import BF16, E4M3, E5M2, F16, F32, F64

Row = tuple
THREADS, BLOCKS = 256, 3
MODES = ("rn", "rz", "rm", "rp")

SPECIAL = np.array([
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x3F000001, 0x4B000001,
    0xCB800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF,
], dtype=np.uint32)  # fmt: skip


def inputs() -> np.ndarray:
    """Words [3, threads]: all pairs of special ones, then random bits, then floats of moderate size."""
    random = np.random.default_rng(7)
    pairs = np.stack([np.repeat(SPECIAL, 16), np.tile(SPECIAL, 16), np.roll(np.repeat(SPECIAL, 16), 5)])
    bits = random.integers(0, 1 << 32, (3, THREADS), dtype=np.uint32)
    moderate = (random.standard_normal((3, THREADS)) * 4.0 ** random.integers(-3, 4, (3, THREADS))).astype(np.float32)
    return np.concatenate([pairs, bits, moderate.view(np.uint32)], 1)


def _signed(words: np.ndarray, bits: int = 32) -> np.ndarray:
    """Python integers: no result overflows."""
    values = words.astype(object) & (1 << bits) - 1
    return np.where(values >= 1 << bits - 1, values - (1 << bits), values)


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rounded towards zero."""
    return np.array([abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a, b, strict=True)], object)


def _clamp(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return np.minimum(np.maximum(values, low), high)


def _bytes(words: np.ndarray, signed: bool, bits: int = 8) -> list[np.ndarray]:
    parts = [words >> shift & (1 << bits) - 1 for shift in range(0, 32, bits)]
    return [_signed(part, bits) if signed else part.astype(object) for part in parts]


def _dot(a: list, b: list, c: np.ndarray) -> np.ndarray:
    return sum((x * y for x, y in zip(a, b, strict=True)), c)


def integer_arithmetic(x, y, z) -> Iterator[Row]:
    ux, uy, uz, sx, sy, sz = *(v.astype(object) for v in (x, y, z)), *(_signed(v) for v in (x, y, z))
    divisor = y | 1
    positive, sd = sx & 0x7FFFFFFF, _signed(divisor)
    low, high = -(1 << 31), (1 << 31) - 1
    results = {
        "add.s32": sx + sy, "sub.s32": sx - sy, "mul.lo.s32": sx * sy, "mul.hi.s32": sx * sy >> 32,
        "mul.hi.u32": ux * uy >> 32, "mad.lo.s32": sx * sy + sz, "mad.hi.s32": (sx * sy >> 32) + sz,
        "mad.hi.u32": (ux * uy >> 32) + uz, "mul24.lo.s32": _signed(x, 24) * _signed(y, 24),
        "div.u32": ux // divisor, "rem.u32": ux % divisor, "div.s32": _quotient(positive, sd),
        "rem.s32": positive - _quotient(positive, sd) * sd,
        "min.s32": np.minimum(sx, sy), "min.u32": np.minimum(ux, uy),
        "max.s32": np.maximum(sx, sy), "max.u32": np.maximum(ux, uy), "abs.s32": abs(sx), "neg.s32": -sx,
        "sad.s32": abs(sx - sy) + sz, "sad.u32": abs(ux - uy) + uz, "add.sat.s32": _clamp(sx + sy, low, high),
        "sub.sat.s32": _clamp(sx - sy, low, high),
    }  # fmt: skip
    for name, value in results.items():
        yield name, "bits", value
    shifted = uz << 20
    yield "mul.wide.s32", "bits64", sx * sy
    yield "mul.wide.u32", "bits64", ux * uy
    yield "mad.wide.s32", "bits64", sx * sy + shifted
    yield "mad.wide.u32", "bits64", ux * uy + shifted
    signed, unsigned = ([_bytes(v, kind) for v in (x, y)] for kind in (True, False))
    yield "dp4a.s32.s32", "bits", _dot(signed[0], signed[1], sz)
    yield "dp4a.u32.u32", "bits", _dot(unsigned[0], unsigned[1], uz)
    yield "dp4a.u32.s32", "bits", _dot(unsigned[0], signed[1], sz)
    yield "dp2a.lo.s32.s32", "bits", _dot(_bytes(x, True, 16), signed[1][:2], sz)
    yield "dp2a.hi.u32.u32", "bits", _dot(_bytes(x, False, 16), unsigned[1][2:], uz)
    yield "add.cc.u32", "bits", ux + uy
    yield "addc.u32", "bits", uz + (ux + uy >> 32)
    yield "sub.cc.u32", "bits", ux - uy
    yield "subc.u32", "bits", uz - (ux < uy)


def integer_wide(x, y, z) -> Iterator[Row]:
    # wide(0) is (x, y), wide(1) is (y, z): low word first.
    ux, uy = x.astype(object) | y.astype(object) << 32, y.astype(object) | z.astype(object) << 32
    sx, sy, divisor = _signed(ux, 64), _signed(uy, 64), uy | 1
    results = {
        "add.s64": ux + uy, "sub.s64": ux - uy, "mul.lo.s64": ux * uy, "mul.hi.s64": sx * sy >> 64,
        "mul.hi.u64": ux * uy >> 64, "mad.lo.s64": ux * uy + ux, "div.u64": ux // divisor, "rem.u64": ux % divisor,
        "min.s64": np.minimum(sx, sy), "max.u64": np.maximum(ux, uy), "abs.s64": abs(sx), "neg.s64": -sx,
        "not.b64": ~ux, "brev.b64": np.array([int(f"{v:064b}"[::-1], 2) for v in ux], object),
    }  # fmt: skip
    for name, value in results.items():
        yield name, "bits64", value
    yield "popc.b64", "bits", np.array([v.bit_count() for v in ux], object)
    yield "clz.b64", "bits", np.array([64 - v.bit_length() for v in ux], object)
    yield "cvt.s64.s32", "bits64", _signed(z)
    yield "cvt.u64.u32", "bits64", z.astype(object)


def _field(value: int, start: int, length: int, signed: bool) -> int:
    """bfe: bits beyond the word are copies of the sign bit of what there is, or zeros."""
    value = value - (1 << 32) if signed and value >= 1 << 31 else value
    field = value >> start & (1 << length) - 1
    if signed and length > 0 and value >> min(start + length - 1, 31) & 1:
        field -= 1 << length
    return field


def _permuted(a: int, b: int, selector: int, mode: str) -> int:
    data = (a | b << 32).to_bytes(8, "little")
    pick = selector & 3
    chosen = {
        "f4e": [pick + i for i in range(4)],
        "b4e": [(pick - i) % 8 for i in range(4)],
        "rc8": [pick] * 4,
        "ecl": [max(pick, i) for i in range(4)],
        "ecr": [min(pick, i) for i in range(4)],
        "rc16": [pick % 2 * 2, pick % 2 * 2 + 1] * 2,
    }.get(mode)
    if chosen is not None:
        return int.from_bytes(bytes(data[i] for i in chosen), "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    picked = [data[nibble & 7] for nibble in nibbles]
    signs = [(0xFF if byte & 0x80 else 0) if nibble & 8 else byte for byte, nibble in zip(picked, nibbles, strict=True)]
    return int.from_bytes(bytes(signs), "little")


def integer_bits(x, y, z) -> Iterator[Row]:
    ux, uy, uz, sx = x.astype(object), y.astype(object), z.astype(object), _signed(x)
    shift = uz % 40

    def each(function, *args):
        return np.array([function(*values) for values in zip(*args, strict=True)], object)

    yield "and", "bits", ux & uy
    yield "or", "bits", ux | uy
    yield "xor", "bits", ux ^ uy
    yield "not", "bits", ~ux
    yield "cnot", "bits", (ux == 0).astype(object)
    yield "shl", "bits", each(lambda v, s: v << s if s < 32 else 0, ux, shift)
    yield "shr.u32", "bits", each(lambda v, s: v >> s, ux, shift)
    yield "shr.s32", "bits", each(lambda v, s: v >> s, sx, shift)
    yield "popc", "bits", each(lambda v: v.bit_count(), ux)
    yield "clz", "bits", each(lambda v: 32 - v.bit_length(), ux)
    yield "brev", "bits", each(lambda v: int(f"{v:032b}"[::-1], 2), ux)
    yield "bfind.u32", "bits", each(lambda v: v.bit_length() - 1, ux)
    yield "bfind.s32", "bits", each(lambda v: (v if v >= 0 else ~v).bit_length() - 1, sx)
    yield "bfind.shiftamt.u32", "bits", each(lambda v: 32 - v.bit_length() if v else -1, ux)
    yield "bfe.u32", "bits", each(lambda v, s, n: _field(v, s, n, False), ux, uy % 40, uz % 40)
    yield "bfe.s32", "bits", each(lambda v, s, n: _field(v, s, n, True), ux, uy % 40, uz % 40)
    masks = each(lambda s, n: ((1 << n) - 1) << s & 0xFFFFFFFF, uz % 36, uy % 34)
    yield "bfi", "bits", each(lambda a, b, s, m: b & ~m | a << s & m, ux, uy, uz % 36, masks)
    for mode in ("", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
        yield f"prmt.{mode}", "bits", each(lambda a, b, s, mode=mode: _permuted(a, b, s, mode), ux, uy, uz)
    pair = ux | uy << 32
    yield "shf.l.wrap", "bits", each(lambda v, s: v << s % 32 >> 32, pair, uz)
    yield "shf.l.clamp", "bits", each(lambda v, s: v << min(s, 32) >> 32, pair, shift)
    yield "shf.r.wrap", "bits", each(lambda v, s: v >> s % 32, pair, uz)
    yield "shf.r.clamp", "bits", each(lambda v, s: v >> min(s, 32), pair, shift)
    yield "lop3 0xe8", "bits", ux & uy | uy & uz | uz & ux
    yield "lop3 0x96", "bits", ux ^ uy ^ uz
    yield "bmsk.clamp", "bits", each(lambda s, n: ((1 << min(n, 32)) - 1) << min(s, 32), uy % 40, uz % 40)


def _floats(words: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return words.astype(np.uint32).view(np.float32).astype(np.float64)


def float_rounding(x, y, z) -> Iterator[Row]:
    a, b, c = (_floats(v) for v in (x, y, z))
    for mode in MODES:
        for op, args in (("add", (a, b)), ("sub", (a, b)), ("mul", (a, b)), ("fma", (a, b, c)), ("div", (a, b)),
                         ("rcp", (a,)), ("sqrt", (a,))):  # fmt: skip
            yield f"{op}.{mode}.f32", "f32", exact.vector(op, mode, F32, *args)


def _flushed(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormals become zeros of the same sign."""
    return np.where(abs(values) < 2.0**-126, np.copysign(0, values), values)


def _least(a: np.ndarray, b: np.ndarray, sign: int, nan: bool) -> np.ndarray:
    """min (sign = 1) or max (-1): -0 is less than +0; a NaN loses against a number unless `nan`."""
    first = ((a < b) if sign > 0 else (a > b)) | ((a == b) & (np.signbit(a) if sign > 0 else ~np.signbit(a)))
    least = np.where(first, a, b)
    return np.where(np.isnan(a), np.nan if nan else b, np.where(np.isnan(b), np.nan if nan else a, least))


def _saturated(values: np.ndarray) -> np.ndarray:
    """.sat: to 0 .. 1, a NaN to +0."""
    return np.where(values > 0, np.minimum(values, 1), 0.0)


def float_flags(x, y, z) -> Iterator[Row]:
    a, b, c = (_floats(v) for v in (x, y, z))
    fa, fb, fc = (_flushed(v) for v in (a, b, c))
    product = _flushed(exact.vector("mul", "rn", F32, fa, fb))
    yield "add.ftz", "f32", _flushed(exact.vector("add", "rn", F32, fa, fb))
    yield "mul.ftz", "f32", product
    yield "fma.rn.ftz", "f32", _flushed(exact.vector("fma", "rn", F32, fa, fb, fc))
    yield "add.sat", "f32", _saturated(exact.vector("add", "rn", F32, a, b))
    yield "mul.ftz.sat", "f32", _saturated(product)
    yield "fma.rn.sat", "f32", _saturated(exact.vector("fma", "rn", F32, a, b, c))
    yield "abs", "f32", abs(a)
    yield "neg", "f32", -a
    yield "neg.ftz", "f32", -fa
    yield "min", "f32", _least(a, b, 1, False)
    yield "max", "f32", _least(a, b, -1, False)
    yield "min.ftz", "f32", _least(fa, fb, 1, False)
    yield "min.NaN", "f32", _least(a, b, 1, True)
    yield "max.NaN", "f32", _least(a, b, -1, True)
    yield "copysign", "f32", np.copysign(b, a)  # the sign is the first operand's
    yield "cvt.sat.f32.f32", "f32", _saturated(a)
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        yield f"cvt.{mode}.f32.f32", "f32", function(a)


def comparisons(x, y, z) -> Iterator[Row]:
    a, b, sx, sy = _floats(x), _floats(y), _signed(x), _signed(y)
    fa, fb = _flushed(a), _flushed(b)
    unordered = np.isnan(a) | np.isnan(b)
    operators = {
        "eq": lambda p, q: p == q, "ne": lambda p, q: (p != q) & (p == p) & (q == q), "lt": lambda p, q: p < q,
        "le": lambda p, q: p <= q, "gt": lambda p, q: p > q, "ge": lambda p, q: p >= q,
    }  # fmt: skip
    for name, operator in operators.items():
        yield f"setp.{name}.s32", "bits", operator(sx, sy)
        yield f"setp.{name}.f32", "bits", operator(a, b)
        yield f"setp.{name}.ftz.f32", "bits", operator(fa, fb)
    for name, operator in operators.items():
        yield f"setp.{name}u.f32", "bits", operator(a, b) | unordered
    yield "setp.num", "bits", ~unordered
    yield "setp.nan", "bits", unordered
    yield "setp.lo.u32", "bits", x < y
    yield "setp.hs.u32", "bits", x >= y
    yield "set.lt.u32.f32", "bits", np.where(a < b, -1, 0)
    yield "set.ge.f32.s32", "bits", np.where(sx >= sy, 0x3F800000, 0)
    yield "slct.f32.s32", "bits", np.where(_signed(z) >= 0, x, y)


def _doubles(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)).view(np.float64)


def double_arithmetic(x, y, z) -> Iterator[Row]:
    a, b = _doubles(x, y), _doubles(y, z)
    wide = _signed(x.astype(object) | y.astype(object) << 32, 64)
    for mode in MODES:
        for op, args in (("add", (a, b)), ("mul", (a, b)), ("fma", (a, b, a)), ("div", (a, b)), ("sqrt", (a,))):
            yield f"{op}.{mode}.f64", "f64", exact.vector(op, mode, F64, *args)
        yield f"cvt.{mode}.f32.f64", "f32", exact.vector("cvt", mode, F32, a)
    yield "min.f64", "f64", _least(a, b, 1, False)
    yield "max.f64", "f64", _least(a, b, -1, False)
    yield "cvt.f64.f32", "f64", _floats(x)
    yield "cvt.rn.f64.s64", "f64", np.array([float(value) for value in wide])
    yield "cvt.rzi.s64.f64", "bits64", exact.integer(a, "rz", -(1 << 63), (1 << 63) - 1, -(1 << 63))
    yield "cvt.rzi.s32.f64", "bits", exact.integer(a, "rz", -(1 << 31), (1 << 31) - 1, -(1 << 31))


def _half_bits(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16).astype(object)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    """Of values that are bfloat16 already."""
    return values.astype(np.float32).view(np.uint32).astype(object) >> 16


def _relu(values: np.ndarray) -> np.ndarray:
    return np.where(values < 0, 0.0, np.where(values == 0, 0.0, values))


def conversions(x, y, z) -> Iterator[Row]:
    a, sx, ux = _floats(x), _signed(x), x.astype(object)
    wide = _signed(ux | y.astype(object) << 32, 64)

    def from_integers(values, mode):
        return np.array([exact.rounded(exact.Fraction(value), mode, F32) for value in values])

    for mode in MODES:
        yield f"cvt.{mode}.f32.s32", "f32", from_integers(sx, mode)
        yield f"cvt.{mode}.f32.u32", "f32", from_integers(ux, mode)
        yield f"cvt.{mode}i.s32.f32", "bits", exact.integer(a, mode, -(1 << 31), (1 << 31) - 1, 0)
        yield f"cvt.{mode}i.u32.f32", "bits", exact.integer(a, mode, 0, (1 << 32) - 1, 0)
        yield f"cvt.{mode}i.s64.f32", "bits64", exact.integer(a, mode, -(1 << 63), (1 << 63) - 1, -(1 << 63))
        yield f"cvt.{mode}.f32.s64", "f32", from_integers(wide, mode)
    yield "cvt.sat.u8.s32", "bits", _clamp(sx, 0, 255)
    yield "cvt.sat.s8.s32", "bits", _clamp(sx, -128, 127)
    yield "cvt.sat.u16.s32", "bits", _clamp(sx, 0, 65535)
    yield "cvt.sat.s16.s32", "bits", _clamp(sx, -32768, 32767)
    yield "cvt.s32.s8", "bits", _signed(x, 8)
    yield "cvt.u32.u8", "bits", ux & 0xFF
    yield "cvt.s32.s16", "bits", _signed(x, 16)
    yield "cvt.u32.u16", "bits", ux & 0xFFFF
    half, brain = ({mode: exact.vector("cvt", mode, to, a) for mode in ("rn", "rz")} for to in (F16, BF16))
    yield "cvt.rn.f16.f32", "f16x2", _half_bits(half["rn"])
    yield "cvt.rz.f16.f32", "f16x2", _half_bits(half["rz"])
    yield "cvt.rn.bf16.f32", "bf16x2", _bf16_bits(brain["rn"])
    yield "cvt.rz.bf16.f32", "bf16x2", _bf16_bits(brain["rz"])
    yield "cvt.rn.relu.f16.f32", "f16x2", _half_bits(_relu(half["rn"]))
    yield "cvt.rn.relu.bf16.f32", "bf16x2", _bf16_bits(_relu(brain["rn"]))
    low = (x & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64)
    yield "cvt.f32.f16", "f32", low
    yield "cvt.rzi.s32.f16", "bits", exact.integer(low, "rz", -(1 << 31), (1 << 31) - 1, 0)
    b = _floats(y)
    other = {(to, mode): exact.vector("cvt", mode, to, b) for to in (F16, BF16) for mode in ("rn", "rz")}
    yield "cvt.rn.bf16x2.f32", "bf16x2", _bf16_bits(brain["rn"]) << 16 | _bf16_bits(other[BF16, "rn"])
    yield "cvt.rn.f16x2.f32", "f16x2", _half_bits(half["rn"]) << 16 | _half_bits(other[F16, "rn"])
    yield "cvt.rz.bf16x2.f32", "bf16x2", _bf16_bits(brain["rz"]) << 16 | _bf16_bits(other[BF16, "rz"])
    positive = _half_bits(_relu(half["rn"])) << 16 | _half_bits(_relu(other[F16, "rn"]))
    yield "cvt.rn.relu.f16x2.f32", "f16x2", positive
    # Ties away from zero: half a unit of the 19 bits that stay is added to the magnitude.
    tf32 = np.where(np.isfinite(a), ux + 0x1000 & ~0x1FFF, ux)
    yield "cvt.rna.tf32.f32", "f32", _floats(tf32.astype(np.uint64).astype(np.uint32))
    pack = [_clamp(value, -128, 127) & 0xFF for value in (sx, _signed(y))]
    yield "cvt.pack.sat.s8.s32.b32", "bits", (z.astype(object) & 0xFFFF) << 16 | pack[0] << 8 | pack[1]
    pack = [_clamp(value, -32768, 32767) & 0xFFFF for value in (sx, _signed(y))]
    yield "cvt.pack.sat.s16.s32", "bits", pack[0] << 16 | pack[1]


def _halves(words: np.ndarray, brain: bool) -> list[np.ndarray]:
    parts = [words & 0xFFFF, words >> 16]
    if brain:
        return [_floats(part << 16) for part in parts]
    return [part.astype(np.uint16).view(np.float16).astype(np.float64) for part in parts]


def half_arithmetic(x, y, z) -> Iterator[Row]:
    for brain, name in ((False, "f16x2"), (True, "bf16x2")):
        to, bits = (BF16, _bf16_bits) if brain else (F16, _half_bits)
        parts = [_halves(v, brain) for v in (x, y, z)]

        def pair(function, parts=parts, bits=bits):
            low, high = (bits(function(*(part[i] for part in parts))) for i in (0, 1))
            return low | high << 16

        if not brain:
            for op in ("add", "sub", "mul"):
                yield f"{op}.rn.{name}", name, pair(lambda a, b, _, op=op: exact.vector(op, "rn", F16, a, b))
        yield f"fma.rn.{name}", name, pair(lambda a, b, c, to=to: exact.vector("fma", "rn", to, a, b, c))
        yield f"fma.rn.relu.{name}", name, pair(lambda a, b, c, to=to: _relu(exact.vector("fma", "rn", to, a, b, c)))
        if not brain:
            yield "fma.rn.sat.f16x2", name, pair(lambda a, b, c: _saturated(exact.vector("fma", "rn", F16, a, b, c)))
        yield f"min.{name}", name, pair(lambda a, b, _: _least(a, b, 1, False))
        if brain:
            yield f"max.{name}", name, pair(lambda a, b, _: _least(a, b, -1, False))
        yield f"max.NaN.{name}", name, pair(lambda a, b, _: _least(a, b, -1, True))
        yield f"neg.{name}", name, pair(lambda a, _, __: -a)
        yield f"abs.{name}", name, pair(lambda a, _, __: abs(a))


def approximations(x, y, z) -> Iterator[Row]:
    a, b = _floats(x), _floats(y)
    with np.errstate(all="ignore"):
        small, positive = np.where(abs(a) < math.pi, a, np.nan), np.where(a >= 2.0**-126, a, np.nan)
        divisor = np.where((abs(b) > 2.0**-126) & (abs(b) < 2.0**126), b, np.nan)
        normal = np.where((abs(a) > 2.0**-125) & (abs(a) < 2.0**125), a, np.nan)
        yield "ex2.approx", "approx", np.exp2(np.where(a > -126, a, np.nan)), 2.0**-21
        yield "ex2.approx.ftz", "approx", np.exp2(np.where(a > -126, a, np.nan)), 2.0**-21
        yield "lg2.approx", "approx", np.log2(np.where(abs(positive - 1) > 0.5, positive, np.nan)), 2.0**-20
        yield "rcp.approx.ftz", "approx", 1 / normal, 2.0**-22
        yield "sqrt.approx", "approx", np.sqrt(positive), 2.0**-21
        yield "rsqrt.approx", "approx", 1 / np.sqrt(positive), 2.0**-21
        # The manual bounds the absolute error; near zeros of the function a relative one would be too strict.
        yield "sin.approx", "approx", np.where(abs(np.sin(small)) > 0.1, np.sin(small), np.nan), 2.0**-16
        yield "cos.approx", "approx", np.where(abs(np.cos(small)) > 0.1, np.cos(small), np.nan), 2.0**-16
        yield "tanh.approx", "approx", np.tanh(a), 2.0**-10
        yield "div.approx", "approx", normal / divisor, 2.0**-20
        yield "div.full", "approx", normal / divisor, 2.0**-20


def _fp8_bits(values: np.ndarray, to: exact.Format) -> np.ndarray:
    """.satfinite: infinities too become the largest number; a NaN is 0x7f."""
    dtype, largest = (torch.float8_e4m3fn, 448) if to is E4M3 else (torch.float8_e5m2, 57344)
    values = np.clip(exact.vector("cvt", "rn", to, values), -largest, largest)
    bits = torch.from_numpy(values).float().to(dtype).view(torch.uint8).numpy().astype(object)
    return np.where(np.isnan(values), 0x7F, bits)


def _from_fp8(bits: np.ndarray, to: exact.Format) -> np.ndarray:
    dtype = torch.float8_e4m3fn if to is E4M3 else torch.float8_e5m2
    return torch.from_numpy(bits.astype(np.uint8)).view(dtype).double().numpy()


def fp8_conversions(x, y, z) -> Iterator[Row]:
    a, b = _floats(x), _floats(y)
    low, high = _halves(x, False)
    for to, name in ((E4M3, "e4m3x2"), (E5M2, "e5m2x2")):
        yield f"cvt.rn.satfinite.{name}.f32", "fp8x2", _fp8_bits(a, to) << 8 | _fp8_bits(b, to)
        positive = _fp8_bits(_relu(a), to) << 8 | _fp8_bits(_relu(b), to)
        yield f"cvt.rn.satfinite.relu.{name}.f32", "fp8x2", positive
        yield f"cvt.rn.satfinite.{name}.f16x2", "bits", _fp8_bits(high, to) << 8 | _fp8_bits(low, to)
        wide = [_half_bits(_from_fp8(x >> shift & 0xFF, to)) for shift in (0, 8)]
        yield f"cvt.rn.f16x2.{name}", "f16x2", wide[1] << 16 | wide[0]


KERNELS = (
    integer_arithmetic, integer_wide, integer_bits, float_rounding, float_flags, comparisons, double_arithmetic,
    conversions, half_arithmetic, approximations, fp8_conversions,
)  # fmt: skip
