// Integer arithmetic, logic, shifts, bit fields, and moves.
#include <limits>
#include <type_traits>

#include "lanes.h"
#include "opcodes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

template <class V>
using U = std::make_unsigned_t<V>;
template <class V>
using Wide = std::conditional_t<sizeof(V) <= 4, std::conditional_t<std::is_signed_v<V>, int64_t, uint64_t>,
                                std::conditional_t<std::is_signed_v<V>, __int128, unsigned __int128>>;

template <class V>
V wrap(U<V> value) {
  return static_cast<V>(value);
}

struct Add {
  template <class V>
  static V apply(V a, V b) {
    return wrap<V>(static_cast<U<V>>(static_cast<U<V>>(a) + static_cast<U<V>>(b)));
  }
};
struct Sub {
  template <class V>
  static V apply(V a, V b) {
    return wrap<V>(static_cast<U<V>>(static_cast<U<V>>(a) - static_cast<U<V>>(b)));
  }
};
struct AddSat {
  static int32_t apply(int32_t a, int32_t b) {
    const int64_t s = int64_t{a} + b;
    return static_cast<int32_t>(s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : s);
  }
};
struct SubSat {
  static int32_t apply(int32_t a, int32_t b) {
    const int64_t s = int64_t{a} - b;
    return static_cast<int32_t>(s > INT32_MAX ? INT32_MAX : s < INT32_MIN ? INT32_MIN : s);
  }
};
struct MulLo {
  template <class V>
  static V apply(V a, V b) {
    using M = std::conditional_t<sizeof(V) < 4, uint32_t, U<V>>;
    return static_cast<V>(static_cast<M>(a) * static_cast<M>(b));
  }
};
struct MulHi {
  template <class V>
  static V apply(V a, V b) {
    return static_cast<V>((static_cast<Wide<V>>(a) * static_cast<Wide<V>>(b)) >> (8 * sizeof(V)));
  }
};
struct Mul24Lo {
  template <class V>
  static V apply(V a, V b) {
    return static_cast<V>(cut(a) * cut(b));
  }
  static int64_t cut(int32_t v) { return static_cast<int32_t>(static_cast<uint32_t>(v) << 8) >> 8; }
  static uint64_t cut(uint32_t v) { return v & 0xffffffu; }
};
struct Mul24Hi {
  template <class V>
  static V apply(V a, V b) {
    return static_cast<V>((Mul24Lo::cut(a) * Mul24Lo::cut(b)) >> 16);
  }
};
// Division by zero gives all ones on the GPU (and the dividend as the remainder).
struct Div {
  template <class V>
  static V apply(V a, V b) {
    if (b == 0) return static_cast<V>(-1);
    if constexpr (std::is_signed_v<V>)
      if (b == -1) return wrap<V>(static_cast<U<V>>(0 - static_cast<U<V>>(a)));
    return static_cast<V>(a / b);
  }
};
struct Rem {
  template <class V>
  static V apply(V a, V b) {
    if (b == 0) return a;
    if constexpr (std::is_signed_v<V>)
      if (b == -1) return 0;
    return static_cast<V>(a % b);
  }
};
struct Min {
  template <class V>
  static V apply(V a, V b) {
    return b < a ? b : a;
  }
};
struct Max {
  template <class V>
  static V apply(V a, V b) {
    return a < b ? b : a;
  }
};
struct Abs {
  template <class V>
  static V apply(V a) {
    return a < 0 ? wrap<V>(static_cast<U<V>>(0 - static_cast<U<V>>(a))) : a;
  }
};
struct Neg {
  template <class V>
  static V apply(V a) {
    return wrap<V>(static_cast<U<V>>(0 - static_cast<U<V>>(a)));
  }
};
struct And {
  template <class V>
  static V apply(V a, V b) {
    return static_cast<V>(a & b);
  }
};
struct Or {
  template <class V>
  static V apply(V a, V b) {
    return static_cast<V>(a | b);
  }
};
struct Xor {
  template <class V>
  static V apply(V a, V b) {
    return static_cast<V>(a ^ b);
  }
};
struct Not {
  template <class V>
  static V apply(V a) {
    return static_cast<V>(~a);
  }
};
struct Cnot {
  template <class V>
  static V apply(V a) {
    return static_cast<V>(a == 0);
  }
};
struct Brev {
  static uint32_t apply(uint32_t a) {
    a = ((a >> 1) & 0x55555555u) | ((a & 0x55555555u) << 1);
    a = ((a >> 2) & 0x33333333u) | ((a & 0x33333333u) << 2);
    a = ((a >> 4) & 0x0f0f0f0fu) | ((a & 0x0f0f0f0fu) << 4);
    return __builtin_bswap32(a);
  }
  static uint64_t apply(uint64_t a) {
    return (uint64_t{apply(static_cast<uint32_t>(a))} << 32) | apply(static_cast<uint32_t>(a >> 32));
  }
};
struct Move {
  template <class V>
  static V apply(V a) {
    return a;
  }
};

