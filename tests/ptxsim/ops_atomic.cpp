// atom and red. Lanes of one instruction take their turns in ascending order.
#include <algorithm>
#include <bit>
#include <cstring>

#include "access.h"
#include "async.h"
#include "checker.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptxsim {
namespace {

using Combine = uint64_t (*)(uint64_t old, uint64_t b, uint64_t c);

template <class V>
V cast(uint64_t bits) {
  if constexpr (sizeof(V) == 8) return std::bit_cast<V>(bits);
  else if constexpr (sizeof(V) == 4) return std::bit_cast<V>(static_cast<uint32_t>(bits));
  else return static_cast<V>(bits);
}
template <class V>
uint64_t uncast(V v) {
  if constexpr (sizeof(V) == 8) return std::bit_cast<uint64_t>(v);
  else if constexpr (sizeof(V) == 4) return std::bit_cast<uint32_t>(v);
  else return static_cast<uint16_t>(v);
}

enum Operation : int { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };

template <class V, int kOperation>
uint64_t integer(uint64_t old, uint64_t b, uint64_t c) {
  const V x = cast<V>(old), y = cast<V>(b);
  switch (kOperation) {
    case kAdd: return uncast(static_cast<V>(static_cast<std::make_unsigned_t<V>>(x) + static_cast<std::make_unsigned_t<V>>(y)));
    case kMin: return uncast(y < x ? y : x);
    case kMax: return uncast(x < y ? y : x);
    case kAnd: return uncast(static_cast<V>(x & y));
    case kOr: return uncast(static_cast<V>(x | y));
    case kXor: return uncast(static_cast<V>(x ^ y));
    case kExch: return b;
    case kCas: return x == y ? c : old;
    case kInc: return uncast(static_cast<V>(x >= y ? 0 : x + 1));
    default: return uncast(static_cast<V>(x == 0 || x > y ? y : x - 1));
  }
}

template <class V>
Combine integer_of(int operation) {
  constexpr Combine kTable[] = {integer<V, 0>, integer<V, 1>, integer<V, 2>, integer<V, 3>, integer<V, 4>,
                                integer<V, 5>, integer<V, 6>, integer<V, 7>, integer<V, 8>, integer<V, 9>};
  return kTable[operation];
}

template <class V>
uint64_t add_float(uint64_t old, uint64_t b, uint64_t) {
  return uncast(cast<V>(old) + cast<V>(b));
}

template <class H, int kOperation>
uint64_t half(uint64_t old, uint64_t b, uint64_t) {
  const float x = H::get(static_cast<uint32_t>(old)), y = H::get(static_cast<uint32_t>(b));
  if (kOperation == kAdd) return H::put(x + y) & 0xffffu;
  if (x != x) return y != y ? 0x7fff : b;
  if (y != y) return old;
  return (kOperation == kMin ? y < x : x < y) ? b : old;
}
template <class H, int kOperation>
uint64_t half_pair(uint64_t old, uint64_t b, uint64_t c) {
  return half<H, kOperation>(old & 0xffff, b & 0xffff, c) | half<H, kOperation>(old >> 16, b >> 16, c) << 16;
}
template <class H>
Combine half_of(int operation, bool pair) {
  if (operation == kAdd) return pair ? half_pair<H, kAdd> : half<H, kAdd>;
  if (operation == kMin) return pair ? half_pair<H, kMin> : half<H, kMin>;
  if (operation == kMax) return pair ? half_pair<H, kMax> : half<H, kMax>;
  return nullptr;
}

Combine combine_of(int operation, Type type) {
  switch (type) {
    case Type::kB16:
    case Type::kU16: return integer_of<uint16_t>(operation);
    case Type::kB32:
    case Type::kU32: return integer_of<uint32_t>(operation);
    case Type::kS32: return integer_of<int32_t>(operation);
    case Type::kB64:
    case Type::kU64: return integer_of<uint64_t>(operation);
    case Type::kS64: return integer_of<int64_t>(operation);
    case Type::kF32: return operation == kAdd ? add_float<float> : operation == kExch ? integer_of<uint32_t>(kExch) : nullptr;
    case Type::kF64: return operation == kAdd ? add_float<double> : operation == kExch ? integer_of<uint64_t>(kExch) : nullptr;
    case Type::kF16: return half_of<isa_base::F16>(operation, false);
    case Type::kBF16: return half_of<isa_base::BF16>(operation, false);
    case Type::kF16x2: return half_of<isa_base::F16>(operation, true);
    case Type::kBF16x2: return half_of<isa_base::BF16>(operation, true);
    default: return nullptr;
  }
}

uint64_t get(const Warp& w, Offset row, uint32_t bytes, int lane) {
  return bytes == 8 ? w.row<uint64_t>(row)[lane] : w.row<uint32_t>(row)[lane];
}

// o: destinations (vec, unless red), base, b (vec), c. kind: whether there is a destination; imm2: the Combine.
void atomic(Warp& w, const Inst& in) {
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  const int first = in.kind ? in.vec : 0;
  gather_addresses(w, in, first, addresses);
  Checker* checker = w.machine->checker.get();
  const Offset* o = in.operands();
  const auto combine = reinterpret_cast<Combine>(in.imm2);
  if (checker != nullptr) checker->release_atomic(w, in, addresses);
  resolve(w, in, static_cast<Space>(in.space), addresses, w.mask, uint32_t{in.size} * in.vec, Access::kAtomic, p, nullptr);
  const bool cas = in.count > static_cast<uint32_t>(first + 1 + in.vec);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    for (int v = 0; v < in.vec; ++v) {
      uint64_t old = 0;
      std::memcpy(&old, p[lane] + v * in.size, in.size);
      const uint64_t b = get(w, o[first + 1 + v], in.size, lane);
      const uint64_t c = cas ? get(w, o[first + 2], in.size, lane) : 0;
      const uint64_t now = combine(old, in.size == 2 ? b & 0xffff : b, c);
      std::memcpy(p[lane] + v * in.size, &now, in.size);
      if (in.kind == 0) continue;
      if (in.size == 8) w.row<uint64_t>(o[v])[lane] = old;
      else w.row<uint32_t>(o[v])[lane] = static_cast<uint32_t>(old);
    }
  }
  if (checker != nullptr) checker->acquire_atomic(w, in, addresses);
  ++w.machine->events;
}

