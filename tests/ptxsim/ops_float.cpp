// Floating-point arithmetic of every width. Directed rounding and flushing of subnormals are modes of the host's SSE
// unit that a decorating handler sets around the loop over the lanes.
#include <immintrin.h>

#include <cmath>
#include <limits>

#include "lanes.h"
#include "opcodes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

// ---- decoration ----

constexpr uint8_t kSaturate = 1, kFlush = 2, kRelu = 4;  // Inst::flags
constexpr unsigned kControl = 0x1f80;                    // MXCSR: all exceptions masked, to nearest

void saturate(Warp& w, const Inst& in) {
  const auto type = static_cast<Type>(in.kind);
  if (type == Type::kF64) return;
  auto* d = w.row<uint32_t>(in.o[0]);
  for (int i = 0; i < kLanes; ++i) {
    if (!((w.mask >> i) & 1)) continue;
    const auto clamp = [](float v) { return v > 0.0f ? (v < 1.0f ? v : 1.0f) : 0.0f; };  // NaN becomes 0
    const auto relu = [](float v) { return v != v ? v : v > 0.0f ? v : 0.0f; };
    const auto apply = [&](float v) { return in.flags & kSaturate ? clamp(v) : relu(v); };
    switch (type) {
      case Type::kF32: d[i] = as_bits(apply(as_float(d[i]))); break;
      case Type::kF16: d[i] = float_to_half(apply(half_to_float(d[i] & 0xffff))); break;
      case Type::kBF16: d[i] = float_to_bf16(apply(bf16_to_float(d[i] & 0xffff))); break;
      case Type::kF16x2:
        d[i] = float_to_half(apply(half_to_float(d[i] & 0xffff))) | float_to_half(apply(half_to_float(d[i] >> 16))) << 16;
        break;
      default:
        d[i] = float_to_bf16(apply(bf16_to_float(d[i] & 0xffff))) | float_to_bf16(apply(bf16_to_float(d[i] >> 16))) << 16;
    }
  }
}

void flush(Warp& w, const Inst& in) {  // for operations that pass their operands through
  auto* d = w.row<uint32_t>(in.o[0]);
  const auto type = static_cast<Type>(in.kind);
  const auto half = [](uint32_t h) { return (h & 0x7c00u) ? h : h & 0x8000u; };
  for (int i = 0; i < kLanes; ++i) {
    if (!((w.mask >> i) & 1)) continue;
    if (type == Type::kF32 && !(d[i] & 0x7f800000u)) d[i] &= 0x80000000u;
    if (type == Type::kF16 || type == Type::kF16x2) d[i] = half(d[i] & 0xffff) | half(d[i] >> 16) << 16;
  }
}

void decorated(Warp& w, const Inst& in) {
  _mm_setcsr(static_cast<unsigned>(in.imm2));
  in.inner(w, in);
  _mm_setcsr(kControl);
  if (in.flags & kFlush) flush(w, in);
  if (in.flags & (kSaturate | kRelu)) saturate(w, in);
}

// Takes rounding, .ftz, .sat and .relu from the modifiers and wraps the handler if one of them matters.
struct Modes {
  unsigned control = kControl;
  uint8_t flags = 0;
  explicit Modes(Build& b, Type type) {
    const int rounding = b.take_one({"rn", "rz", "rm", "rp"}, 0);
    constexpr unsigned kBits[] = {0, 3, 1, 2};
    control |= kBits[rounding] << 13;
    if (b.take("ftz")) {
      flags |= kFlush;
      if (type == Type::kF32) control |= 0x8040;  // flush results, read subnormals as zero
    }
    if (b.take("sat")) flags |= kSaturate;
    if (b.take("relu")) flags |= kRelu;
    if (rounding != 0 && type != Type::kF32 && type != Type::kF64) b.fail("this rounding of a half is not implemented");
  }
  void apply(Build& b, Type type) const {
    b.in.kind = static_cast<uint8_t>(type);
    if (control == kControl && flags == 0) return;
    b.in.inner = b.in.fn;
    if (b.in.fn != nullptr) b.in.fn = decorated;
    b.in.imm2 = control;
    b.in.flags = flags;
  }
};