// d 32 or 64 bits wide, the second source of another width.
template <class T, class Op>
void shift(Warp& w, const Inst& in) {
  auto* d = w.row<typename T::R>(in.o[0]);
  const auto* a = w.row<typename T::R>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  each_lane(w, d, [=](int i) { return T::put(Op::apply(T::get(a[i]), b[i])); });
}
struct Shl {
  template <class V>
  static V apply(V a, uint32_t n) {
    constexpr uint32_t kBits = 8 * sizeof(V);
    return static_cast<V>(n >= kBits ? V{0} : static_cast<V>(a << (n & (kBits - 1))));
  }
};
struct Shr {
  template <class V>
  static V apply(V a, uint32_t n) {
    constexpr uint32_t kBits = 8 * sizeof(V);
    if constexpr (std::is_signed_v<V>) return static_cast<V>(a >> (n >= kBits ? kBits - 1 : n));
    return static_cast<V>(n >= kBits ? V{0} : static_cast<V>(a >> (n & (kBits - 1))));
  }
};

template <class T>
void mul_wide(Warp& w, const Inst& in) {
  using V = typename T::V;
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  if constexpr (sizeof(V) == 2) {
    each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
      return static_cast<uint32_t>(static_cast<int64_t>(T::get(a[i])) * static_cast<int64_t>(T::get(b[i])));
    });
  } else {
    each_lane(w, w.row<uint64_t>(in.o[0]), [=](int i) {
      return static_cast<uint64_t>(static_cast<Wide<V>>(T::get(a[i])) * static_cast<Wide<V>>(T::get(b[i])));
    });
  }
}

template <class T>
void mad_wide(Warp& w, const Inst& in) {
  using V = typename T::V;
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  if constexpr (sizeof(V) == 2) {
    const auto* c = w.row<uint32_t>(in.o[3]);
    each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
      return static_cast<uint32_t>(static_cast<int64_t>(T::get(a[i])) * static_cast<int64_t>(T::get(b[i]))) + c[i];
    });
  } else {
    const auto* c = w.row<uint64_t>(in.o[3]);
    each_lane(w, w.row<uint64_t>(in.o[0]), [=](int i) {
      return static_cast<uint64_t>(static_cast<Wide<V>>(T::get(a[i])) * static_cast<Wide<V>>(T::get(b[i]))) + c[i];
    });
  }
}

struct MadLo {
  template <class V>
  static V apply(V a, V b, V c) {
    return Add::apply(MulLo::apply(a, b), c);
  }
};
struct MadHi {
  template <class V>
  static V apply(V a, V b, V c) {
    return Add::apply(MulHi::apply(a, b), c);
  }
};
struct Mad24Lo {
  template <class V>
  static V apply(V a, V b, V c) {
    return Add::apply(Mul24Lo::apply(a, b), c);
  }
};
struct Sad {
  template <class V>
  static V apply(V a, V b, V c) {
    return Add::apply(c, a < b ? Sub::apply(b, a) : Sub::apply(a, b));
  }
};

