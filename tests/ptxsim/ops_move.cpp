// mov in all its forms, and addresses: cvta, isspacep, mapa, getctarank.
#include <chrono>
#include <cstring>

#include "access.h"
#include "allocate.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "opcodes.h"
#include "wgmma_pending.h"

namespace ptxsim {
namespace {

Handler plain_move(RowClass c) { return host_has_avx2() ? isa_avx2::move_handler(c) : isa_base::move_handler(c); }

// A move of a register that a wgmma in flight will write carries the pending value along, as the assembler does.
void move32(Warp& w, const Inst& in) {
  if (w.pending_wgmma) move_pending(w, in.o[1], in.o[0]);
  in.inner(w, in);
}

void move128(Warp& w, const Inst& in) {
  const auto* a = w.row<uint64_t>(in.o[1]);
  auto* d = w.row<uint64_t>(in.o[0]);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) std::memmove(d + 2 * __builtin_ctz(m), a + 2 * __builtin_ctz(m), 16);
}

uint64_t nanoseconds() {
  return static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
}

// Clocks count the instructions of the launch: the same seed shows the same times.
void read_clock(Warp& w, const Inst& in) {
  const auto special = static_cast<Special>(in.kind);
  uint64_t value = static_cast<uint64_t>(w.machine->counters.warp_instructions) + ++w.machine->events;
  if (special >= Special::kGlobalTimer) value = nanoseconds();
  if (special == Special::kClockHi || special == Special::kGlobalTimerHi) value >>= 32;
  if (in.size == 64) {
    auto* d = w.row<uint64_t>(in.o[0]);
    for (uint32_t m = w.mask; m != 0; m &= m - 1) d[__builtin_ctz(m)] = value;
  } else {
    auto* d = w.row<uint32_t>(in.o[0]);
    for (uint32_t m = w.mask; m != 0; m &= m - 1) d[__builtin_ctz(m)] = static_cast<uint32_t>(value);
  }
}

void frame_address(Warp& w, const Inst& in) {
  const uint64_t base = kLocalBase + static_cast<uint64_t>(in.imm);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int i = __builtin_ctz(m);
    if (in.size == 64) w.row<uint64_t>(in.o[0])[i] = base + w.frame[i];
    else w.row<uint32_t>(in.o[0])[i] = static_cast<uint32_t>(base + w.frame[i]);
  }
}

void param_address(Warp& w, const Inst& in) {
  const uint64_t value = reinterpret_cast<uint64_t>(w.machine->params.data()) + static_cast<uint64_t>(in.imm);
  auto* d = w.row<uint64_t>(in.o[0]);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) d[__builtin_ctz(m)] = value;
}

// o: destination, then the parts from the lowest; kind: bits of a part, vec: how many.
void pack(Warp& w, const Inst& in) {
  const Offset* o = in.operands();
  if (in.kind == 16 && in.vec == 2) {
    const auto* a = w.row<uint32_t>(o[1]);
    const auto* b = w.row<uint32_t>(o[2]);
    return isa_base::each_lane(w, w.row<uint32_t>(o[0]), [=](int i) { return (a[i] & 0xffffu) | (b[i] << 16); });
  }
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    unsigned char bytes[16] = {};
    const uint32_t part = in.kind / 8;
    for (uint32_t k = 0; k < in.vec; ++k) {
      if (part == 8) std::memcpy(bytes + k * 8, w.row<uint64_t>(o[1 + k]) + lane, 8);
      else std::memcpy(bytes + k * part, w.row<uint32_t>(o[1 + k]) + lane, part);
    }
    const uint32_t size = part * in.vec;
    if (size <= 4) std::memcpy(w.row<uint32_t>(o[0]) + lane, bytes, 4);
    else if (size == 8) std::memcpy(w.row<uint64_t>(o[0]) + lane, bytes, 8);
    else std::memcpy(w.row<uint64_t>(o[0]) + 2 * lane, bytes, 16);
  }
}

