// What lanes of a warp do together: shfl, vote, match, redux, activemask, elect, bar.warp.sync.
#include "checker.h"
#include "lanes.h"
#include "machine.h"
#include "opcodes.h"

namespace ptxsim {
namespace {

// Executes `f` on the lanes that are complete, and restores the mask.
template <class F>
void with_members(Warp& w, const Inst& in, Offset members, bool exited_allowed, F f) {
  const uint32_t* m = w.row<uint32_t>(members);
  const uint32_t all = w.mask;
  const uint32_t ready = ready_lanes(w, in, m, exited_allowed);
  if (ready == 0) return;
  w.mask = ready;
  f(m);
  w.mask = all;
}

// o: d, p, a, b, c, members. kind: up, down, bfly, idx.
void shfl(Warp& w, const Inst& in) {
  with_members(w, in, in.o[5], false, [&](const uint32_t*) {
    const uint32_t* a = w.row<uint32_t>(in.o[2]);
    const uint32_t* b = w.row<uint32_t>(in.o[3]);
    const uint32_t* c = w.row<uint32_t>(in.o[4]);
    uint32_t t[kLanes], inside = 0;
    for (int i = 0; i < kLanes; ++i) {
      const int by = static_cast<int>(b[i] & 31), clamp = static_cast<int>(c[i] & 31), segment = static_cast<int>((c[i] >> 8) & 31);
      const int low = i & segment, high = low | (clamp & ~segment);
      int j;
      bool in_range;
      switch (in.kind) {
        case 0: j = i - by, in_range = j >= high; break;
        case 1: j = i + by, in_range = j <= high; break;
        case 2: j = i ^ by, in_range = j <= high; break;
        default: j = low | (by & ~segment), in_range = j <= high; break;
      }
      if (!in_range) j = i;
      t[i] = (w.mask >> j) & 1 ? a[j] : 0xffffffffu;  // undefined on the GPU: poison
      inside |= static_cast<uint32_t>(in_range) << i;
    }
    isa_base::keep_lanes(w.row<uint32_t>(in.o[0]), t, w.mask);
    uint32_t& p = *w.row<uint32_t>(in.o[1]);
    p = (p & ~w.mask) | (inside & w.mask);
  });
}

void shfl_resolver(Build& b) {
  if (!b.take("sync")) b.fail("without .sync it does not exist on this GPU");
  b.in.kind = static_cast<uint8_t>(b.take_one({"up", "down", "bfly", "idx"}, 0));
  b.need_type();
  b.operands(5, 5);
  const bool pair = b.ops[0].kind == Operand::Kind::kGroup;
  b.dst(pair ? b.ops[0].parts.at(0) : b.ops[0], Type::kB32);
  b.dst_pred(pair ? b.ops[0].parts.at(1) : Operand{});
  for (size_t i = 1; i < 5; ++i) b.src(i, Type::kB32);
  b.in.fn = shfl;
}

// o: d, a, members. kind: all, any, uni, ballot; flags bit 0: a is negated.
void vote(Warp& w, const Inst& in) {
  with_members(w, in, in.o[2], false, [&](const uint32_t* members) {
    const uint32_t a = w.pred(in.o[1]) ^ (in.flags & 1 ? kFull : 0);
    uint32_t result = 0;
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const int i = __builtin_ctz(m);
      const uint32_t group = members[i] & w.mask, yes = a & group;
      if (in.kind == 3) {
        w.row<uint32_t>(in.o[0])[i] = yes;
        continue;
      }
      const bool r = in.kind == 0 ? yes == group : in.kind == 1 ? yes != 0 : yes == group || yes == 0;
      result |= static_cast<uint32_t>(r) << i;
    }
    if (in.kind == 3) return;
    uint32_t& d = *w.row<uint32_t>(in.o[0]);
    d = (d & ~w.mask) | result;
  });
}

void vote_resolver(Build& b) {
  if (!b.take("sync")) b.fail("without .sync it does not exist on this GPU");
  b.in.kind = static_cast<uint8_t>(b.take_one({"all", "any", "uni", "ballot"}, 0));
  b.need_type();
  b.operands(3, 3);
  if (b.in.kind == 3) b.dst(0, Type::kB32);
  else b.dst_pred(b.ops[0]);
  b.src_pred(b.ops[1]);
  b.in.flags = b.ops[1].negated;
  b.src(2, Type::kB32);
  b.in.fn = vote;
}

// o: d, p, a, members. kind: any, all.
template <class R>
void match(Warp& w, const Inst& in) {
  with_members(w, in, in.o[3], false, [&](const uint32_t* members) {
    const R* a = w.row<R>(in.o[2]);
    uint32_t d[kLanes] = {}, p = 0;
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const int i = __builtin_ctz(m);
      const uint32_t group = members[i] & w.mask;
      for (uint32_t n = group; n != 0; n &= n - 1)
        if (a[__builtin_ctz(n)] == a[i]) d[i] |= n & -n;
      if (in.kind == 1) {
        const bool same = d[i] == group;
        p |= static_cast<uint32_t>(same) << i;
        if (!same) d[i] = 0;
      }
    }
    isa_base::keep_lanes(w.row<uint32_t>(in.o[0]), d, w.mask);
    uint32_t& pred = *w.row<uint32_t>(in.o[1]);
    pred = (pred & ~w.mask) | p;
  });
}