// Carry chains: the flag is a mask in a register of the warp's program.
template <class T, int kForm>  // 0 add, 1 sub
void carry(Warp& w, const Inst& in) {
  using V = typename T::V;
  auto* d = w.row<V>(in.o[0]);
  const auto* a = w.row<V>(in.o[2]);
  const auto* b = w.row<V>(in.o[3]);
  uint32_t& flag = *w.row<uint32_t>(in.o[1]);
  const uint32_t before = in.kind ? *w.row<uint32_t>(in.o[4]) : 0;
  alignas(64) V t[kLanes];
  uint32_t out = 0;
  for (int i = 0; i < kLanes; ++i) {
    const V carry_in = (before >> i) & 1;
    V r;
    bool o1, o2;
    if constexpr (kForm == 0) {
      o1 = __builtin_add_overflow(a[i], b[i], &r), o2 = __builtin_add_overflow(r, carry_in, &r);
    } else {
      o1 = __builtin_sub_overflow(a[i], b[i], &r), o2 = __builtin_sub_overflow(r, carry_in, &r);
    }
    t[i] = r;
    out |= static_cast<uint32_t>(o1 || o2) << i;
  }
  keep_lanes(d, t, w.mask);
  if (in.imm) flag = (flag & ~w.mask) | (out & w.mask);
}

// mad.cc and madc: o: d, flag, a, b, c, flag. kind: takes the carry in; imm: gives it out; size: the high half.
template <class T>
void mad_carry(Warp& w, const Inst& in) {
  using V = typename T::V;
  const auto* a = w.row<V>(in.o[2]);
  const auto* b = w.row<V>(in.o[3]);
  const auto* c = w.row<V>(in.o[4]);
  uint32_t& flag = *w.row<uint32_t>(in.o[1]);
  const uint32_t before = in.kind ? flag : 0;
  alignas(64) V t[kLanes];
  uint32_t out = 0;
  for (int i = 0; i < kLanes; ++i) {
    const auto product = static_cast<Wide<V>>(a[i]) * b[i];
    V r = static_cast<V>(in.size ? product >> (8 * sizeof(V)) : product);
    const bool o1 = __builtin_add_overflow(r, c[i], &r), o2 = __builtin_add_overflow(r, static_cast<V>((before >> i) & 1), &r);
    t[i] = r;
    out |= static_cast<uint32_t>(o1 || o2) << i;
  }
  keep_lanes(w.row<V>(in.o[0]), t, w.mask);
  if (in.imm) flag = (flag & ~w.mask) | (out & w.mask);
}

template <class T, int kForm>  // popc, clz, bfind, bfind.shiftamt
void count_bits(Warp& w, const Inst& in) {
  using V = typename T::V;
  const auto* a = w.row<typename T::R>(in.o[1]);
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) -> uint32_t {
    auto v = T::get(a[i]);
    constexpr int kBits = 8 * sizeof(V);
    if constexpr (kForm == 0) return static_cast<uint32_t>(__builtin_popcountll(static_cast<uint64_t>(static_cast<U<V>>(v))));
    if constexpr (kForm >= 2 && std::is_signed_v<V>) v = v < 0 ? static_cast<V>(~v) : v;
    const auto u = static_cast<uint64_t>(static_cast<U<V>>(v));
    const int top = u == 0 ? -1 : 63 - __builtin_clzll(u);
    if constexpr (kForm == 1) return static_cast<uint32_t>(kBits - 1 - top);
    if constexpr (kForm == 2) return static_cast<uint32_t>(top);
    return top < 0 ? 0xffffffffu : static_cast<uint32_t>(kBits - 1 - top);
  });
}

