// ld, st, ldu, prefetch and their like.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "async.h"
#include "checker.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptxsim {
namespace {

// Inst::kind of loads and stores.
enum Extend : uint8_t { kZero, kSign };

template <int kBytes>
uint64_t load_bytes(const unsigned char* p, bool sign) {
  if constexpr (kBytes == 1) return sign ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(*p))) : *p;
  if constexpr (kBytes == 2) {
    uint16_t v;
    std::memcpy(&v, p, 2);
    return sign ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int16_t>(v))) : v;
  }
  if constexpr (kBytes == 4) {
    uint32_t v;
    std::memcpy(&v, p, 4);
    return sign ? static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(v))) : v;
  }
  uint64_t v;
  std::memcpy(&v, p, 8);
  return v;
}

// Pointers that follow each other without gaps, all lanes active: one copy does.
bool contiguous(unsigned char* const* p, uint32_t bytes) {
  uint64_t difference = 0;
  const auto first = reinterpret_cast<uint64_t>(p[0]);
  for (uint32_t i = 0; i < kLanes; ++i) difference |= reinterpret_cast<uint64_t>(p[i]) ^ (first + uint64_t{i} * bytes);
  return difference == 0;
}

// o: destinations (vec of them), base. size: bytes of one element.
template <int kBytes, class R>
void load(Warp& w, const Inst& in) {
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, in.vec, addresses);
  const auto access = in.sem ? Access::kStrongRead : Access::kRead;
  resolve(w, in, static_cast<Space>(in.space), addresses, w.mask, kBytes * uint32_t{in.vec}, access, p, nullptr);
  const Offset* o = in.operands();
  const bool sign = in.kind == kSign;
  if (in.vec == 1) {
    R* d = w.row<R>(o[0]);
    if (w.mask == kFull) {
      if constexpr (kBytes == sizeof(R)) {
        if (contiguous(p, kBytes)) {
          std::memcpy(d, p[0], kLanes * kBytes);
          if (in.sem) acquire_loaded(w, in, addresses);
          return;
        }
      }
      for (int i = 0; i < kLanes; ++i) d[i] = static_cast<R>(load_bytes<kBytes>(p[i], sign));
    } else {
      for (uint32_t m = w.mask; m != 0; m &= m - 1) {
        const int i = __builtin_ctz(m);
        d[i] = static_cast<R>(load_bytes<kBytes>(p[i], sign));
      }
    }
  } else {
    for (uint32_t v = 0; v < in.vec; ++v) {
      R* d = w.row<R>(o[v]);
      if (w.mask == kFull) {
        for (int i = 0; i < kLanes; ++i) d[i] = static_cast<R>(load_bytes<kBytes>(p[i] + v * kBytes, sign));
      } else {
        for (uint32_t m = w.mask; m != 0; m &= m - 1) {
          const int i = __builtin_ctz(m);
          d[i] = static_cast<R>(load_bytes<kBytes>(p[i] + v * kBytes, sign));
        }
      }
    }
  }
  if (in.sem) acquire_loaded(w, in, addresses);
}

void load128(Warp& w, const Inst& in) {
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, in.vec, addresses);
  resolve(w, in, static_cast<Space>(in.space), addresses, w.mask, 16u * in.vec, Access::kRead, p, nullptr);
  for (uint32_t v = 0; v < in.vec; ++v)
    for (uint32_t m = w.mask; m != 0; m &= m - 1)
      std::memcpy(w.row<uint64_t>(in.operands()[v]) + 2 * __builtin_ctz(m), p[__builtin_ctz(m)] + 16 * v, 16);
}

// Kernel parameters: the same for all lanes.
template <int kBytes, class R>
void load_param(Warp& w, const Inst& in) {
  const unsigned char* p = w.machine->params.data() + in.imm;
  if (in.imm < 0 || static_cast<size_t>(in.imm) + kBytes * size_t{in.vec} > w.machine->params.size())
    fault(w, in, Fault::kOutOfBounds, "parameter byte " + std::to_string(in.imm), w.mask);
  for (uint32_t v = 0; v < in.vec; ++v) {
    const R value = static_cast<R>(load_bytes<kBytes>(p + v * kBytes, in.kind == kSign));
    isa_base::each_lane(w, w.row<R>(in.operands()[v]), [=](int) { return value; });
  }
}