void match_resolver(Build& b) {
  b.take("sync");
  b.in.kind = static_cast<uint8_t>(b.take_one({"any", "all"}, 0));
  const Type type = b.need_type();
  b.operands(3, 3);
  const bool pair = b.ops[0].kind == Operand::Kind::kGroup;
  b.dst(pair ? b.ops[0].parts.at(0) : b.ops[0], Type::kB32);
  b.dst_pred(pair ? b.ops[0].parts.at(1) : Operand{});
  b.src(1, type), b.src(2, Type::kB32);
  b.in.fn = bits_of(type) == 64 ? &match<uint64_t> : &match<uint32_t>;
}

// kind: add, min, max, and, or, xor; flags bit 0: signed.
void redux(Warp& w, const Inst& in) {
  with_members(w, in, in.o[2], false, [&](const uint32_t* members) {
    const uint32_t* a = w.row<uint32_t>(in.o[1]);
    uint32_t d[kLanes] = {};
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const int i = __builtin_ctz(m);
      bool first = true;
      uint32_t r = 0;
      for (uint32_t n = members[i] & w.mask; n != 0; n &= n - 1) {
        const uint32_t v = a[__builtin_ctz(n)];
        const auto less = [&](uint32_t x, uint32_t y) {
          return in.flags & 1 ? static_cast<int32_t>(x) < static_cast<int32_t>(y) : x < y;
        };
        if (first) r = v;
        else switch (in.kind) {
          case 0: r += v; break;
          case 1: r = less(v, r) ? v : r; break;
          case 2: r = less(r, v) ? v : r; break;
          case 3: r &= v; break;
          case 4: r |= v; break;
          default: r ^= v; break;
        }
        first = false;
      }
      d[i] = r;
    }
    isa_base::keep_lanes(w.row<uint32_t>(in.o[0]), d, w.mask);
  });
}

void redux_resolver(Build& b) {
  b.take("sync");
  b.in.kind = static_cast<uint8_t>(b.take_one({"add", "min", "max", "and", "or", "xor"}, 0));
  const Type type = b.need_type();
  if (is_float(type)) b.fail("on floats it needs sm_100a");
  b.in.flags = is_signed(type);
  b.operands(3, 3);
  b.dst(0, Type::kB32), b.src(1, Type::kB32), b.src(2, Type::kB32);
  b.in.fn = redux;
}

void activemask(Build& b) {
  b.need_type();
  b.operands(1, 1);
  b.dst(0, Type::kB32);
  b.in.fn = [](Warp& w, const Inst& in) {
    const uint32_t mask = w.mask;
    isa_base::each_lane(w, w.row<uint32_t>(in.o[0]), [=](int) { return mask; });
  };
}

// o: d, p, members: the lowest member is elected.
void elect(Warp& w, const Inst& in) {
  with_members(w, in, in.o[2], true, [&](const uint32_t* members) {
    uint32_t p = 0;
    for (uint32_t m = w.mask; m != 0; m &= m - 1) {
      const int i = __builtin_ctz(m);
      const int leader = __builtin_ctz(members[i] & w.mask);
      w.row<uint32_t>(in.o[0])[i] = static_cast<uint32_t>(leader);
      if (leader == i) p |= m & -m;
    }
    uint32_t& d = *w.row<uint32_t>(in.o[1]);
    d = (d & ~w.mask) | p;
  });
}

void elect_resolver(Build& b) {
  b.take("sync");
  b.operands(2, 2);
  const bool pair = b.ops[0].kind == Operand::Kind::kGroup;
  b.dst(pair ? b.ops[0].parts.at(0) : b.ops[0], Type::kB32);
  b.dst_pred(pair ? b.ops[0].parts.at(1) : Operand{});
  b.src(1, Type::kB32);
  b.in.fn = elect;
}

void warp_barrier(Warp& w, const Inst& in) {
  with_members(w, in, in.o[0], true, [&](const uint32_t* members) {
    if (w.machine->checker == nullptr) return;
    for (uint32_t rest = w.mask; rest != 0;) {
      const uint32_t group = members[__builtin_ctz(rest)] & w.mask;
      w.machine->checker->warp_sync(w, group);
      rest &= ~group;
    }
  });
}

}  // namespace

void resolve_warp_barrier(Build& b) {
  b.operands(1, 1);
  b.src(0, Type::kB32);
  b.in.fn = warp_barrier;
}

void add_warp(OpcodeTable& table) {
  table["shfl"] = shfl_resolver;
  table["vote"] = vote_resolver;
  table["match"] = match_resolver;
  table["redux"] = redux_resolver;
  table["activemask"] = activemask;
  table["elect"] = elect_resolver;
}

}  // namespace ptxsim