template <class T>
void bfe(Warp& w, const Inst& in) {
  using V = typename T::V;
  const auto* a = w.row<typename T::R>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  each_lane(w, w.row<typename T::R>(in.o[0]), [=](int i) {
    constexpr uint32_t kMsb = 8 * sizeof(V) - 1;
    const V v = T::get(a[i]);
    const uint32_t pos = b[i] & 0xff, len = c[i] & 0xff;
    U<V> field = pos > kMsb ? 0 : static_cast<U<V>>(v) >> pos;
    if (len <= kMsb) field &= (U<V>{1} << len) - 1;
    if constexpr (std::is_signed_v<V>) {
      const uint32_t top = pos + len - 1 > kMsb ? kMsb : pos + len - 1;
      const bool sign = len != 0 && ((static_cast<U<V>>(v) >> top) & 1);
      const uint32_t have = top >= pos ? top - pos + 1 : 0;
      if (sign && have <= kMsb) field |= ~U<V>{0} << have;
    }
    return T::put(static_cast<V>(field));
  });
}

template <class T>
void bfi(Warp& w, const Inst& in) {
  using V = typename T::V;
  const auto* a = w.row<V>(in.o[1]);
  const auto* b = w.row<V>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  const auto* d = w.row<uint32_t>(in.o[4]);
  each_lane(w, w.row<V>(in.o[0]), [=](int i) {
    constexpr uint32_t kBits = 8 * sizeof(V);
    const uint32_t pos = c[i] & 0xff, len = d[i] & 0xff;
    const V field = len >= kBits ? ~V{0} : (V{1} << len) - 1;
    const V mask = pos >= kBits ? V{0} : field << pos;
    const V value = pos >= kBits ? V{0} : a[i] << pos;
    return static_cast<V>((b[i] & ~mask) | (value & mask));
  });
}

void bmsk(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    const uint32_t pos = in.kind ? a[i] & 31 : (a[i] > 32 ? 32 : a[i]), len = in.kind ? b[i] & 31 : (b[i] > 32 ? 32 : b[i]);
    const uint64_t field = (uint64_t{1} << len) - 1;
    return static_cast<uint32_t>(field << pos);
  });
}

void prmt(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  const int mode = in.kind;
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    const uint64_t bytes = (uint64_t{b[i]} << 32) | a[i];
    uint32_t out = 0;
    for (uint32_t j = 0; j < 4; ++j) {
      uint32_t select;
      const uint32_t s = c[i] & 3;
      switch (mode) {
        case 1: select = s + j; break;                                  // f4e
        case 2: select = (8 + s - j) & 7; break;                        // b4e
        case 3: select = s; break;                                      // rc8
        case 4: select = j < s ? s : j; break;                          // ecl
        case 5: select = j < s ? j : s; break;                          // ecr
        case 6: select = (s & 1) * 2 + (j & 1); break;                  // rc16
        default: select = (c[i] >> (4 * j)) & 15; break;
      }
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (select & 7))) & 0xff;
      if (select & 8) byte = byte & 0x80 ? 0xff : 0;
      out |= byte << (8 * j);
    }
    return out;
  });
}

template <bool kLeft>
void funnel(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  const bool clamp = in.kind != 0;
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    const uint32_t n = clamp ? (c[i] > 32 ? 32 : c[i]) : c[i] & 31;
    const uint64_t both = (uint64_t{b[i]} << 32) | a[i];
    if constexpr (kLeft) return static_cast<uint32_t>((both << n) >> 32);
    return static_cast<uint32_t>(both >> n);
  });
}

void lop3(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  uint32_t m[8];
  for (int j = 0; j < 8; ++j) m[j] = (in.imm >> j) & 1 ? 0xffffffffu : 0;
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    const uint32_t x = a[i], y = b[i], z = c[i];
    return (m[0] & ~x & ~y & ~z) | (m[1] & ~x & ~y & z) | (m[2] & ~x & y & ~z) | (m[3] & ~x & y & z) |
           (m[4] & x & ~y & ~z) | (m[5] & x & ~y & z) | (m[6] & x & y & ~z) | (m[7] & x & y & z);
  });
}

