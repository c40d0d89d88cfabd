// setp, set, selp, slct.
#include <cmath>
#include <functional>

#include "lanes.h"
#include "opcodes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

// Relations: the first six compare, of floats false for NaN; the u forms are true for NaN.
enum Relation : int { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <int kRelation>
struct Compare {
  template <class V>
  static bool apply(V a, V b) {
    switch (kRelation) {
      case kEq: return a == b;
      case kNe: return std::is_floating_point_v<V> ? (a < b || a > b) : a != b;
      case kLt: return a < b;
      case kLe: return a <= b;
      case kGt: return a > b;
      case kGe: return a >= b;
      case kEqu: return !(a < b || a > b);
      case kNeu: return a != b;
      case kLtu: return !(a >= b);
      case kLeu: return !(a > b);
      case kGtu: return !(a <= b);
      case kGeu: return !(a < b);
      case kNum: return a == a && b == b;
      default: return a != a || b != b;
    }
  }
};

constexpr uint8_t kNegated = 1, kFtz = 2;  // in Inst::flags

// .ftz: a subnormal operand counts as zero. Values of 16 bits are floats here, with the exponents of their type.
template <class T, class V>
V operand(V value, bool ftz) {
  if constexpr (std::is_same_v<V, float>) {
    const float smallest = T::type == Type::kF16 || T::type == Type::kF16x2 ? 0x1p-14f : 0x1p-126f;
    if (ftz && value < smallest && value > -smallest) return 0;
  }
  return value;
}

template <class T, int kRelation>
uint32_t compare(const Warp& w, const Inst& in, int first, bool high) {
  using R = typename T::R;
  const bool ftz = (in.flags & kFtz) != 0;
  const R* a = w.row<R>(in.o[first]);
  const R* b = w.row<R>(in.o[first + 1]);
  uint32_t r = 0;
  if constexpr (T::packed) {
    using H = typename T::Half;
    const int shift = high ? 16 : 0;
    for (int i = 0; i < kLanes; ++i)
      r |= Compare<kRelation>::apply(operand<T>(H::get((a[i] >> shift) & 0xffffu), ftz),
                                     operand<T>(H::get((b[i] >> shift) & 0xffffu), ftz))
               ? kBit[i]
               : 0u;
  } else {
    for (int i = 0; i < kLanes; ++i)
      r |= Compare<kRelation>::apply(operand<T>(T::get(a[i]), ftz), operand<T>(T::get(b[i]), ftz)) ? kBit[i] : 0u;
  }
  return r;
}

uint32_t combine(int how, uint32_t r, uint32_t c) {
  switch (how) {
    case 1: return r & c;
    case 2: return r | c;
    case 3: return r ^ c;
    default: return r;
  }
}

void put_pred(Warp& w, Offset offset, uint32_t value) {
  uint32_t& d = *w.row<uint32_t>(offset);
  d = (d & ~w.mask) | (value & w.mask);
}

// o: p, q, a, b, c. `kind`: how c is combined; flags bit 0: c is negated.
template <class T, int kRelation>
void setp(Warp& w, const Inst& in) {
  const uint32_t r = compare<T, kRelation>(w, in, 2, false);
  if constexpr (T::packed) {
    const uint32_t h = compare<T, kRelation>(w, in, 2, true);
    const uint32_t c = w.pred(in.o[4]) ^ (in.flags & kNegated ? kFull : 0);
    put_pred(w, in.o[0], combine(in.kind, r, c));
    put_pred(w, in.o[1], combine(in.kind, h, c));
  } else if (in.kind == 0 && in.vec == 1) {
    put_pred(w, in.o[0], r);
  } else {
    const uint32_t c = w.pred(in.o[4]) ^ (in.flags & kNegated ? kFull : 0);
    put_pred(w, in.o[0], combine(in.kind, r, c));
    put_pred(w, in.o[1], combine(in.kind, ~r, c));
  }
}

// set: all ones, or 1.0. o: d, a, b, c. size: of the result type.
template <class T, int kRelation>
void set(Warp& w, const Inst& in) {
  const uint32_t c = w.pred(in.o[3]) ^ (in.flags & kNegated ? kFull : 0);
  const uint32_t r = combine(in.kind, compare<T, kRelation>(w, in, 1, false), c);
  const uint32_t h = T::packed ? combine(in.kind, compare<T, kRelation>(w, in, 1, true), c) : 0;
  const auto yes = static_cast<uint32_t>(in.imm);
  each_lane(w, w.row<uint32_t>(in.o[0]), [=](int i) {
    const uint32_t low = (r >> i) & 1 ? yes : 0;
    return T::packed ? (low & 0xffff) | ((h >> i) & 1 ? yes << 16 : 0) : low;
  });
}

template <class T>
void selp(Warp& w, const Inst& in) {
  using R = typename T::R;
  const R* a = w.row<R>(in.o[1]);
  const R* b = w.row<R>(in.o[2]);
  const uint32_t p = w.pred(in.o[3]) ^ (in.flags & kNegated ? kFull : 0);
  each_lane(w, w.row<R>(in.o[0]), [=](int i) { return (p & kBit[i]) != 0 ? a[i] : b[i]; });
}

void selp_pred(Warp& w, const Inst& in) {
  const uint32_t p = w.pred(in.o[3]);
  put_pred(w, in.o[0], (w.pred(in.o[1]) & p) | (w.pred(in.o[2]) & ~p));
}

template <class T, class C>
void slct(Warp& w, const Inst& in) {
  using R = typename T::R;
  const R* a = w.row<R>(in.o[1]);
  const R* b = w.row<R>(in.o[2]);
  const uint32_t* c = w.row<uint32_t>(in.o[3]);
  const bool ftz = (in.flags & kFtz) != 0;
  each_lane(w, w.row<R>(in.o[0]), [=](int i) { return operand<C>(C::get(c[i]), ftz) >= 0 ? a[i] : b[i]; });
}

template <template <class, int> class Maker, int kRelation>
Handler by_type(Type type) {
  return PTXSIM_PICK((Maker<T, kRelation>::run), type, U16, S16, U32, S32, U64, S64, F16, BF16, F16x2, BF16x2, F32, F64);
}
template <class T, int kRelation>
struct Setp {
  static void run(Warp& w, const Inst& in) { setp<T, kRelation>(w, in); }
};
template <class T, int kRelation>
struct Set {
  static void run(Warp& w, const Inst& in) { set<T, kRelation>(w, in); }
};

template <template <class, int> class Maker>
Handler by_relation(int relation, Type type) {
  switch (relation) {
    case kEq: return by_type<Maker, kEq>(type);
    case kNe: return by_type<Maker, kNe>(type);
    case kLt: return by_type<Maker, kLt>(type);
    case kLe: return by_type<Maker, kLe>(type);
    case kGt: return by_type<Maker, kGt>(type);
    case kGe: return by_type<Maker, kGe>(type);
    case kEqu: return by_type<Maker, kEqu>(type);
    case kNeu: return by_type<Maker, kNeu>(type);
    case kLtu: return by_type<Maker, kLtu>(type);
    case kLeu: return by_type<Maker, kLeu>(type);
    case kGtu: return by_type<Maker, kGtu>(type);
    case kGeu: return by_type<Maker, kGeu>(type);
    case kNum: return by_type<Maker, kNum>(type);
    case kNan: return by_type<Maker, kNan>(type);
    default: return nullptr;
  }
}

int take_relation(Build& b) {
  const int relation =
      b.take_one({"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}, -1);
  if (relation >= 0) return relation;
  const int same = b.take_one({"lo", "ls", "hi", "hs"}, -1);  // unsigned names
  constexpr int kSame[] = {kLt, kLe, kGt, kGe};
  if (same < 0) b.fail("it has no relation");
  return kSame[same];
}

void setp_resolver(Build& b) {
  const int relation = take_relation(b);
  b.in.kind = static_cast<uint8_t>(1 + b.take_one({"and", "or", "xor"}, -1));
  const bool ftz = b.take("ftz");
  const Type type = unsigned_of(b.need_type());
  b.operands(3, 4);
  const bool pair = b.ops[0].kind == Operand::Kind::kGroup;
  b.dst_pred(pair ? b.ops[0].parts.at(0) : b.ops[0]);
  b.dst_pred(pair ? b.ops[0].parts.at(1) : Operand{});
  b.in.vec = pair ? 2 : 1;
  b.src(1, type), b.src(2, type);
  if (b.ops.size() == 4) {
    b.src_pred(b.ops[3]);
    b.in.flags = b.ops[3].negated;
  } else {
    b.append(b.pred_constant(true));
  }
  if (ftz) b.in.flags |= kFtz;
  b.in.fn = by_relation<Setp>(relation, type);
}

void set_resolver(Build& b) {
  const int relation = take_relation(b);
  b.in.kind = static_cast<uint8_t>(1 + b.take_one({"and", "or", "xor"}, -1));
  const bool ftz = b.take("ftz");
  const Type to = b.need_type(), from = unsigned_of(b.need_type());
  b.operands(3, 4);
  b.dst(0, to), b.src(1, from), b.src(2, from);
  if (b.ops.size() == 4) {
    b.src_pred(b.ops[3]);
    b.in.flags = b.ops[3].negated;
  } else {
    b.append(b.pred_constant(true));
  }
  b.in.imm = to == Type::kF32 ? 0x3f800000 : to == Type::kF16 || to == Type::kF16x2 ? 0x3c00
             : to == Type::kBF16 || to == Type::kBF16x2 ? 0x3f80 : 0xffffffff;
  if (bits_of(to) == 16) b.in.imm &= 0xffff;
  if (ftz) b.in.flags |= kFtz;
  b.in.fn = by_relation<Set>(relation, from);
}

void selp_resolver(Build& b) {
  const Type type = b.need_type();
  b.operands(4, 4);
  if (type == Type::kPred) {
    b.dst_pred(b.ops[0]), b.src_pred(b.ops[1]), b.src_pred(b.ops[2]), b.src_pred(b.ops[3]);
    b.in.fn = selp_pred;
    return;
  }
  b.dst(0, type), b.src(1, type), b.src(2, type), b.src_pred(b.ops[3]);
  b.in.flags = b.ops[3].negated;
  b.in.fn = bits_of(type) <= 32 ? &selp<U32> : bits_of(type) == 64 ? &selp<U64> : nullptr;
}

void slct_resolver(Build& b) {
  if (b.take("ftz")) b.in.flags |= kFtz;
  const Type type = b.need_type(), by = b.need_type();
  b.operands(4, 4);
  b.dst(0, type), b.src(1, type), b.src(2, type), b.src(3, by);
  const bool wide = bits_of(type) == 64;
  if (by == Type::kS32) b.in.fn = wide ? &slct<U64, S32> : &slct<U32, S32>;
  if (by == Type::kF32) b.in.fn = wide ? &slct<U64, F32> : &slct<U32, F32>;
}

}  // namespace

void add_compare(OpcodeTable& table) {
  for (const Opcode& opcode :
       {Opcode{"setp", setp_resolver}, {"set", set_resolver}, {"selp", selp_resolver}, {"slct", slct_resolver}})
    table[opcode.base] = opcode.resolver;
}

}  // namespace ptxsim::PTXSIM_ISA