void unpack(Warp& w, const Inst& in) {
  const Offset* o = in.operands();
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    unsigned char bytes[16] = {};
    const uint32_t part = in.kind / 8, size = part * in.vec;
    if (size <= 4) std::memcpy(bytes, w.row<uint32_t>(o[in.vec]) + lane, 4);
    else if (size == 8) std::memcpy(bytes, w.row<uint64_t>(o[in.vec]) + lane, 8);
    else std::memcpy(bytes, w.row<uint64_t>(o[in.vec]) + 2 * lane, 16);
    for (uint32_t k = 0; k < in.vec; ++k) {
      if (part == 8) {
        std::memcpy(w.row<uint64_t>(o[k]) + lane, bytes + k * 8, 8);
      } else {
        uint32_t value = 0;
        std::memcpy(&value, bytes + k * part, part);
        w.row<uint32_t>(o[k])[lane] = value;
      }
    }
  }
}

Type bits_type(int bits) {
  return bits == 8 ? Type::kB8 : bits == 16 ? Type::kB16 : bits == 32 ? Type::kB32 : bits == 64 ? Type::kB64 : Type::kB128;
}

void mov(Build& b) {
  const Type type = b.need_type();
  b.operands(2, 2);
  const Operand& to = b.ops[0];
  const Operand& from = b.ops[1];
  if (from.kind == Operand::Kind::kVector || to.kind == Operand::Kind::kVector) {
    const bool packs = from.kind == Operand::Kind::kVector;
    const auto& parts = packs ? from.parts : to.parts;
    b.in.vec = static_cast<uint8_t>(parts.size());
    b.in.kind = static_cast<uint8_t>(bits_of(type) / static_cast<int>(parts.size()));
    const Type part = bits_type(b.in.kind);
    if (packs) {
      b.dst(to, type);
      for (const Operand& p : parts) b.src(p, part);
      b.in.fn = pack;
    } else {
      for (const Operand& p : parts) b.dst(p, part);
      b.src(from, type);
      b.in.fn = unpack;
    }
    return;
  }
  if (type == Type::kPred) {
    b.dst_pred(to), b.src_pred(from);
    b.in.fn = plain_move(RowClass::kPred);
    return;
  }
  if (from.kind == Operand::Kind::kSymbol && from.symbol != nullptr &&
      (from.symbol->space == Space::kLocal || from.symbol->space == Space::kParam)) {
    b.dst(to, type);
    b.in.size = static_cast<uint8_t>(bits_of(type));
    b.in.imm = from.symbol->offset + from.offset;
    b.in.fn = from.symbol->space == Space::kLocal ? &frame_address : &param_address;
    return;
  }
  if (from.kind == Operand::Kind::kSpecial && from.special >= Special::kClock && from.special <= Special::kGlobalTimerHi) {
    b.dst(to, type);
    b.in.size = static_cast<uint8_t>(bits_of(type));
    b.in.kind = static_cast<uint8_t>(from.special);
    b.in.fn = read_clock;
    return;
  }
  b.dst(to, type);
  b.src(from, type);
  if (bits_of(type) == 128) {
    b.in.fn = move128;
  } else if (bits_of(type) == 64) {
    b.in.fn = plain_move(RowClass::k64);
  } else {
    b.in.fn = plain_move(RowClass::k32);
    if (bits_of(type) == 32 && b.program().hopper) b.in.inner = b.in.fn, b.in.fn = move32;
  }
}

// ---- addresses ----

template <class R>
void add_window(Warp& w, const Inst& in) {
  const auto window = static_cast<R>(in.imm);
  const R* a = w.row<R>(in.o[1]);
  isa_base::each_lane(w, w.row<R>(in.o[0]), [=](int i) { return static_cast<R>(a[i] + window); });
}

void cvta(Build& b) {
  const bool to = b.take("to");
  const auto space = static_cast<Space>(b.take_space());
  const Type type = b.need_type();
  b.operands(2, 2);
  uint64_t window = space == Space::kShared || space == Space::kSharedCluster ? kSharedWindow
                    : space == Space::kLocal                                  ? kLocalWindow : 0;
  if (bits_of(type) != 64) b.fail("32-bit generic addresses do not exist");
  b.in.imm = static_cast<int64_t>(to ? 0 - window : window);
  const Operand& from = b.ops[1];
  if (from.kind == Operand::Kind::kSymbol && from.symbol != nullptr && from.symbol->space == Space::kLocal) {
    b.dst(0, type);
    b.in.size = 64;
    b.in.imm = static_cast<int64_t>(window) + from.symbol->offset + from.offset;
    b.in.fn = frame_address;
    return;
  }
  if (from.kind == Operand::Kind::kSymbol && from.symbol != nullptr && from.symbol->space == Space::kParam) {
    b.dst(0, type);
    b.in.imm = from.symbol->offset + from.offset;
    b.in.fn = param_address;
    return;
  }
  b.dst(0, type), b.src(1, type);
  b.in.fn = add_window<uint64_t>;
}