// dp4a and dp2a: signs of a and b in flags bits 0 and 1.
template <int kBytes>
void dot(Warp& w, const Inst& in) {
  const auto* a = w.row<uint32_t>(in.o[1]);
  const auto* b = w.row<uint32_t>(in.o[2]);
  const auto* c = w.row<uint32_t>(in.o[3]);
  const bool sa = in.flags & 1, sb = in.flags & 2, high = in.kind != 0;
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    uint32_t sum = c[i];
    for (int j = 0; j < 4 / kBytes; ++j) {
      int32_t x, y;
      if constexpr (kBytes == 1) {
        x = sa ? static_cast<int8_t>(a[i] >> (8 * j)) : static_cast<uint8_t>(a[i] >> (8 * j));
        y = sb ? static_cast<int8_t>(b[i] >> (8 * j)) : static_cast<uint8_t>(b[i] >> (8 * j));
      } else {
        const int k = j + (high ? 2 : 0);
        x = sa ? static_cast<int16_t>(a[i] >> (16 * j)) : static_cast<uint16_t>(a[i] >> (16 * j));
        y = sb ? static_cast<int8_t>(b[i] >> (8 * k)) : static_cast<uint8_t>(b[i] >> (8 * k));
      }
      sum += static_cast<uint32_t>(x) * static_cast<uint32_t>(y);
    }
    return sum;
  });
}

template <int kForm>  // and, or, xor, not, mov on predicates
void predicate(Warp& w, const Inst& in) {
  const uint32_t a = w.pred(in.o[1]), b = kForm < 3 ? w.pred(in.o[2]) : 0;
  const uint32_t r = kForm == 0 ? a & b : kForm == 1 ? a | b : kForm == 2 ? a ^ b : kForm == 3 ? ~a : a;
  uint32_t& d = *w.row<uint32_t>(in.o[0]);
  d = (d & ~w.mask) | (r & w.mask);
}

// ---- resolvers ----

void three(Build& b, Type type) {
  b.operands(3, 3);
  b.dst(0, type), b.src(1, type), b.src(2, type);
}

template <class Op>
void logic(Build& b, int predicate_form) {
  const Type type = unsigned_of(b.need_type());
  b.operands(3, 3);
  if (type == Type::kPred) {
    b.dst_pred(b.ops[0]), b.src_pred(b.ops[1]), b.src_pred(b.ops[2]);
    b.in.fn = predicate_form == 0 ? predicate<0> : predicate_form == 1 ? predicate<1> : predicate<2>;
    return;
  }
  three(b, type);
  using Operation = Op;
  b.in.fn = PTXSIM_PICK((binary<T, Operation>), type, U16, U32, U64);
}

template <class Op, class Sat>
void add_sub(Build& b) {
  const Type type = b.need_type();
  if (is_float(type)) return resolve_float_arithmetic(b, type);
  const bool sat = b.take("sat");
  three(b, type);
  using Operation = Op;
  b.in.fn = PTXSIM_PICK((binary<T, Operation>), type, U16, S16, U32, S32, U64, S64, U16x2, S16x2);
  if (sat) b.in.fn = type == Type::kS32 ? &binary<S32, Sat> : nullptr;
}

void add(Build& b) { add_sub<Add, AddSat>(b); }
void sub(Build& b) { add_sub<Sub, SubSat>(b); }

void mul(Build& b) {
  const int form = b.take_one({"lo", "hi", "wide"}, -1);
  const Type type = b.need_type();
  if (is_float(type)) return resolve_float_arithmetic(b, type);
  b.operands(3, 3);
  if (form == 2) {
    const Type wide = bits_of(type) == 16 ? Type::kU32 : Type::kU64;
    b.dst(0, wide), b.src(1, type), b.src(2, type);
    b.in.fn = PTXSIM_PICK((mul_wide<T>), type, U16, S16, U32, S32);
    return;
  }
  three(b, type);
  if (form == 0) b.in.fn = PTXSIM_PICK((binary<T, MulLo>), type, U16, S16, U32, S32, U64, S64);
  if (form == 1) b.in.fn = PTXSIM_PICK((binary<T, MulHi>), type, U16, S16, U32, S32, U64, S64);
}