// o: base, sources. Each lane's bytes are put together first: the checker compares them.
template <int kBytes, class R>
void store(Warp& w, const Inst& in) {
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, 0, addresses);
  const uint32_t bytes = kBytes * uint32_t{in.vec};
  alignas(64) unsigned char stage[kLanes * 32];
  const Offset* o = in.operands();
  for (uint32_t v = 0; v < in.vec; ++v) {
    const R* s = w.row<R>(o[1 + v]);
    for (uint32_t i = 0; i < kLanes; ++i) std::memcpy(stage + i * bytes + v * kBytes, s + i, kBytes);
  }
  const auto access = in.sem ? Access::kStrongWrite : Access::kWrite;
  if (in.sem) release_stored(w, in, addresses);
  resolve(w, in, static_cast<Space>(in.space), addresses, w.mask, bytes, access, p, stage);
  if (w.mask == kFull && contiguous(p, bytes)) {
    std::memcpy(p[0], stage, kLanes * bytes);
  } else {
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const uint32_t i = static_cast<uint32_t>(__builtin_ctz(m));
      std::memcpy(p[i], stage + i * bytes, bytes);
    }
  }
  if (in.sem) ++w.machine->events;
}

void store128(Warp& w, const Inst& in) {
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, 0, addresses);
  resolve(w, in, static_cast<Space>(in.space), addresses, w.mask, 16u * in.vec, Access::kWrite, p, nullptr);
  for (uint32_t v = 0; v < in.vec; ++v)
    for (uint32_t m = w.mask; m != 0; m &= m - 1)
      std::memcpy(p[__builtin_ctz(m)] + 16 * v, w.row<uint64_t>(in.operands()[1 + v]) + 2 * __builtin_ctz(m), 16);
}

// Hints that change nothing here.
void take_hints(Build& b) {
  for (const char* hint : {"ca", "cg", "cs", "cv", "lu", "wb", "wt", "nc", "unified"}) b.take(hint);
  for (size_t i = 0; i < b.mods.size();) {
    if (b.mods[i].starts_with("L1::") || b.mods[i].starts_with("L2::")) b.mods.erase(b.mods.begin() + static_cast<long>(i));
    else ++i;
  }
}

// sem: 0 weak, 1 volatile or relaxed, 2 acquire or release, 3 both; scope: 0 cta, 1 cluster, 2 gpu, 3 sys.
void take_semantics(Build& b) {
  if (b.take("weak")) {}
  if (b.take("volatile") || b.take("relaxed") || b.take("mmio")) b.in.sem = 1;
  if (b.take("acquire") || b.take("release")) b.in.sem = 2;
  if (b.take("acq_rel") || b.take("sc")) b.in.sem = 3;
  b.in.scope = static_cast<uint8_t>(b.take_one({"cta", "cluster", "gpu", "sys"}, 2));
}

