// cvt between every pair of types that nvcc and Triton use, and cvt.pack.
#include <cmath>
#include <limits>

#include "compiler_impl.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

// ---- integer to integer ----

template <class To, class From>
void cut(Warp& w, const Inst& in) {
  const auto* a = w.row<typename From::R>(in.o[1]);
  each_lane(w, w.row<typename To::R>(in.o[0]), [=](int i) {
    // The sign of the source type extends it; the register behind it may be wider than the type.
    using Lift = std::conditional_t<std::is_signed_v<typename From::V>, std::make_signed_t<typename To::R>, typename To::R>;
    const auto lifted = static_cast<typename To::R>(static_cast<Lift>(From::get(a[i])));
    if constexpr (std::is_signed_v<typename To::V> && sizeof(typename To::V) < sizeof(typename To::R))
      return static_cast<typename To::R>(static_cast<std::make_signed_t<typename To::R>>(static_cast<typename To::V>(lifted)));
    else return static_cast<typename To::R>(static_cast<typename To::V>(lifted));
  });
}

template <class To, class From>
void cut_saturated(Warp& w, const Inst& in) {
  const auto* a = w.row<typename From::R>(in.o[1]);
  each_lane(w, w.row<typename To::R>(in.o[0]), [=](int i) {
    const __int128 v = From::get(a[i]);
    using L = std::numeric_limits<typename To::V>;
    const __int128 c = v < L::min() ? static_cast<__int128>(L::min()) : v > L::max() ? static_cast<__int128>(L::max()) : v;
    using Lift = std::conditional_t<std::is_signed_v<typename To::V>, std::make_signed_t<typename To::R>, typename To::R>;
    return static_cast<typename To::R>(static_cast<Lift>(static_cast<typename To::V>(c)));
  });
}

// ---- float to integer: always saturates; NaN gives 0, or the smallest value of the 64-bit types ----

inline double to_whole(double v, int rounding) {
  switch (static_cast<Rounding>(rounding)) {
    case Rounding::kNearest: return std::nearbyint(v);
    case Rounding::kZero: return std::trunc(v);
    case Rounding::kDown: return std::floor(v);
    default: return std::ceil(v);
  }
}

template <class To, class From>
void to_integer(Warp& w, const Inst& in) {
  const auto* a = w.row<typename From::R>(in.o[1]);
  const int rounding = in.kind;
  using V = typename To::V;
  using L = std::numeric_limits<V>;
  constexpr double kLow = static_cast<double>(L::min());
  const double above = std::ldexp(1.0, L::digits);  // one more than the largest
  each_lane(w, w.row<typename To::R>(in.o[0]), [=](int i) {
    const double v = to_whole(static_cast<double>(From::get(a[i])), rounding);
    V r;
    if (v != v) r = sizeof(V) == 8 || From::type == Type::kF64 ? static_cast<V>(uint64_t{1} << (8 * sizeof(V) - 1)) : V{0};
    else if (v < kLow) r = L::min();
    else if (v >= above) r = L::max();
    else r = static_cast<V>(v);
    using Lift = std::conditional_t<std::is_signed_v<V>, std::make_signed_t<typename To::R>, typename To::R>;
    return static_cast<typename To::R>(static_cast<Lift>(r));
  });
}
// The common ones, in a form that vectorises.
void f32_to_s32_toward_zero(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    const float v = as_float(a[i]);
    const float c = v < -2147483648.0f ? -2147483648.0f : v > 2147483520.0f ? 2147483520.0f : v == v ? v : 0.0f;
    return v >= 2147483648.0f ? 0x7fffffffu : static_cast<uint32_t>(static_cast<int32_t>(c));
  });
}

// ---- integer to float ----

template <class To, class From>
void from_integer(Warp& w, const Inst& in) {
  const auto* a = w.row<typename From::R>(in.o[1]);
  const auto rounding = static_cast<Rounding>(in.kind);
  each_lane(w, w.row<typename To::R>(in.o[0]), [=](int i) {
    const auto v = From::get(a[i]);
    if constexpr (To::type == Type::kF32 || To::type == Type::kF64) {
      using V = typename To::V;
      if (rounding == Rounding::kNearest) return To::put(static_cast<V>(v));
      V f = static_cast<V>(v);  // nearest, then one step if that is on the wrong side
      const __int128 back = std::fabs(f) < static_cast<V>(1.7e19) ? static_cast<__int128>(f) : static_cast<__int128>(v);
      const __int128 exact = v;
      const bool down = rounding == Rounding::kDown || (rounding == Rounding::kZero && exact > 0);
      if (down && back > exact) f = std::nextafter(f, -std::numeric_limits<V>::infinity());
      if (!down && back < exact) f = std::nextafter(f, std::numeric_limits<V>::infinity());
      return To::put(f);
    } else {
      constexpr int kMantissa = To::type == Type::kF16 ? 10 : 7;
      double d = static_cast<double>(v);  // 64-bit integers beyond 2^53: make the first rounding odd
      if constexpr (sizeof(v) == 8) {
        const __int128 exact = v, back = static_cast<__int128>(d);
        if (back != exact) {
          const auto bits = std::bit_cast<uint64_t>(d);
          if (!(bits & 1)) d = std::bit_cast<double>((back < exact) == (d > 0) ? bits + 1 : bits - 1);
        }
      }
      return To::put(static_cast<float>(round_to(d, kMantissa, -126, rounding)));
    }
  });
}

