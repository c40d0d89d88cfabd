"""Floating-point results computed with fractions: every rounding, no double rounding, no help from the processor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    digits: int  # of the significand, the hidden one included
    lowest: int  # exponent of the smallest subnormal
    limit: int  # exponent of the smallest power of two that is too large


F64 = Format(53, -1074, 1024)
F32 = Format(24, -149, 128)
F16 = Format(11, -24, 16)
BF16 = Format(8, -133, 128)
E4M3 = Format(4, -9, 10)  # as if it went on beyond 448: whoever uses it saturates
E5M2 = Format(3, -16, 17)


def rounded(value: Fraction, mode: str, to: Format, zero: float = 0.0) -> float:
    """`value` rounded as "rn", "rz", "rm" or "rp" say; `zero` is what an exact zero becomes."""
    if value == 0:
        return zero
    sign = -1.0 if value < 0 else 1.0
    magnitude = value.numerator.bit_length() - value.denominator.bit_length()
    if abs(value) < Fraction(2) ** magnitude:
        magnitude -= 1
    quantum = max(magnitude - to.digits + 1, to.lowest)
    scaled = value / Fraction(2) ** quantum
    whole, rest = math.floor(scaled), scaled - math.floor(scaled)
    up = {
        "rm": False,
        "rp": rest > 0,
        "rz": rest > 0 and value < 0,
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 != 0),
    }[mode]
    whole += up
    if abs(whole) * Fraction(2) ** quantum >= Fraction(2) ** to.limit:
        largest = math.ldexp(2**to.digits - 1, to.limit - to.digits)
        inward = mode == "rz" or (mode == "rm" and sign > 0) or (mode == "rp" and sign < 0)
        return sign * (largest if inward else math.inf)
    return math.copysign(math.ldexp(whole, quantum), sign)


def _sqrt(value: Fraction, mode: str, to: Format) -> float:
    # Scaled so that the integer root has more digits than the format; what is left over only breaks a tie upwards.
    shift = 2 * (to.digits + 4) - 2 * ((value.numerator.bit_length() - value.denominator.bit_length()) // 2)
    shift += shift % 2
    scaled = value * Fraction(2) ** shift
    root = math.isqrt(math.floor(scaled))
    exact = Fraction(root) if root * root == scaled else Fraction(root) + Fraction(1, 3)
    return rounded(exact / Fraction(2) ** (shift // 2), mode, to)


def _sum(mode: str, to: Format, *terms: tuple[Fraction, bool]) -> float:
    """Of terms with their signs, which a zero has too."""
    signs = {negative for _, negative in terms}
    zero = -0.0 if signs == {True} or (len(signs) == 2 and mode == "rm") else 0.0
    return rounded(sum((term for term, _ in terms), Fraction(0)), mode, to, zero)


def _negative(value: float) -> bool:
    return math.copysign(1, value) < 0


def apply(op: str, mode: str, to: Format, *args: float) -> float:
    """One of add, sub, mul, fma, div, sqrt, rcp, cvt on finite or special floats."""
    if op == "rcp":
        return apply("div", mode, to, 1.0, *args)
    if op == "sub":
        return apply("add", mode, to, args[0], -args[1])
    special = any(not math.isfinite(arg) for arg in args) or (op == "div" and args[1] == 0)
    special = special or (op == "sqrt" and args[0] <= 0)
    if special:
        with np.errstate(all="ignore"):
            wide = [np.float64(arg) for arg in args]
            return float(_SPECIAL[op](*wide))
    exact = [Fraction(arg) for arg in args]
    if op == "add":
        return _sum(mode, to, *((value, _negative(arg)) for value, arg in zip(exact, args, strict=True)))
    if op == "fma":
        product = exact[0] * exact[1], _negative(args[0]) != _negative(args[1])
        return _sum(mode, to, product, (exact[2], _negative(args[2])))
    if op == "sqrt":
        return _sqrt(exact[0], mode, to)
    zero = math.copysign(0.0, args[0])
    if op == "cvt":
        return rounded(exact[0], mode, to, zero)
    zero = -0.0 if _negative(args[0]) != _negative(args[1]) else 0.0
    return rounded(exact[0] * exact[1] if op == "mul" else exact[0] / exact[1], mode, to, zero)


def _fma_special(a, b, c):
    # A finite product may not overflow before c, which is infinite or NaN, is added.
    return a * b + c if not (np.isfinite(a) and np.isfinite(b)) else c


_SPECIAL: dict[str, Callable] = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "fma": _fma_special,
    "div": lambda a, b: a / b,
    "sqrt": np.sqrt,
    "cvt": lambda a: a,
}


def vector(op: str, mode: str, to: Format, *args: Sequence[float]) -> np.ndarray:
    """`apply` to each element, as float64."""
    columns = [np.asarray(arg, dtype=np.float64).tolist() for arg in args]
    return np.array([apply(op, mode, to, *values) for values in zip(*columns, strict=True)])


def integer(values: np.ndarray, mode: str, low: int, high: int, nan: int) -> np.ndarray:
    """Floats rounded to integers and clamped; as Python integers."""

    def one(value: float) -> int:
        if math.isnan(value):
            return nan
        if math.isinf(value):
            return high if value > 0 else low
        whole = {"rm": math.floor, "rp": math.ceil, "rz": math.trunc, "rn": round}[mode](value)
        return min(max(whole, low), high)

    return np.array([one(value) for value in values.tolist()], dtype=object)