void mad(Build& b) {
  const int form = b.take_one({"lo", "hi", "wide"}, -1);
  if (b.has("cc") || b.base == "madc") {
    b.in.imm = b.take("cc");
    b.in.kind = b.base == "madc";
    b.in.size = form == 1;
    const Type type = unsigned_of(b.need_type());
    const Type plain = type == Type::kS32 ? Type::kU32 : type == Type::kS64 ? Type::kU64 : type;
    if (form == 2 || (form == 1 && plain != type)) b.fail("this carry of a multiply-add is not implemented");
    b.operands(4, 4);
    b.dst(0, plain);
    ++b.in.defs;
    b.append(b.compiler_flag());
    b.src(1, plain), b.src(2, plain), b.src(3, plain);
    b.append(b.compiler_flag());
    b.in.inout = true;
    b.in.fn = PTXSIM_PICK((mad_carry<T>), plain, U32, U64);
    return;
  }
  const Type type = b.need_type();
  if (is_float(type)) return resolve_float_arithmetic(b, type);
  b.operands(4, 4);
  const Type wide = form != 2 ? type : bits_of(type) == 16 ? Type::kU32 : Type::kU64;
  b.dst(0, wide), b.src(1, type), b.src(2, type), b.src(3, wide);
  if (form == 2) b.in.fn = PTXSIM_PICK((mad_wide<T>), type, U16, S16, U32, S32);
  if (form == 0) b.in.fn = PTXSIM_PICK((ternary<T, MadLo>), type, U16, S16, U32, S32, U64, S64);
  if (form == 1) b.in.fn = PTXSIM_PICK((ternary<T, MadHi>), type, U16, S16, U32, S32, U64, S64);
}

void mul24(Build& b) {
  const int form = b.take_one({"lo", "hi"}, -1);
  const Type type = b.need_type();
  three(b, type);
  if (form == 0) b.in.fn = PTXSIM_PICK((binary<T, Mul24Lo>), type, U32, S32);
  if (form == 1) b.in.fn = PTXSIM_PICK((binary<T, Mul24Hi>), type, U32, S32);
}

void mad24(Build& b) {
  if (!b.take("lo")) return;
  const Type type = b.need_type();
  b.operands(4, 4);
  b.dst(0, type), b.src(1, type), b.src(2, type), b.src(3, type);
  b.in.fn = PTXSIM_PICK((ternary<T, Mad24Lo>), type, U32, S32);
}

void sad(Build& b) {
  const Type type = b.need_type();
  b.operands(4, 4);
  b.dst(0, type), b.src(1, type), b.src(2, type), b.src(3, type);
  b.in.fn = PTXSIM_PICK((ternary<T, Sad>), type, U16, S16, U32, S32, U64, S64);
}

void div(Build& b) {
  const Type type = b.need_type();
  if (is_float(type)) return resolve_float_arithmetic(b, type);
  three(b, type);
  b.in.fn = PTXSIM_PICK((binary<T, Div>), type, U16, S16, U32, S32, U64, S64);
}

void rem(Build& b) {
  const Type type = b.need_type();
  three(b, type);
  b.in.fn = PTXSIM_PICK((binary<T, Rem>), type, U16, S16, U32, S32, U64, S64);
}

template <class Op>
void min_max(Build& b) {
  const Type type = b.need_type();
  if (is_float(type)) return resolve_float_arithmetic(b, type);
  const bool relu = b.take("relu");
  three(b, type);
  using Operation = Op;
  b.in.fn = PTXSIM_PICK((binary<T, Operation>), type, U16, S16, U32, S32, U64, S64, U16x2, S16x2);
  if (relu) b.in.fn = nullptr;
}