// ---- operations ----

struct Add {
  template <class V>
  static V apply(V a, V b) {
    return a + b;
  }
};
struct Sub {
  template <class V>
  static V apply(V a, V b) {
    return a - b;
  }
};
struct Mul {
  template <class V>
  static V apply(V a, V b) {
    return a * b;
  }
};
struct Div {
  template <class V>
  static V apply(V a, V b) {
    return a / b;
  }
};
template <class V>
V quiet() {
  return sizeof(V) == 4 ? static_cast<V>(as_float(0x7fffffffu)) : std::numeric_limits<V>::quiet_NaN();
}
// A NaN operand loses; -0 is less than +0.
template <class V>
bool negative(V v) {
  return std::signbit(v);
}
struct Min {
  template <class V>
  static V apply(V a, V b) {
    const V r = a < b || (a == b && negative(a)) ? a : b;
    return a != a ? (b != b ? quiet<V>() : b) : b != b ? a : r;
  }
};
struct Max {
  template <class V>
  static V apply(V a, V b) {
    const V r = a > b || (a == b && !negative(a)) ? a : b;
    return a != a ? (b != b ? quiet<V>() : b) : b != b ? a : r;
  }
};
struct MinNan {
  template <class V>
  static V apply(V a, V b) {
    return a != a || b != b ? quiet<V>() : Min::apply(a, b);
  }
};
struct MaxNan {
  template <class V>
  static V apply(V a, V b) {
    return a != a || b != b ? quiet<V>() : Max::apply(a, b);
  }
};
template <class Op>
struct XorSign {
  static float apply(float a, float b) {
    const uint32_t sign = (as_bits(a) ^ as_bits(b)) & 0x80000000u;
    return as_float((as_bits(Op::apply(std::fabs(a), std::fabs(b))) & 0x7fffffffu) | sign);
  }
};
struct Fma {
  static float apply(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double apply(double a, double b, double c) { return __builtin_fma(a, b, c); }
};

template <class T>
void half_fma(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  auto* d = w.row<uint32_t>(in.o[0]);
  if constexpr (T::packed) {
    using H = typename T::Half;
    each_lane(w, d, [=](int i) {
      return H::fma(H::get(a[i] & 0xffffu), H::get(b[i] & 0xffffu), H::get(c[i] & 0xffffu)) |
             H::fma(H::get(a[i] >> 16), H::get(b[i] >> 16), H::get(c[i] >> 16)) << 16;
    });
  } else {
    each_lane(w, d, [=](int i) { return T::fma(T::get(a[i]), T::get(b[i]), T::get(c[i])); });
  }
}

struct Recip {
  template <class V>
  static V apply(V a) {
    return V{1} / a;
  }
};
struct Sqrt {
  static float apply(float a) { return __builtin_sqrtf(a); }
  static double apply(double a) { return __builtin_sqrt(a); }
};
struct RecipSqrt {
  static float apply(float a) { return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a))); }
  static double apply(double a) { return 1.0 / __builtin_sqrt(a); }
};
// 2^x with an error below one unit in the last place: 2^f for f in [-0.5, 0.5] by its series, then the exponent.
struct Exp2 {
  static float apply(float x) {
    const float c = x > 129.0f ? 129.0f : x < -151.0f ? -151.0f : x;
    const float magic = 12582912.0f;  // adding it rounds to an integer
    const float n = (c + magic) - magic;
    const double f = static_cast<double>(c - n);
    double p = 1.5252733804059841e-05;
    p = p * f + 1.5403530393381609e-04;
    p = p * f + 1.3333558146428443e-03;
    p = p * f + 9.6181291076284772e-03;
    p = p * f + 5.5504108664821580e-02;
    p = p * f + 2.4022650695910072e-01;
    p = p * f + 6.9314718055994531e-01;
    p = p * f + 1.0;
    const auto e = static_cast<int32_t>(x != x ? 0.0f : n);
    const double scale = std::bit_cast<double>(static_cast<uint64_t>(static_cast<int64_t>(e) + 1023) << 52);
    const float r = static_cast<float>(p * scale);
    return x != x ? x : r;
  }
};
struct Log2 {
  static float apply(float a) { return std::log2(a); }
};
struct Sin {
  static float apply(float a) { return std::sin(a); }
};
struct Cos {
  static float apply(float a) { return std::cos(a); }
};
struct Tanh {
  static float apply(float a) { return std::tanh(a); }
};