// ---- float to float ----

template <class To, class From>
void float_to_float(Warp& w, const Inst& in) {  // to nearest even or exact
  const auto* a = w.row<typename From::R>(in.o[1]);
  each_lane(w, w.row<typename To::R>(in.o[0]), [=](int i) {
    const auto v = From::get(a[i]);
    if constexpr (From::type == Type::kF64 && (To::type == Type::kF16 || To::type == Type::kBF16)) {
      constexpr int kMantissa = To::type == Type::kF16 ? 10 : 7, kLowest = To::type == Type::kF16 ? -14 : -126;
      return To::put(static_cast<float>(round_to(v, kMantissa, kLowest, Rounding::kNearest)));
    } else {
      return To::put(static_cast<typename To::V>(v));
    }
  });
}

// Any rounding; `round_whole` (imm bit 0): to an integral value instead. Saturation, relu and flushing: imm bits 1 to 3.
double shaped(double v, Type to, Rounding rounding, int64_t flags) {
  if (flags & 1) v = rounding == Rounding::kNearest ? std::nearbyint(v) : rounding == Rounding::kZero ? std::trunc(v)
                     : rounding == Rounding::kDown ? std::floor(v) : std::ceil(v);
  if (flags & 2) v = v > 0 ? (v < 1 ? v : 1.0) : 0.0;
  if (flags & 4) v = v != v ? v : v > 0 ? v : 0.0;
  if (to == Type::kF64 || v != v || std::isinf(v)) return v;
  const int mantissa = to == Type::kF32 ? 23 : to == Type::kF16 || to == Type::kTF32 ? 10 : 7;
  const int lowest = to == Type::kF16 ? -14 : -126, highest = to == Type::kF16 ? 15 : 127;
  double r = round_to(v, mantissa, lowest, rounding);
  const double largest = (2 - std::ldexp(1.0, -mantissa)) * std::ldexp(1.0, highest);
  if (std::fabs(r) > largest) {
    const bool away = rounding == Rounding::kNearest || rounding == Rounding::kAway ||
                      (rounding == Rounding::kUp && v > 0) || (rounding == Rounding::kDown && v < 0);
    r = std::copysign(away && !(flags & 16) ? std::numeric_limits<double>::infinity() : largest, v);
  }
  if ((flags & 8) && std::fabs(r) < std::ldexp(1.0, lowest)) r = std::copysign(0.0, r);
  return r;
}

template <class To, class From>
void float_shaped(Warp& w, const Inst& in) {
  const auto* a = w.row<typename From::R>(in.o[1]);
  const auto rounding = static_cast<Rounding>(in.kind);
  const Type to = in.size ? Type::kTF32 : To::type;
  each_lane(w, w.row<typename To::R>(in.o[0]), [=](int i) {
    double v = static_cast<double>(From::get(a[i]));
    if (From::type == Type::kF32 && (in.imm & 8) && std::fabs(v) < 0x1p-126) v = std::copysign(0.0, v);
    return To::put(static_cast<typename To::V>(shaped(v, to, rounding, in.imm)));
  });
}

// d = {convert(a) high, convert(b) low}. kind: rounding; imm as above.
template <class Half>
void pair_from_f32(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  auto* d = w.row<uint32_t>(in.o[0]);
  if (in.kind == static_cast<uint8_t>(Rounding::kNearest) && in.imm == 0) {
    each_lane(w, d, [=](int i) { return (Half::put(as_float(a[i])) << 16) | Half::put(as_float(b[i])); });
    return;
  }
  const auto rounding = static_cast<Rounding>(in.kind);
  const auto one = [=](float v) { return Half::put(static_cast<float>(shaped(v, Half::type, rounding, in.imm))); };
  each_lane(w, d, [=](int i) { return (one(as_float(a[i])) << 16) | one(as_float(b[i])); });
}