template <class Op>
void abs_neg(Build& b) {
  const Type type = b.need_type();
  if (is_float(type)) return resolve_float_arithmetic(b, type);
  b.operands(2, 2);
  b.dst(0, type), b.src(1, type);
  using Operation = Op;
  b.in.fn = PTXSIM_PICK((unary<T, Operation>), type, S16, S32, S64);
}

void not_(Build& b) {
  const Type type = unsigned_of(b.need_type());
  b.operands(2, 2);
  if (type == Type::kPred) {
    b.dst_pred(b.ops[0]), b.src_pred(b.ops[1]);
    b.in.fn = predicate<3>;
    return;
  }
  b.dst(0, type), b.src(1, type);
  b.in.fn = PTXSIM_PICK((unary<T, Not>), type, U16, U32, U64);
}

void cnot(Build& b) {
  const Type type = unsigned_of(b.need_type());
  b.operands(2, 2);
  b.dst(0, type), b.src(1, type);
  b.in.fn = PTXSIM_PICK((unary<T, Cnot>), type, U16, U32, U64);
}

template <class Op>
void shifts(Build& b) {
  const Type type = unsigned_of(b.need_type());
  b.operands(3, 3);
  b.dst(0, type), b.src(1, type), b.src(2, Type::kU32);
  using Operation = Op;
  b.in.fn = PTXSIM_PICK((shift<T, Operation>), type, U16, S16, U32, S32, U64, S64);
}

void shf(Build& b) {
  const int left = b.take_one({"r", "l"}, -1);
  b.in.kind = static_cast<uint8_t>(b.take_one({"wrap", "clamp"}, 0));
  b.need_type();
  b.operands(4, 4);
  b.dst(0, Type::kU32), b.src(1, Type::kU32), b.src(2, Type::kU32), b.src(3, Type::kU32);
  b.in.fn = left == 1 ? &funnel<true> : left == 0 ? &funnel<false> : nullptr;
}

template <int kForm>
void counting(Build& b) {
  const bool amount = kForm == 2 && b.take("shiftamt");
  const Type type = unsigned_of(b.need_type());
  b.operands(2, 2);
  b.dst(0, Type::kU32), b.src(1, type);
  b.in.fn = PTXSIM_PICK((count_bits<T, kForm>), type, U32, S32, U64, S64);
  if (amount) b.in.fn = PTXSIM_PICK((count_bits<T, 3>), type, U32, S32, U64, S64);
}

void brev(Build& b) {
  const Type type = unsigned_of(b.need_type());
  b.operands(2, 2);
  b.dst(0, type), b.src(1, type);
  b.in.fn = PTXSIM_PICK((unary<T, Brev>), type, U32, U64);
}

void bfe_(Build& b) {
  const Type type = b.need_type();
  b.operands(4, 4);
  b.dst(0, type), b.src(1, type), b.src(2, Type::kU32), b.src(3, Type::kU32);
  b.in.fn = PTXSIM_PICK((bfe<T>), type, U32, S32, U64, S64);
}

void bfi_(Build& b) {
  const Type type = unsigned_of(b.need_type());
  b.operands(5, 5);
  b.dst(0, type), b.src(1, type), b.src(2, type), b.src(3, Type::kU32), b.src(4, Type::kU32);
  b.in.fn = PTXSIM_PICK((bfi<T>), type, U32, U64);
}

void bmsk_(Build& b) {
  b.in.kind = static_cast<uint8_t>(b.take_one({"clamp", "wrap"}, 0));
  b.need_type();
  three(b, Type::kU32);
  b.in.fn = bmsk;
}

