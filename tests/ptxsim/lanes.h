// Loops over the 32 lanes of a warp. A handler computes all lanes and keeps those of the mask, so operations here must
// be harmless for any bits.
#pragma once

#include "compiler.h"
#include "machine.h"
#include "numbers.h"

namespace ptxsim {

alignas(128) inline constexpr uint32_t kBit[kLanes] = {
    1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,  1u << 8,  1u << 9,  1u << 10,
    1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15, 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21,
    1u << 22, 1u << 23, 1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

}  // namespace ptxsim

namespace ptxsim::PTXSIM_ISA {

// How a type is kept in a row: R, the element of the row; V, what one computes with.
template <class V_, class R_, Type kType_>
struct Plain {
  using V = V_;
  using R = R_;
  static constexpr Type type = kType_;
  static constexpr bool packed = false;
  static V get(R r) {
    if constexpr (sizeof(V) == sizeof(R)) return std::bit_cast<V>(r);
    else return static_cast<V>(r);
  }
  static R put(V v) {
    if constexpr (sizeof(V) == sizeof(R)) return std::bit_cast<R>(v);
    else return static_cast<R>(static_cast<std::make_unsigned_t<V>>(v));
  }
};
using U8 = Plain<uint8_t, uint32_t, Type::kU8>;
using S8 = Plain<int8_t, uint32_t, Type::kS8>;
using U16 = Plain<uint16_t, uint32_t, Type::kU16>;
using S16 = Plain<int16_t, uint32_t, Type::kS16>;
using U32 = Plain<uint32_t, uint32_t, Type::kU32>;
using S32 = Plain<int32_t, uint32_t, Type::kS32>;
using U64 = Plain<uint64_t, uint64_t, Type::kU64>;
using S64 = Plain<int64_t, uint64_t, Type::kS64>;
using F32 = Plain<float, uint32_t, Type::kF32>;
using F64 = Plain<double, uint64_t, Type::kF64>;

struct F16 {
  using V = float;
  using R = uint32_t;
  static constexpr Type type = Type::kF16;
  static constexpr bool packed = false;
  static V get(R r) { return half_to_float(r & 0xffffu); }
  static R put(V v) { return float_to_half(v); }
  static R fma(V a, V b, V c) { return fma_to_half(a, b, c); }
};
struct BF16 {
  using V = float;
  using R = uint32_t;
  static constexpr Type type = Type::kBF16;
  static constexpr bool packed = false;
  static V get(R r) { return bf16_to_float(r & 0xffffu); }
  static R put(V v) { return float_to_bf16(v); }
  static R fma(V a, V b, V c) { return fma_to_bf16(a, b, c); }
};
template <class Half_, Type kType_>
struct Packed {
  using Half = Half_;
  using V = typename Half::V;
  using R = uint32_t;
  static constexpr Type type = kType_;
  static constexpr bool packed = true;
};
using F16x2 = Packed<F16, Type::kF16x2>;
using BF16x2 = Packed<BF16, Type::kBF16x2>;
using U16x2 = Packed<U16, Type::kU16x2>;
using S16x2 = Packed<S16, Type::kS16x2>;

inline Type unsigned_of(Type type) {  // .b32 -> .u32
  switch (type) {
    case Type::kB8: return Type::kU8;
    case Type::kB16: return Type::kU16;
    case Type::kB32: return Type::kU32;
    case Type::kB64: return Type::kU64;
    default: return type;
  }
}

inline void keep_lanes(uint32_t* __restrict d, const uint32_t* __restrict t, uint32_t mask) {
  for (int i = 0; i < kLanes; ++i) d[i] = (mask & kBit[i]) != 0 ? t[i] : d[i];
}
inline void keep_lanes(uint64_t* __restrict d, const uint64_t* __restrict t, uint32_t mask) {
  for (int i = 0; i < kLanes; ++i) d[i] = (mask & kBit[i]) != 0 ? t[i] : d[i];
}

// d[i] = f(i) for the lanes of the mask. Rows are the same or apart, so `ivdep` is true.
template <class R, class F>
inline __attribute__((always_inline)) void each_lane(Warp& w, R* d, F f) {
  if (w.mask == kFull) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) d[i] = f(i);
  } else {
    alignas(64) R t[kLanes];
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) t[i] = f(i);
    keep_lanes(d, t, w.mask);
  }
}

template <class T, class Op>
void unary(Warp& w, const Inst& in) {
  using R = typename T::R;
  R* d = w.row<R>(in.o[0]);
  const R* a = w.row<R>(in.o[1]);
  if constexpr (T::packed) {
    using H = typename T::Half;
    each_lane(w, d, [=](int i) {
      return (static_cast<uint32_t>(H::put(Op::apply(H::get(a[i] & 0xffffu)))) & 0xffffu) |
             (static_cast<uint32_t>(H::put(Op::apply(H::get(a[i] >> 16)))) << 16);
    });
  } else {
    each_lane(w, d, [=](int i) { return T::put(Op::apply(T::get(a[i]))); });
  }
}

template <class T, class Op>
void binary(Warp& w, const Inst& in) {
  using R = typename T::R;
  R* d = w.row<R>(in.o[0]);
  const R* a = w.row<R>(in.o[1]);
  const R* b = w.row<R>(in.o[2]);
  if constexpr (T::packed) {
    using H = typename T::Half;
    each_lane(w, d, [=](int i) {
      return (static_cast<uint32_t>(H::put(Op::apply(H::get(a[i] & 0xffffu), H::get(b[i] & 0xffffu)))) & 0xffffu) |
             (static_cast<uint32_t>(H::put(Op::apply(H::get(a[i] >> 16), H::get(b[i] >> 16)))) << 16);
    });
  } else {
    each_lane(w, d, [=](int i) { return T::put(Op::apply(T::get(a[i]), T::get(b[i]))); });
  }
}

// Op gives bits of the row for the half types (fused multiply-add needs its own rounding), a value otherwise.
template <class T, class Op>
void ternary(Warp& w, const Inst& in) {
  using R = typename T::R;
  R* d = w.row<R>(in.o[0]);
  const R* a = w.row<R>(in.o[1]);
  const R* b = w.row<R>(in.o[2]);
  const R* c = w.row<R>(in.o[3]);
  each_lane(w, d, [=](int i) { return T::put(Op::apply(T::get(a[i]), T::get(b[i]), T::get(c[i]))); });
}

// Chooses run<T> for the type; null if it is not among Ts.
#define PTXSIM_PICK(run, type, ...) pick_type<__VA_ARGS__>(type, []<class T>() -> Handler { return &run; })
template <class... Ts, class F>
Handler pick_type(Type type, F f) {
  Handler handler = nullptr;
  ((type == Ts::type ? (handler = f.template operator()<Ts>(), 0) : 0), ...);
  return handler;
}

struct Opcode {
  std::string_view base;
  Resolver resolver;
};

}  // namespace ptxsim::PTXSIM_ISA