// Eight-bit pairs. kind: 0 e4m3, 1 e5m2; imm bit 2: relu.
uint32_t to_fp8(float v, int kind, bool relu) {
  if (relu && v < 0) v = 0;
  return kind == 0 ? float_to_e4m3(v) : float_to_e5m2(v);
}
void fp8_from_f32(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  each_lane(w, w.row<uint32_t>(in.o[0]), [&](int i) {
    return (to_fp8(as_float(a[i]), in.kind, in.imm & 4) << 8) | to_fp8(as_float(b[i]), in.kind, in.imm & 4);
  });
}
template <class Half>
void fp8_from_pair(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  each_lane(w, w.row<uint32_t>(in.o[0]), [&](int i) {
    return (to_fp8(Half::get(a[i] >> 16), in.kind, in.imm & 4) << 8) | to_fp8(Half::get(a[i] & 0xffff), in.kind, in.imm & 4);
  });
}
template <class Half>
void pair_from_fp8(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  each_lane(w, w.row<uint32_t>(in.o[0]), [&](int i) {
    const auto one = [&](uint32_t v) {
      const float f = in.kind == 0 ? e4m3_to_float(v) : e5m2_to_float(v);
      return Half::put((in.imm & 4) && f < 0 ? 0.0f : f);
    };
    return (one((a[i] >> 8) & 0xff) << 16) | one(a[i] & 0xff);
  });
}

void cvt_pack(Warp& w, const Inst& in) {  // {d.low bytes of c shifted, sat(a), sat(b)}
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  const int bits = in.size;
  const bool to_signed = in.flags & 1, from_signed = in.flags & 2;
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    const int64_t low = to_signed ? -(int64_t{1} << (bits - 1)) : 0;
    const int64_t high = to_signed ? (int64_t{1} << (bits - 1)) - 1 : (int64_t{1} << bits) - 1;
    const auto sat = [&](uint32_t v) {
      const int64_t x = from_signed ? static_cast<int64_t>(static_cast<int32_t>(v)) : static_cast<int64_t>(v);
      return static_cast<uint32_t>(x < low ? low : x > high ? high : x) & ((1u << bits) - 1);
    };
    const uint32_t pair = (sat(a[i]) << bits) | sat(b[i]);
    return bits == 16 ? pair : (in.kind ? c[i] << (2 * bits) : 0) | pair;
  });
}

// ---- resolvers ----

template <class F>
Handler integer_type(Type type, F f) {
  switch (type) {
    case Type::kU8: return f.template operator()<U8>();
    case Type::kS8: return f.template operator()<S8>();
    case Type::kU16: return f.template operator()<U16>();
    case Type::kS16: return f.template operator()<S16>();
    case Type::kU32: return f.template operator()<U32>();
    case Type::kS32: return f.template operator()<S32>();
    case Type::kU64: return f.template operator()<U64>();
    case Type::kS64: return f.template operator()<S64>();
    default: return nullptr;
  }
}
template <class F>
Handler float_type(Type type, F f) {
  switch (type) {
    case Type::kF16: return f.template operator()<F16>();
    case Type::kBF16: return f.template operator()<BF16>();
    case Type::kF32: return f.template operator()<F32>();
    case Type::kF64: return f.template operator()<F64>();
    default: return nullptr;
  }
}

Handler integers(Type to, Type from, bool sat) {
  return integer_type(to, [&]<class To>() {
    return integer_type(from, [&]<class From>() -> Handler { return sat ? &cut_saturated<To, From> : &cut<To, From>; });
  });
}

