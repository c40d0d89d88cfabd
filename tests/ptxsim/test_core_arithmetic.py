"""Instructions one by one against numpy."""

import elementwise
import numpy as np
import pytest

RNG = np.random.default_rng(7)
INTS = {"u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64, "s64": np.int64}


def integers(kind: str, n: int = 256) -> np.ndarray:
    dtype = INTS[kind]
    info = np.iinfo(dtype)
    values = RNG.integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    values[:4] = [info.min, info.max, 0, 1]
    small = RNG.integers(0, 40, n).astype(dtype)
    return np.where(RNG.random(n) < 0.5, values, small).astype(dtype)


def objects(array):
    return array.astype(object)


def wrap(values, kind: str) -> np.ndarray:
    bits = 8 * INTS[kind]().itemsize
    unsigned = np.array([int(v) & ((1 << bits) - 1) for v in values], dtype=np.uint64)
    return unsigned.astype(f"u{bits // 8}").view(INTS[kind])


def truncated(a, b):
    q = abs(a) // abs(b)
    return q if (a < 0) == (b < 0) else -q


def test_integer_binary():
    cases, arrays, types, expected = {}, {}, {}, {}
    for kind, dtype in INTS.items():
        a, b = integers(kind), integers(kind)
        nonzero = np.where(b == 0, 3, b).astype(dtype)
        bits = 8 * dtype().itemsize
        x, y, z = objects(a), objects(b), objects(nonzero)
        table = {
            "add": (b, x + y), "sub": (b, x - y), "mul.lo": (b, x * y), "mul.hi": (b, [(p * q) >> bits for p, q in zip(x, y)]),
            "min": (b, np.minimum(a, b)), "max": (b, np.maximum(a, b)), "div": (nonzero, [truncated(p, q) for p, q in zip(x, z)]),
            "rem": (nonzero, [p - q * truncated(p, q) for p, q in zip(x, z)]),
        }  # fmt: skip
        for op, (second, want) in table.items():
            key = f"{op}.{kind}"
            cases[key] = (f"{key} {{d}}, {{a}}, {{b}}", [kind, kind], kind)
            arrays[key], types[key], expected[key] = [a, second], dtype, wrap(want, kind)
        if bits < 64:
            wide = kind[0] + str(2 * bits)
            key = f"mul.wide.{kind}"
            cases[key] = (f"{key} {{d}}, {{a}}, {{b}}", [kind, kind], wide)
            arrays[key], types[key], expected[key] = [a, b], INTS[wide], wrap(x * y, wide)
            c = integers(wide)
            key = f"mad.wide.{kind}"
            cases[key] = (f"{key} {{d}}, {{a}}, {{b}}, {{c}}", [kind, kind, wide], wide)
            arrays[key], types[key], expected[key] = [a, b, c], INTS[wide], wrap(x * y + objects(c), wide)
        key = f"mad.lo.{kind}"
        cases[key] = (f"{key} {{d}}, {{a}}, {{b}}, {{a}}", [kind, kind], kind)
        arrays[key], types[key], expected[key] = [a, b], dtype, wrap(x * y + x, kind)
    for key, got in elementwise.run(cases, arrays, types).items():
        assert np.array_equal(got, expected[key]), key


def test_logic_and_bits():
    a, b, c = (RNG.integers(0, 2**32, 256, dtype=np.uint32) for _ in range(3))
    a[:3] = [0, 1, 0xFFFFFFFF]
    pos, length = (RNG.integers(0, 40, 256, dtype=np.uint32) for _ in range(2))
    w = RNG.integers(0, 2**63, 256, dtype=np.uint64) * 2 + 1

    def bfe(v, p, n, signed):
        field, msb = (v >> p) & ((1 << n) - 1), 31
        if signed and n:
            top = min(p + n - 1, msb)
            if (v >> top) & 1:
                field |= ~((1 << max(0, top - p + 1)) - 1)
        return field & 0xFFFFFFFF

    def bfi(x, y, p, n):
        mask = (((1 << n) - 1) << p) & 0xFFFFFFFF
        return (y & ~mask) | ((x << p) & mask)

    def prmt(x, y, s):
        source = [((y << 32 | x) >> (8 * i)) & 255 for i in range(8)]
        pick = [(s >> (4 * i)) & 15 for i in range(4)]
        return sum(
            (source[k & 7] if k < 8 else (255 if source[k & 7] & 128 else 0)) << (8 * i) for i, k in enumerate(pick)
        )

    def lop3(x, y, z, table):
        return sum(((table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1))) & 1) << i for i in range(32))

    I = lambda array: [int(v) for v in array]
    table = {
        "and.b32 {d}, {a}, {b}": ([a, b], a & b), "xor.b32 {d}, {a}, {b}": ([a, b], a ^ b), "not.b32 {d}, {a}": ([a], ~a),
        "cnot.b32 {d}, {a}": ([a], (a == 0)), "popc.b32 {d}, {a}": ([a], [v.bit_count() for v in I(a)]),
        "clz.b32 {d}, {a}": ([a], [32 - v.bit_length() for v in I(a)]), "brev.b32 {d}, {a}": ([a], [int(f"{v:032b}"[::-1], 2) for v in I(a)]),
        "bfind.u32 {d}, {a}": ([a], [(v.bit_length() - 1) & 0xFFFFFFFF for v in I(a)]),
        "shl.b32 {d}, {a}, {b}": ([a, pos], [(v << p) & 0xFFFFFFFF for v, p in zip(I(a), I(pos))]),
        "shr.u32 {d}, {a}, {b}": ([a, pos], [v >> p for v, p in zip(I(a), I(pos))]),
        "shr.s32 {d}, {a}, {b}": ([a, pos], [(v >> min(p, 31)) & 0xFFFFFFFF for v, p in zip(I(a.view(np.int32)), I(pos))]),
        "bfe.u32 {d}, {a}, {b}, {c}": ([a, pos, length], [bfe(*v, False) for v in zip(I(a), I(pos), I(length))]),
        "bfe.s32 {d}, {a}, {b}, {c}": ([a, pos, length], [bfe(*v, True) for v in zip(I(a), I(pos), I(length))]),
        "bfi.b32 {d}, {a}, {b}, {c}, {e}": ([a, b, pos, length], [bfi(*v) for v in zip(I(a), I(b), I(pos), I(length))]),
        "prmt.b32 {d}, {a}, {b}, {c}": ([a, b, c], [prmt(*v) for v in zip(I(a), I(b), I(c))]),
        "shf.l.wrap.b32 {d}, {a}, {b}, {c}": ([a, b, pos], [((y << 32 | x) << (p & 31) >> 32) & 0xFFFFFFFF for x, y, p in zip(I(a), I(b), I(pos))]),
        "shf.r.clamp.b32 {d}, {a}, {b}, {c}": ([a, b, pos], [((y << 32 | x) >> min(p, 32)) & 0xFFFFFFFF for x, y, p in zip(I(a), I(b), I(pos))]),
        "lop3.b32 {d}, {a}, {b}, {c}, 0xd8": ([a, b, c], [lop3(*v, 0xD8) for v in zip(I(a), I(b), I(c))]),
        "dp4a.s32.u32 {d}, {a}, {b}, {c}": ([a, b, c], (a.view(np.int8).reshape(-1, 4).astype(np.int64) * b.view(np.uint8).reshape(-1, 4)).sum(1) + c.astype(np.int64)),
        "sad.u32 {d}, {a}, {b}, {c}": ([a, b, c], np.abs(a.astype(np.int64) - b) + c),
        "abs.s32 {d}, {a}": ([a], [abs(v) & 0xFFFFFFFF for v in I(a.view(np.int32))]),
        "neg.s32 {d}, {a}": ([a], [-v & 0xFFFFFFFF for v in I(a)]), "popc.b64 {d}, {a}": ([w], [v.bit_count() for v in I(w)]),
        "selp.b32 {d}, {a}, {b}, 1": ([a, b], a), "slct.u32.s32 {d}, {a}, {b}, {c}": ([a, b, c], np.where(c.view(np.int32) >= 0, a, b)),
        "vote": None,
    }  # fmt: skip
    table.pop("vote")
    cases = {k: (k, ["b64" if v.dtype == np.uint64 else "b32" for v in args], "b32") for k, (args, _) in table.items()}
    got = elementwise.run(cases, {k: v[0] for k, v in table.items()}, {k: np.uint32 for k in table})
    for key, (_, want) in table.items():
        want = np.array([int(v) & 0xFFFFFFFF for v in want], dtype=np.uint32)
        assert np.array_equal(got[key], want), key