void ld(Build& b) {
  take_semantics(b);
  b.in.space = b.take_space();
  take_hints(b);
  b.in.vec = static_cast<uint8_t>(b.take("v2") ? 2 : b.take("v4") ? 4 : b.take("v8") ? 8 : 1);
  const Type type = b.need_type();
  b.operands(2, 3);  // the third is a cache policy
  const int bytes = bits_of(type) / 8;
  b.in.size = static_cast<uint8_t>(bytes);
  b.in.kind = is_signed(type) ? kSign : kZero;
  const bool vector = b.ops[0].kind == Operand::Kind::kVector;
  if ((vector ? b.ops[0].parts.size() : 1) != b.in.vec) b.fail("its vector does not fit");
  const Operand& first = vector ? b.ops[0].parts[0] : b.ops[0];
  bool wide = bits_of(type) == 64;
  for (size_t i = 0; vector && i < b.ops[0].parts.size(); ++i)
    if (b.ops[0].parts[i].kind == Operand::Kind::kReg) wide |= b.is_wide(b.ops[0].parts[i]);
  wide |= first.kind == Operand::Kind::kReg && b.is_wide(first);
  const Type row = bits_of(type) == 128 ? Type::kB128 : wide ? Type::kU64 : Type::kU32;
  if (vector) for (const Operand& part : b.ops[0].parts) b.dst(part, row);
  else b.dst(b.ops[0], row);
  const auto asked = static_cast<Space>(b.in.space);
  b.address(b.ops[1]);
  const bool param_symbol = static_cast<Space>(b.in.space) == Space::kParam && b.ops[1].symbol != nullptr;
  if (asked == Space::kParam && (b.in.flags & kFrameAddress)) b.in.space = static_cast<uint8_t>(Space::kLocal);
  if (bits_of(type) == 128) {
    b.in.fn = param_symbol ? nullptr : &load128;
    return;
  }
  if (param_symbol && b.ops[1].symbol->space == Space::kParam) {
    if (wide) b.in.fn = bytes == 8 ? &load_param<8, uint64_t> : bytes == 4 ? &load_param<4, uint64_t> : bytes == 2 ? &load_param<2, uint64_t> : &load_param<1, uint64_t>;
    else b.in.fn = bytes == 4 ? &load_param<4, uint32_t> : bytes == 2 ? &load_param<2, uint32_t> : &load_param<1, uint32_t>;
    return;
  }
  if (wide) b.in.fn = bytes == 8 ? &load<8, uint64_t> : bytes == 4 ? &load<4, uint64_t> : bytes == 2 ? &load<2, uint64_t> : &load<1, uint64_t>;
  else b.in.fn = bytes == 4 ? &load<4, uint32_t> : bytes == 2 ? &load<2, uint32_t> : &load<1, uint32_t>;
}

void st(Build& b) {
  if (b.take("async")) return resolve_st_async(b);
  take_semantics(b);
  b.in.space = b.take_space();
  take_hints(b);
  b.in.vec = static_cast<uint8_t>(b.take("v2") ? 2 : b.take("v4") ? 4 : b.take("v8") ? 8 : 1);
  const Type type = b.need_type();
  b.operands(2, 3);
  const int bytes = bits_of(type) / 8;
  b.in.size = static_cast<uint8_t>(bytes);
  b.address(b.ops[0]);
  if (b.in.flags & kFrameAddress) b.in.space = static_cast<uint8_t>(Space::kLocal);
  const bool vector = b.ops[1].kind == Operand::Kind::kVector;
  if ((vector ? b.ops[1].parts.size() : 1) != b.in.vec) b.fail("its vector does not fit");
  bool wide = bits_of(type) == 64;
  if (!vector) wide |= b.ops[1].kind == Operand::Kind::kReg && b.is_wide(b.ops[1]);
  else for (const Operand& part : b.ops[1].parts) wide |= part.kind == Operand::Kind::kReg && b.is_wide(part);
  const Type row = bits_of(type) == 128 ? Type::kB128 : wide ? Type::kU64 : type == Type::kF32 ? Type::kF32 : Type::kU32;
  if (vector) for (const Operand& part : b.ops[1].parts) b.src(part, type == Type::kF64 ? Type::kF64 : row);
  else b.src(b.ops[1], type == Type::kF64 ? Type::kF64 : row);
  if (bits_of(type) == 128) b.in.fn = store128;
  else if (wide) b.in.fn = bytes == 8 ? &store<8, uint64_t> : bytes == 4 ? &store<4, uint64_t> : bytes == 2 ? &store<2, uint64_t> : &store<1, uint64_t>;
  else b.in.fn = bytes == 4 ? &store<4, uint32_t> : bytes == 2 ? &store<2, uint32_t> : &store<1, uint32_t>;
}

// Moves nothing that a kernel could see.
void hint(Build& b) {
  b.mods.clear();
  b.in.fn = [](Warp&, const Inst&) {};
}

void createpolicy(Build& b) {
  b.mods.clear();
  b.dst(0, Type::kU64);
  b.in.fn = [](Warp& w, const Inst& in) { isa_base::each_lane(w, w.row<uint64_t>(in.o[0]), [](int) { return uint64_t{0}; }); };
}

}  // namespace

void add_memory(OpcodeTable& table) {
  table["ld"] = ld;
  table["ldu"] = ld;
  table["st"] = st;
  for (const char* name : {"prefetch", "prefetchu", "applypriority", "discard"}) table[name] = hint;
  table["createpolicy"] = createpolicy;
}

}  // namespace ptxsim
