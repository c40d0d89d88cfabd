"""Conversions, the narrow floating-point formats for all of their bit patterns, against torch."""

from fractions import Fraction

import elementwise
import numpy as np
import pytest
import torch

RNG = np.random.default_rng(3)
ALL16 = np.arange(65536, dtype=np.uint16)


def bits(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16)


def nan16(b, kind):
    return (b & 0x7FFF) > (0x7C00 if kind == "f16" else 0x7F80)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_to_float_all(kind):
    got = elementwise.one(f"cvt.f32.{kind} {{d}}, {{a}}", [kind], "f32", [ALL16], np.float32)
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    want = torch.from_numpy(ALL16.view(np.int16)).view(dtype).float().numpy()
    assert np.array_equal(got, want, equal_nan=True) and np.array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_float_to_half(kind):
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    exact = torch.from_numpy(ALL16.view(np.int16)).view(dtype).float().numpy()
    with np.errstate(all="ignore"):
        middle = ((exact.astype(np.float64) + np.roll(exact, 1)) / 2).astype(np.float32)  # ties
    random = RNG.integers(0, 2**32, 65536, dtype=np.uint32).view(np.float32)
    x = np.concatenate(
        [exact, middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf)), random]
    )
    got = elementwise.one(f"cvt.rn.{kind}.f32 {{d}}, {{a}}", ["f32"], kind, [x], np.uint16)
    want = bits(torch.from_numpy(x).to(dtype))
    nan = np.isnan(x)
    assert np.array_equal(got[~nan], want[~nan]) and nan16(got[nan], kind).all()
    pair = elementwise.one(
        f"cvt.rn.{kind}x2.f32 {{d}}, {{a}}, {{b}}", ["f32", "f32"], "b32", [x, x[::-1].copy()], np.uint32
    )
    assert np.array_equal(pair >> 16, got) and np.array_equal(
        pair & 0xFFFF, got[::-1]
    )  # the first operand is the high half


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_eight_bit_floats(kind):
    dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
    pairs = ALL16  # two of them
    got = elementwise.one(f"cvt.rn.f16x2.{kind}x2 {{d}}, {{a}}", ["b16"], "b32", [pairs], np.uint32)
    want = torch.from_numpy(pairs.view(np.uint8)).view(dtype).float().half().numpy()
    assert np.array_equal(got.view(np.float16), want, equal_nan=True)
    halves = torch.from_numpy(ALL16.view(np.int16)).view(torch.float16).float().numpy()
    x = np.concatenate(
        [halves, np.nextafter(halves, np.float32(9)), RNG.standard_normal(65536).astype(np.float32) * 100]
    )
    x = np.where(np.isnan(x), np.float32(1), x).astype(np.float32)
    got = elementwise.one(
        f"cvt.rn.satfinite.{kind}x2.f32 {{d}}, {{a}}, {{b}}", ["f32", "f32"], "b16", [x, -x], np.uint16
    )
    most = 448.0 if kind == "e4m3" else 57344.0
    want = torch.from_numpy(np.clip(x, -most, most)).to(dtype).view(torch.uint8).numpy()
    assert np.array_equal(got >> 8, want) and np.array_equal(got & 0xFF, want ^ 0x80)


def test_half_arithmetic():
    a = RNG.integers(0, 65536, 4096, dtype=np.uint16)
    b = RNG.integers(0, 65536, 4096, dtype=np.uint16)
    c = RNG.integers(0, 65536, 4096, dtype=np.uint16)
    for kind, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        x, y, z = (torch.from_numpy(v.view(np.int16)).view(dtype).double() for v in (a, b, c))
        for op, want in (("add", x + y), ("sub", x - y), ("mul", x * y), ("fma.rn", None)):
            if want is None:
                got = elementwise.one(
                    f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}}", [kind] * 3, kind, [a, b, c], np.uint16
                )
                want = x * y + z
            else:
                got = elementwise.one(f"{op}.{kind} {{d}}, {{a}}, {{b}}", [kind] * 2, kind, [a, b], np.uint16)
            rounded = want.to(dtype) if dtype == torch.bfloat16 else torch.from_numpy(want.numpy().astype(np.float16))
            result = torch.from_numpy(got.view(np.int16)).view(dtype)
            both = torch.isnan(rounded) & torch.isnan(result)
            wrong = ~both & (result.float() != rounded.float())
            # torch and numpy round more than once; of two candidates the nearer to the exact value has to be ours.
            for i in torch.nonzero(wrong).flatten().tolist():
                p, q, r = (Fraction(float(v[i])) for v in (x, y, z))
                exact = {"add": p + q, "sub": p - q, "mul": p * q, "fma.rn": p * q + r}[op]
                assert abs(Fraction(float(result[i])) - exact) < abs(Fraction(float(rounded[i])) - exact), (kind, op, i)