def test_carry_chains():
    a, b, c = (RNG.integers(0, 2**32, 64, dtype=np.uint32) for _ in range(3))
    text = "{{ .reg .b32 %t; add.cc.u32 %t, {a}, {b}; addc.u32 {d}, {c}, 5; }}"
    want = (c.astype(np.uint64) + 5 + ((a.astype(np.uint64) + b) >> 32)).astype(np.uint32)
    assert np.array_equal(elementwise.one(text, ["b32"] * 3, "b32", [a, b, c], np.uint32), want)
    text = "{{ .reg .b32 %t; sub.cc.u32 %t, {a}, {b}; subc.u32 {d}, {c}, 5; }}"
    want = (c.astype(np.int64) - 5 - (a < b)).astype(np.uint32)
    assert np.array_equal(elementwise.one(text, ["b32"] * 3, "b32", [a, b, c], np.uint32), want)


def test_wide_product_by_carries():
    a, b = (RNG.integers(0, 2**64, 64, dtype=np.uint64) for _ in range(2))
    text = """{{ .reg .b32 %l, %h, %x, %y, %r<4>; mov.b64 {{%l, %h}}, {a}; mov.b64 {{%x, %y}}, {b};
    mul.hi.u32 %r0, %l, %x; mad.lo.cc.u32 %r0, %l, %y, %r0; madc.hi.u32 %r1, %l, %y, 0;
    mad.lo.cc.u32 %r0, %h, %x, %r0; madc.hi.cc.u32 %r1, %h, %x, %r1; addc.u32 %r2, 0, 0;
    mad.lo.cc.u32 %r1, %h, %y, %r1; madc.hi.u32 %r2, %h, %y, %r2; mov.b64 {d}, {{%r1, %r2}}; }}"""
    want = np.array([int(x) * int(y) >> 64 for x, y in zip(a, b)], dtype=np.uint64)
    assert np.array_equal(elementwise.one(text, ["b64"] * 2, "b64", [a, b], np.uint64), want)


SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-42, 65504.0, 3e38, 0.5, 1.5, 2.5, -2.5, 1e-8]


def floats(dtype, n=256):
    values = (RNG.standard_normal(n) * 10.0 ** RNG.integers(-6, 7, n)).astype(dtype)
    values[: len(SPECIAL)] = np.array(SPECIAL).astype(dtype)
    return values


def same(got, want):
    return np.array_equal(got, want, equal_nan=True) and np.array_equal(
        np.signbit(got[~np.isnan(want)]), np.signbit(want[~np.isnan(want)])
    )


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_float_arithmetic(kind):
    dtype = {"f32": np.float32, "f64": np.float64}[kind]
    a, b, c = floats(dtype), RNG.permutation(floats(dtype)), RNG.permutation(floats(dtype))
    with np.errstate(all="ignore"):
        table = {
            f"add.{kind} {{d}}, {{a}}, {{b}}": a + b, f"sub.{kind} {{d}}, {{a}}, {{b}}": a - b, f"mul.{kind} {{d}}, {{a}}, {{b}}": a * b,
            f"div.rn.{kind} {{d}}, {{a}}, {{b}}": a / b, f"sqrt.rn.{kind} {{d}}, {{a}}": np.sqrt(a), f"rcp.rn.{kind} {{d}}, {{a}}": 1 / a,
            f"abs.{kind} {{d}}, {{a}}": np.abs(a), f"neg.{kind} {{d}}, {{a}}": -a, f"copysign.{kind} {{d}}, {{a}}, {{b}}": np.copysign(b, a),
            f"min.{kind} {{d}}, {{a}}, {{b}}": np.fmin(a, b), f"max.{kind} {{d}}, {{a}}, {{b}}": np.fmax(a, b),
        }  # fmt: skip
        if kind == "f32":
            exact = a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
            table["min.NaN.f32 {d}, {a}, {b}"] = np.minimum(a, b)
            table["max.NaN.f32 {d}, {a}, {b}"] = np.maximum(a, b)
            table["add.sat.f32 {d}, {a}, {b}"] = np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1)).astype(np.float32)
            tiny = lambda v: np.where(np.abs(v) < 2.0**-126, np.copysign(np.float32(0), v), v)
            table["mul.ftz.f32 {d}, {a}, {b}"] = tiny(tiny(a) * tiny(b))
    cases = {k: (k, [kind] * (("{b}" in k) + 1), kind) for k in table}
    got = elementwise.run(cases, {k: [a, b][: ("{b}" in k) + 1] for k in table}, {k: dtype for k in table})
    for key, want in table.items():
        if key.startswith(("min", "max")):  # -0 and +0 compare equal in numpy
            assert np.array_equal(got[key], want, equal_nan=True), key
        else:
            assert same(got[key], want.astype(dtype)), key
    if kind == "f32":
        got = elementwise.one("fma.rn.f32 {d}, {a}, {b}, {c}", ["f32"] * 3, "f32", [a, b, c], np.float32)
        ok = np.isfinite(exact)
        assert np.allclose(got[ok].astype(np.float64), exact[ok].astype(np.float32), rtol=2e-7)
        x = np.float32(1 + 2**-12)
        got = elementwise.one(
            "fma.rn.f32 {d}, {a}, {a}, {b}",
            ["f32"] * 2,
            "f32",
            [np.full(32, x), np.full(32, -np.float32(x * x))],
            np.float32,
        )
        assert got[0] == np.float32(np.float64(x) * np.float64(x) - np.float64(np.float32(x * x))) != 0  # one rounding