template <class T, bool kNegate>
void sign_bits(Warp& w, const Inst& in) {
  using R = typename T::R;
  constexpr R kSign = T::packed ? static_cast<R>(0x80008000u)
                      : T::type == Type::kF64 ? static_cast<R>(uint64_t{1} << 63)
                      : T::type == Type::kF32 ? static_cast<R>(0x80000000u) : static_cast<R>(0x8000u);
  const R* a = w.row<R>(in.o[1]);
  each_lane(w, w.row<R>(in.o[0]), [=](int i) { return kNegate ? a[i] ^ kSign : a[i] & ~kSign; });
}

template <class T>
void copysign_(Warp& w, const Inst& in) {
  using R = typename T::R;
  constexpr R kSign = R{1} << (8 * sizeof(R) - 1);
  const R* a = w.row<R>(in.o[1]);
  const R* b = w.row<R>(in.o[2]);
  each_lane(w, w.row<R>(in.o[0]), [=](int i) { return (b[i] & ~kSign) | (a[i] & kSign); });
}

template <class T>
void testp_(Warp& w, const Inst& in) {
  const auto* a = w.row<typename T::R>(in.o[1]);
  uint32_t r = 0;
  for (int i = 0; i < kLanes; ++i) {
    const auto v = T::get(a[i]);
    bool yes = false;
    switch (in.kind) {
      case 0: yes = std::isfinite(v); break;
      case 1: yes = std::isinf(v); break;
      case 2: yes = !std::isnan(v); break;
      case 3: yes = std::isnan(v); break;
      case 4: yes = std::isnormal(v); break;
      default: yes = std::fpclassify(v) == FP_SUBNORMAL; break;
    }
    r |= static_cast<uint32_t>(yes) << i;
  }
  uint32_t& d = *w.row<uint32_t>(in.o[0]);
  d = (d & ~w.mask) | (r & w.mask);
}

// min and max of three (sm_100): not needed. f32x2 neither.

template <class Op>
Handler binary_of(Type type) {
  return PTXSIM_PICK((binary<T, Op>), type, F16, BF16, F16x2, BF16x2, F32, F64);
}

void operand_list(Build& b, Type type, size_t count) {
  b.operands(count, count);
  b.dst(0, type);
  for (size_t i = 1; i < count; ++i) b.src(i, type);
}

void fma(Build& b, Type type) {
  const Modes modes(b, type);
  operand_list(b, type, 4);
  if (type == Type::kF32 || type == Type::kF64) b.in.fn = PTXSIM_PICK((ternary<T, Fma>), type, F32, F64);
  else b.in.fn = PTXSIM_PICK((half_fma<T>), type, F16, BF16, F16x2, BF16x2);
  modes.apply(b, type);
}