void isspacep_(Warp& w, const Inst& in) {
  const uint64_t* a = w.row<uint64_t>(in.o[1]);
  uint32_t r = 0;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t window = a[i] >> 56;
    const bool shared = window == kSharedWindow >> 56, local = window == kLocalWindow >> 56;
    const uint32_t rank = static_cast<uint32_t>(a[i]) >> kRankShift;
    bool yes = false;
    switch (static_cast<Space>(in.space)) {
      case Space::kShared: yes = shared && (rank == 0 || rank == w.block->rank + 1); break;
      case Space::kSharedCluster: yes = shared; break;
      case Space::kLocal: yes = local; break;
      case Space::kGlobal: yes = !shared && !local; break;
      default: {
        const auto begin = reinterpret_cast<uint64_t>(w.machine->params.data());
        if (static_cast<Space>(in.space) == Space::kParam) yes = a[i] >= begin && a[i] < begin + w.machine->params.size();
      }
    }
    r |= static_cast<uint32_t>(yes) << i;
  }
  uint32_t& d = *w.row<uint32_t>(in.o[0]);
  d = (d & ~w.mask) | (r & w.mask);
}

void isspacep(Build& b) {
  b.in.space = b.take_space();
  b.operands(2, 2);
  b.dst_pred(b.ops[0]), b.src(1, Type::kU64);
  b.in.fn = isspacep_;
}

template <class R>
void mapa_(Warp& w, const Inst& in) {
  const R* a = w.row<R>(in.o[1]);
  const uint32_t* rank = w.row<uint32_t>(in.o[2]);
  R* d = w.row<R>(in.o[0]);
  const size_t ranks = w.block->cluster == nullptr ? 1 : w.block->cluster->blocks.size();
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int i = __builtin_ctz(m);
    if (rank[i] >= ranks)
      fault(w, in, Fault::kOutOfBounds, "rank " + std::to_string(rank[i]) + " in a cluster of " + std::to_string(ranks), m & -m);
    const R high = a[i] & ~static_cast<R>(0xffffffffu);
    d[i] = high | ((rank[i] + 1) << kRankShift) | (static_cast<uint32_t>(a[i]) & ((1u << kRankShift) - 1));
  }
}

void mapa(Build& b) {
  b.take_space();
  const Type type = b.need_type();
  b.operands(3, 3);
  b.dst(0, type), b.src(1, type), b.src(2, Type::kU32);
  b.in.fn = bits_of(type) == 64 ? &mapa_<uint64_t> : &mapa_<uint32_t>;
}

void getctarank(Build& b) {
  b.take_space();
  const Type type = b.need_type();
  b.operands(2, 2);
  b.dst(0, Type::kU32), b.src(1, type);
  b.in.size = static_cast<uint8_t>(bits_of(type));
  b.in.fn = [](Warp& w, const Inst& in) {
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const int i = __builtin_ctz(m);
      const auto a = static_cast<uint32_t>(in.size == 64 ? w.row<uint64_t>(in.o[1])[i] : w.row<uint32_t>(in.o[1])[i]);
      w.row<uint32_t>(in.o[0])[i] = a >> kRankShift ? (a >> kRankShift) - 1 : w.block->rank;
    }
  };
}

}  // namespace

bool is_move32(const Inst& inst) { return inst.fn == move32; }

void add_move(OpcodeTable& table) {
  table["mov"] = mov;
  table["cvta"] = cvta;
  table["isspacep"] = isspacep;
  table["mapa"] = mapa;
  table["getctarank"] = getctarank;
}

}  // namespace ptxsim