def test_packed_halves():
    a, b, c = (RNG.standard_normal(512).astype(np.float16).view(np.uint32) for _ in range(3))
    got = elementwise.one("fma.rn.f16x2 {d}, {a}, {b}, {c}", ["b32"] * 3, "b32", [a, b, c], np.uint32).view(np.float16)
    want = (a.view(np.float16).astype(np.float64) * b.view(np.float16) + c.view(np.float16)).astype(np.float16)
    assert np.array_equal(got, want)
    got = elementwise.one("max.f16x2 {d}, {a}, {b}", ["b32"] * 2, "b32", [a, b], np.uint32).view(np.float16)
    assert np.array_equal(got, np.maximum(a.view(np.float16), b.view(np.float16)))


def test_float_to_integer():
    x = np.concatenate([RNG.standard_normal(224) * 10.0 ** RNG.integers(-1, 12, 224),
                        [0.5, 1.5, 2.5, -0.5, -1.5, np.inf, -np.inf, np.nan, 2147483648.0, -2147483648.0, 4294967296.0, 0, -0.0, 3e9, 255.5, -3.7] * 2]).astype(np.float32)  # fmt: skip
    for mode, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        for kind, dtype in (("s32", np.int32), ("u32", np.uint32), ("s16", np.int16), ("u8", np.uint8)):
            info = np.iinfo(dtype)
            whole = f(x.astype(np.float64))
            want = np.where(np.isnan(whole), 0, np.clip(whole, info.min, info.max)).astype(np.int64).astype(dtype)
            got = elementwise.one(f"cvt.{mode}.{kind}.f32 {{d}}, {{a}}", ["f32"], kind, [x], dtype)
            assert np.array_equal(got, want), (mode, kind)
        got = elementwise.one(f"cvt.{mode}.f32.f32 {{d}}, {{a}}", ["f32"], "f32", [x], np.float32)
        assert np.array_equal(got, f(x), equal_nan=True)


def test_integer_to_float_and_between():
    i = RNG.integers(-(2**63), 2**63, 256, dtype=np.int64)
    assert np.array_equal(
        elementwise.one("cvt.rn.f32.s64 {d}, {a}", ["s64"], "f32", [i], np.float32), i.astype(np.float32)
    )
    assert np.array_equal(
        elementwise.one("cvt.rn.f64.u64 {d}, {a}", ["u64"], "f64", [i.view(np.uint64)], np.float64),
        i.view(np.uint64).astype(np.float64),
    )
    low = i.astype(np.int32)
    assert np.array_equal(
        elementwise.one("cvt.rn.f32.s32 {d}, {a}", ["s32"], "f32", [low], np.float32), low.astype(np.float32)
    )
    assert np.array_equal(
        elementwise.one("cvt.s64.s32 {d}, {a}", ["s32"], "s64", [low], np.int64), low.astype(np.int64)
    )
    assert np.array_equal(
        elementwise.one("cvt.u32.u64 {d}, {a}", ["u64"], "u32", [i.view(np.uint64)], np.uint32), i.astype(np.uint32)
    )
    assert np.array_equal(
        elementwise.one("cvt.s32.s8 {d}, {a}", ["s32"], "s32", [low], np.int32), low.astype(np.int8).astype(np.int32)
    )
    assert np.array_equal(
        elementwise.one("cvt.sat.s8.s32 {d}, {a}", ["s32"], "s32", [low], np.int32), np.clip(low, -128, 127)
    )
    assert np.array_equal(
        elementwise.one("cvt.sat.u8.s32 {d}, {a}", ["s32"], "u32", [low], np.uint32),
        np.clip(low, 0, 255).astype(np.uint32),
    )
    h = (low % 5000).astype(np.int16)
    assert np.array_equal(
        elementwise.one("cvt.rn.f16.s16 {d}, {a}", ["s16"], "f16", [h], np.float16), h.astype(np.float16)
    )
    f = RNG.standard_normal(256).astype(np.float32)
    tf32 = ((f.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)
    assert np.array_equal(
        elementwise.one("cvt.rna.tf32.f32 {d}, {a}", ["b32"], "b32", [f.view(np.uint32)], np.uint32).view(np.float32),
        tf32,
    )
    assert np.array_equal(
        elementwise.one("cvt.f64.f32 {d}, {a}", ["f32"], "f64", [f], np.float64), f.astype(np.float64)
    )
    d = RNG.standard_normal(256)
    assert np.array_equal(
        elementwise.one("cvt.rn.f32.f64 {d}, {a}", ["f64"], "f32", [d], np.float32), d.astype(np.float32)
    )
    down = elementwise.one("cvt.rm.f32.f64 {d}, {a}", ["f64"], "f32", [d], np.float32)
    assert (down.astype(np.float64) <= d).all() and (np.nextafter(down, np.float32(9)).astype(np.float64) > d).all()