// 128-bit exch and cas.
void atomic128(Warp& w, const Inst& in) {
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, 1, addresses);
  Checker* checker = w.machine->checker.get();
  if (checker != nullptr) checker->release_atomic(w, in, addresses);
  resolve(w, in, static_cast<Space>(in.space), addresses, w.mask, 16, Access::kAtomic, p, nullptr);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    unsigned char old[16];
    std::memcpy(old, p[lane], 16);
    const uint64_t* b = w.row<uint64_t>(in.o[2]) + 2 * lane;
    if (in.count == 3) std::memcpy(p[lane], b, 16);
    else if (std::memcmp(old, b, 16) == 0) std::memcpy(p[lane], w.row<uint64_t>(in.o[3]) + 2 * lane, 16);
    std::memcpy(w.row<uint64_t>(in.o[0]) + 2 * lane, old, 16);
  }
  if (checker != nullptr) checker->acquire_atomic(w, in, addresses);
  ++w.machine->events;
}

void atom(Build& b) {
  const bool red = b.base == "red";
  if (red && b.take("async")) return resolve_red_async(b);
  b.take("noftz");
  if (b.take("acquire") || b.take("release") || b.take("acq_rel") || b.take("sc")) b.in.sem = 3;
  if (b.take("relaxed")) b.in.sem = 1;
  b.in.scope = static_cast<uint8_t>(b.take_one({"cta", "cluster", "gpu", "sys"}, 2));
  b.in.space = b.take_space();
  b.take("L2::cache_hint");
  const int operation = b.take_one({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"}, -1);
  b.in.vec = static_cast<uint8_t>(b.take("v2") ? 2 : b.take("v4") ? 4 : b.take("v8") ? 8 : 1);
  const Type type = b.need_type();
  if (operation < 0) b.fail("it has no operation");
  size_t at = 0;
  b.in.size = static_cast<uint8_t>(bits_of(type) / 8);
  b.in.kind = !red;
  const auto each = [&](const Operand& operand, auto f) {
    if (operand.kind == Operand::Kind::kVector) for (const Operand& part : operand.parts) f(part);
    else f(operand);
  };
  if (!red) each(b.ops.at(at++), [&](const Operand& part) { b.dst(part, type); });
  b.address(b.ops.at(at++));
  each(b.ops.at(at++), [&](const Operand& part) { b.src(part, type); });
  if (operation == kCas) b.src(b.ops.at(at++), type);
  if (type == Type::kB128) {
    b.in.fn = operation == kCas || operation == kExch ? &atomic128 : nullptr;
    return;
  }
  const Combine combine = combine_of(operation, type);
  if (combine == nullptr) b.fail("this operation on this type does not exist");
  b.in.imm2 = reinterpret_cast<int64_t>(combine);
  b.in.fn = atomic;
}

}  // namespace

void add_atomic(OpcodeTable& table) {
  table["atom"] = atom;
  table["red"] = atom;
}

}  // namespace ptxsim