void min_max(Build& b, Type type) {
  const bool nan = b.take("NaN"), xorsign = b.take("xorsign") && b.take("abs"), low = b.base == "min";
  const Modes modes(b, type);
  operand_list(b, type, 3);
  if (xorsign) {
    if (type != Type::kF32) b.fail("xorsign of this type is not implemented");
    b.in.fn = nan ? (low ? &binary<F32, XorSign<MinNan>> : &binary<F32, XorSign<MaxNan>>)
                  : (low ? &binary<F32, XorSign<Min>> : &binary<F32, XorSign<Max>>);
  } else if (nan) {
    b.in.fn = low ? binary_of<MinNan>(type) : binary_of<MaxNan>(type);
  } else {
    b.in.fn = low ? binary_of<Min>(type) : binary_of<Max>(type);
  }
  modes.apply(b, type);
}

template <class Op>
void single(Build& b, Type type) {  // rcp, sqrt, rsqrt, ex2 ...
  b.take("approx"), b.take("full");
  const Modes modes(b, type);
  operand_list(b, type, 2);
  using Operation = Op;
  if constexpr (requires { Op::apply(1.0); } && !std::is_same_v<decltype(Op::apply(1.0)), float>)
    b.in.fn = PTXSIM_PICK((unary<T, Operation>), type, F32, F64, F16, BF16, F16x2, BF16x2);
  else
    b.in.fn = PTXSIM_PICK((unary<T, Operation>), type, F32, F16, BF16, F16x2, BF16x2);
  modes.apply(b, type);
}

template <class Op>
void single_resolver(Build& b) {
  single<Op>(b, b.need_type());
}

void copysign_resolver(Build& b) {
  const Type type = b.need_type();
  operand_list(b, type, 3);
  b.in.fn = PTXSIM_PICK((copysign_<T>), type, F32, F64);
}

void testp_resolver(Build& b) {
  b.in.kind = static_cast<uint8_t>(b.take_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"}, 0));
  const Type type = b.need_type();
  b.operands(2, 2);
  b.dst_pred(b.ops[0]), b.src(1, type);
  b.in.fn = PTXSIM_PICK((testp_<T>), type, F32, F64);
}

void fma_resolver(Build& b) { fma(b, b.need_type()); }

}  // namespace

// add, sub, mul, mad, div, min, max, abs and neg whose type is a float.
void resolve_float_arithmetic(Build& b, Type type) {
  if (b.base == "mad") return fma(b, type);
  if (b.base == "min" || b.base == "max") return min_max(b, type);
  if (b.base == "abs" || b.base == "neg") {
    const Modes modes(b, type);
    operand_list(b, type, 2);
    if (b.base == "neg") b.in.fn = PTXSIM_PICK((sign_bits<T, true>), type, F16, BF16, F16x2, BF16x2, F32, F64);
    else b.in.fn = PTXSIM_PICK((sign_bits<T, false>), type, F16, BF16, F16x2, BF16x2, F32, F64);
    modes.apply(b, type);
    return;
  }
  if (b.base == "div") b.take("approx"), b.take("full");
  const Modes modes(b, type);
  operand_list(b, type, 3);
  if (b.base == "add") b.in.fn = binary_of<Add>(type);
  if (b.base == "sub") b.in.fn = binary_of<Sub>(type);
  if (b.base == "mul") b.in.fn = binary_of<Mul>(type);
  if (b.base == "div") b.in.fn = PTXSIM_PICK((binary<T, Div>), type, F32, F64);
  modes.apply(b, type);
}

void add_float(OpcodeTable& table) {
  for (const Opcode& opcode :
       {Opcode{"fma", fma_resolver}, {"rcp", single_resolver<Recip>}, {"sqrt", single_resolver<Sqrt>},
        {"rsqrt", single_resolver<RecipSqrt>}, {"ex2", single_resolver<Exp2>}, {"lg2", single_resolver<Log2>},
        {"sin", single_resolver<Sin>}, {"cos", single_resolver<Cos>}, {"tanh", single_resolver<Tanh>},
        {"copysign", copysign_resolver}, {"testp", testp_resolver}})
    table[opcode.base] = opcode.resolver;
}

}  // namespace ptxsim::PTXSIM_ISA