def test_directed_rounding():
    a, b = (RNG.standard_normal(64).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) * b.astype(np.float64)
    near = exact.astype(np.float32)
    down = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
    up = np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near)
    for mode, want in (("rm", down), ("rp", up), ("rz", np.where(exact > 0, down, up)), ("rn", near)):
        assert np.array_equal(
            elementwise.one(f"mul.{mode}.f32 {{d}}, {{a}}, {{b}}", ["f32"] * 2, "f32", [a, b], np.float32), want
        ), mode


def test_approximations():
    x = np.concatenate([RNG.uniform(-20, 20, 224), [0, -0.0, 150, -160, np.inf, -np.inf, np.nan, 127.5] * 4]).astype(
        np.float32
    )
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        table = {
            "ex2.approx.f32": np.exp2(wide), "lg2.approx.f32": np.log2(wide), "rcp.approx.f32": 1 / wide, "rsqrt.approx.f32": 1 / np.sqrt(wide),
            "sqrt.approx.f32": np.sqrt(wide), "sin.approx.f32": np.sin(wide), "cos.approx.f32": np.cos(wide), "tanh.approx.f32": np.tanh(wide),
        }  # fmt: skip
        got = elementwise.run(
            {k: (f"{k} {{d}}, {{a}}", ["f32"], "f32") for k in table},
            {k: [x] for k in table},
            {k: np.float32 for k in table},
        )
        for key, want in table.items():
            assert np.allclose(
                got[key], want.astype(np.float32), rtol=3e-7, atol=3e-7 if key[0] in "sc" else 1e-44, equal_nan=True
            ), key


def test_comparisons():
    a, b = floats(np.float32), RNG.permutation(floats(np.float32))
    a[100:150] = b[100:150]
    unordered = np.isnan(a) | np.isnan(b)
    with np.errstate(all="ignore"):
        table = {"eq": a == b, "ne": (a != b) & ~unordered, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "num": ~unordered, "nan": unordered,
                 "equ": (a == b) | unordered, "neu": a != b, "ltu": (a < b) | unordered, "geu": (a >= b) | unordered}  # fmt: skip
    cases = {k: (f"setp.{k}.f32 {{d}}, {{a}}, {{b}}", ["f32"] * 2, "pred") for k in table}
    got = elementwise.run(cases, {k: [a, b] for k in table}, {k: np.uint32 for k in table})
    for key, want in table.items():
        assert np.array_equal(got[key] != 0, want), key
    for kind in INTS:
        x, y = integers(kind), integers(kind)
        x[50:80] = y[50:80]
        for op, want in (("lt", x < y), ("ge", x >= y), ("eq", x == y)):
            got = elementwise.one(f"setp.{op}.{kind} {{d}}, {{a}}, {{b}}", [kind] * 2, "pred", [x, y], np.uint32)
            assert np.array_equal(got != 0, want), (op, kind)