void prmt_(Build& b) {
  b.need_type();
  b.in.kind = static_cast<uint8_t>(1 + b.take_one({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, -1));
  b.operands(4, 4);
  b.dst(0, Type::kU32), b.src(1, Type::kU32), b.src(2, Type::kU32), b.src(3, Type::kU32);
  b.in.fn = prmt;
}

void lop3_(Build& b) {
  b.need_type();
  b.operands(5, 5);
  if (b.ops[4].kind != Operand::Kind::kNumber) b.fail("its table is not a constant");
  b.in.imm = static_cast<int64_t>(b.ops[4].number.bits);
  b.dst(0, Type::kU32), b.src(1, Type::kU32), b.src(2, Type::kU32), b.src(3, Type::kU32);
  b.in.fn = lop3;
}

template <int kBytes>
void dots(Build& b) {
  b.in.kind = static_cast<uint8_t>(b.take_one({"lo", "hi"}, 0));
  const Type a = b.need_type(), c = b.need_type();
  b.in.flags = static_cast<uint8_t>((is_signed(a) ? 1 : 0) | (is_signed(c) ? 2 : 0));
  b.operands(4, 4);
  b.dst(0, Type::kU32), b.src(1, Type::kU32), b.src(2, Type::kU32), b.src(3, Type::kU32);
  b.in.fn = dot<kBytes>;
}

void carries(Build& b) {
  b.in.imm = b.take("cc");
  const Type type = unsigned_of(b.need_type());
  b.operands(3, 3);
  b.in.kind = b.base == "addc" || b.base == "subc";
  const bool subtracts = b.base[0] == 's';
  const Type plain = type == Type::kS32 ? Type::kU32 : type == Type::kS64 ? Type::kU64 : type;
  b.dst(0, plain);
  ++b.in.defs;
  b.append(b.compiler_flag());
  b.src(1, plain), b.src(2, plain);
  if (b.in.kind) b.append(b.compiler_flag());
  b.in.inout = true;
  if (subtracts) b.in.fn = PTXSIM_PICK((carry<T, 1>), plain, U32, U64);
  else b.in.fn = PTXSIM_PICK((carry<T, 0>), plain, U32, U64);
}

void add_any(Build& b) { b.has("cc") ? carries(b) : add(b); }
void sub_any(Build& b) { b.has("cc") ? carries(b) : sub(b); }
void and_(Build& b) { logic<And>(b, 0); }
void or_(Build& b) { logic<Or>(b, 1); }
void xor_(Build& b) { logic<Xor>(b, 2); }

}  // namespace

Handler move_handler(RowClass row_class) {
  switch (row_class) {
    case RowClass::kPred: return predicate<4>;
    case RowClass::k32: return unary<U32, Move>;
    case RowClass::k64: return unary<U64, Move>;
    default: return nullptr;
  }
}

void add_integer(OpcodeTable& table) {
  for (const Opcode& opcode : {Opcode{"add", add_any}, {"sub", sub_any}, {"addc", carries}, {"subc", carries}, {"mul", mul},
                               {"mad", mad}, {"madc", mad}, {"mul24", mul24}, {"mad24", mad24}, {"sad", sad}, {"div", div}, {"rem", rem},
                               {"min", min_max<Min>}, {"max", min_max<Max>}, {"abs", abs_neg<Abs>}, {"neg", abs_neg<Neg>},
                               {"and", and_}, {"or", or_}, {"xor", xor_}, {"not", not_}, {"cnot", cnot},
                               {"shl", shifts<Shl>}, {"shr", shifts<Shr>}, {"shf", shf}, {"popc", counting<0>},
                               {"clz", counting<1>}, {"bfind", counting<2>}, {"brev", brev}, {"bfe", bfe_}, {"bfi", bfi_},
                               {"bmsk", bmsk_}, {"prmt", prmt_}, {"lop3", lop3_}, {"dp4a", dots<1>}, {"dp2a", dots<2>}})
    table[opcode.base] = opcode.resolver;
}

}  // namespace ptxsim::PTXSIM_ISA
