// Integer arithmetic, carries included.
#include <limits>

#include "compiler_impl.h"
#include "integer.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

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

}  // namespace

void add_integer(OpcodeTable& table) {
  for (const Opcode& opcode :
       {Opcode{"add", add_any}, {"sub", sub_any}, {"addc", carries}, {"subc", carries}, {"mul", mul},
        {"mad", mad}, {"madc", mad}, {"mul24", mul24}, {"mad24", mad24}, {"sad", sad}, {"div", div},
        {"rem", rem}, {"min", min_max<Min>}, {"max", min_max<Max>}, {"abs", abs_neg<Abs>},
        {"neg", abs_neg<Neg>}, {"dp4a", dots<1>}, {"dp2a", dots<2>}})
    table[opcode.base] = opcode.resolver;
}

}  // namespace ptxsim::PTXSIM_ISA