void cvt(Build& b) {
  if (b.take("pack")) {
    b.take("sat");
    const Type to = b.need_type(), from = b.need_type(), c = b.take_type();
    (void)c;
    b.operands(3, 4);
    b.in.size = static_cast<uint8_t>(bits_of(to));
    b.in.flags = static_cast<uint8_t>((to == Type::kS4 || is_signed(to) ? 1 : 0) | (is_signed(from) ? 2 : 0));
    b.in.kind = b.ops.size() == 4;
    b.dst(0, Type::kU32), b.src(1, Type::kU32), b.src(2, Type::kU32);
    if (b.ops.size() == 4) b.src(3, Type::kU32);
    else b.append(b.constant(0, false));
    b.in.fn = cvt_pack;
    return;
  }
  const bool whole = b.has("rni") || b.has("rzi") || b.has("rmi") || b.has("rpi");
  int rounding = b.take_one({"rn", "rz", "rm", "rp", "rna"}, -1);
  if (whole) rounding = b.take_one({"rni", "rzi", "rmi", "rpi"}, 0);
  const bool relu = b.take("relu"), satfinite = b.take("satfinite"), sat = b.take("sat"), ftz = b.take("ftz");
  const Type to = unsigned_of(b.need_type()), from = unsigned_of(b.need_type());
  b.in.kind = static_cast<uint8_t>(rounding < 0 ? 0 : rounding);
  b.in.imm = (whole ? 1 : 0) | (sat ? 2 : 0) | (relu ? 4 : 0) | (ftz ? 8 : 0) | (satfinite ? 16 : 0);

  const bool fp8_to = to == Type::kE4M3x2 || to == Type::kE5M2x2, fp8_from = from == Type::kE4M3x2 || from == Type::kE5M2x2;
  if (fp8_to || fp8_from) {
    b.in.kind = (fp8_to ? to : from) == Type::kE5M2x2;
    b.operands(from == Type::kF32 ? 3 : 2, from == Type::kF32 ? 3 : 2);
    b.dst(0, fp8_to ? Type::kU16 : Type::kU32);
    b.src(1, fp8_to ? Type::kU32 : Type::kU16);
    if (from == Type::kF32) {
      b.src(2, Type::kU32);
      b.in.fn = fp8_from_f32;
    } else if (fp8_to) {
      b.in.fn = from == Type::kF16x2 ? &fp8_from_pair<F16> : from == Type::kBF16x2 ? &fp8_from_pair<BF16> : nullptr;
    } else {
      b.in.fn = to == Type::kF16x2 ? &pair_from_fp8<F16> : to == Type::kBF16x2 ? &pair_from_fp8<BF16> : nullptr;
    }
    return;
  }
  if ((to == Type::kF16x2 || to == Type::kBF16x2) && from == Type::kF32) {
    b.operands(3, 3);
    b.dst(0, Type::kU32), b.src(1, Type::kF32), b.src(2, Type::kF32);
    b.in.fn = to == Type::kF16x2 ? &pair_from_f32<F16> : &pair_from_f32<BF16>;
    return;
  }

  b.operands(2, 2);
  const bool to_integer_type = !is_float(to), from_integer_type = !is_float(from);
  // A register may be wider than the type (never narrower): its low bits count, and results are extended to it.
  const bool wide_dst = b.ops[0].kind == Operand::Kind::kReg && b.is_wide(b.ops[0]);
  const bool wide_src = b.ops[1].kind == Operand::Kind::kReg && b.is_wide(b.ops[1]);
  const bool narrow_type = bits_of(from) <= 32;
  Type source = from;
  if (wide_src && narrow_type) {
    Inst extra = b.in;
    extra.fn = cut<U32, U64>;
    extra.kind = 0, extra.imm = 0;
    const Offset row = b.temporary(RowClass::k32);
    b.append(row), b.src(1, Type::kU64);
    extra.defs = 1;
    b.compiler().emit(extra);
    b.dst(0, wide_dst && to_integer_type ? Type::kU64 : to);
    b.append(row);
  } else {
    b.dst(0, wide_dst && to_integer_type ? Type::kU64 : to);
    b.src(1, source);
  }
  if (to_integer_type && from_integer_type) {
    Type target = to;
    if (wide_dst && bits_of(to) <= 32) target = is_signed(to) ? Type::kS64 : Type::kU64;
    if (wide_dst && bits_of(to) <= 32 && (sat || bits_of(to) < bits_of(from)))
      b.fail("a narrowing conversion into a 64-bit register is not implemented");
    b.in.fn = integers(target, from, sat);
  } else if (to_integer_type) {
    if (wide_dst && bits_of(to) <= 32) b.fail("a float to a narrow integer in a 64-bit register is not implemented");
    b.in.fn = to == Type::kS32 && from == Type::kF32 && rounding == 1
                  ? &f32_to_s32_toward_zero
                  : integer_type(to, [&]<class To>() {
                      return float_type(from, [&]<class From>() -> Handler { return &to_integer<To, From>; });
                    });
  } else if (from_integer_type) {
    if (sat) b.fail("saturation of an integer to a float is not implemented");
    b.in.fn = float_type(to, [&]<class To>() {
      return integer_type(from, [&]<class From>() -> Handler { return &from_integer<To, From>; });
    });
  } else {
    const Type stored = to == Type::kTF32 ? Type::kF32 : to;
    if (to == Type::kTF32 || (to == from && rounding < 0 && (sat || ftz)) || b.in.imm != 0 || rounding > 0) {
      b.in.size = to == Type::kTF32;
      if (to == Type::kTF32 && rounding == 4) b.in.kind = static_cast<uint8_t>(Rounding::kAway);
      b.in.fn = float_type(stored, [&]<class To>() {
        return float_type(from, [&]<class From>() -> Handler { return &float_shaped<To, From>; });
      });
    } else {
      b.in.fn = float_type(stored, [&]<class To>() {
        return float_type(from, [&]<class From>() -> Handler { return &float_to_float<To, From>; });
      });
    }
  }
}

}  // namespace

void add_convert(OpcodeTable& table) { table["cvt"] = cvt; }

}  // namespace ptxsim::PTXSIM_ISA
