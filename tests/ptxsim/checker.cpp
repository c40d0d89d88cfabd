#include "checker.h"

#include <algorithm>
#include <cstring>

#include "clocks.h"
#include "shadow.h"

namespace ptxsim {
namespace {

constexpr uint8_t kKnown = 1, kFlying = 2;  // state of a byte of shared memory

struct Reading {
  uint32_t begin, end;
  uint64_t ticket;
  std::string by;
};

struct BlockShadow {
  BlockClocks clocks;
  std::vector<Cell> cells;      // of shared memory
  std::vector<uint8_t> state;
  std::vector<Reading> readings;
  std::map<uint32_t, SyncClock> arrivals;  // at named barriers, of those who did not wait
  const Block* block = nullptr;
};

// One instruction's access, for the slow paths.
struct Touch {
  Warp& w;
  const Inst& in;
  BlockShadow& mine;
  Block* owner;  // of shared memory; null: global
  const uint64_t* addresses;
  const unsigned char* values;
  uint32_t mask, bytes;
  bool write, strong;
  Epoch flags;
  bool record = true;
  bool proxy_read = false;
};

}  // namespace

struct Checker::Impl {
  Machine& m;
  std::vector<std::unique_ptr<BlockShadow>> blocks;  // by slot
  GlobalShadow global;
  Pool<ByteWriters> writers;
  Pool<Readers> readers;
  std::unordered_map<uint64_t, SyncClock> atomics;   // by address
  bool any_fence = false;

  explicit Impl(Machine& machine) : m(machine) {}

  static uint32_t thread(const Warp& w, int lane) { return static_cast<uint32_t>(w.index * kLanes + lane); }
  static uint32_t block_id(const Block& b) { return b.linear & ((1u << kBlockBits) - 1); }
  BlockShadow& of(const Block& b) { return *blocks[b.slot]; }

  std::string name_of(Epoch e, bool matrix_ok, const BlockShadow& mine) const {
    uint32_t t = thread_of(e);
    std::string text;
    const uint32_t block = block_of(e);
    const uint32_t x = m.launch.grid.x, y = m.launch.grid.y;
    if (block != mine.clocks.block)
      text = "block (" + std::to_string(block % x) + "," + std::to_string(block / x % y) + "," + std::to_string(block / x / y) + ") ";
    if (matrix_ok && t >= mine.clocks.padded) return text + "the wgmma of warp " + std::to_string(t - mine.clocks.padded);
    return text + "warp " + std::to_string(t / kLanes) + " lane " + std::to_string(t % kLanes);
  }

  std::string where(const Touch& a, uint64_t address) const {
    if (a.owner == nullptr) return "global address " + hex(address) + " (" + m.memory.name(address) + ")";
    return "shared address " + hex(address) + " (" + shared_name(a.w, static_cast<uint32_t>(address)) +
           (a.owner != a.w.block ? " of " + a.owner->name() : "") + ")";
  }

  [[noreturn]] void race(const Touch& a, int lane, uint64_t address, Epoch other, bool other_wrote, uint32_t other_inst) const {
    const Inst& o = m.program->code[other_inst];
    const bool foreign = block_of(other) != a.mine.clocks.block;
    fault(a.w, a.in, Fault::kRace,
          std::string(a.write ? "write" : "read") + " of " + where(a, address) + " is not ordered after the " +
              (other & kStrong ? "atomic " : "") + (other_wrote ? "write" : "read") + " by " + name_of(other, true, a.mine) + ", `" +
              std::string(o.opcode) + "` at " + describe_location(m.module, *m.program, o) +
              (foreign ? " (blocks are ordered by atomics with fences only)" : ""),
          1u << lane);
  }

  bool ordered(const Touch& a, uint32_t t, Epoch e) const {
    const BlockClocks& c = a.mine.clocks;
    if (block_of(e) == c.block) return c.knows(t, thread_of(e), clock_of(e));
    return c.knows_foreign(t, block_of(e), thread_of(e), clock_of(e));
  }

  // Lanes of one instruction that store the same value are no race.
  bool same_value(const Touch& a, int lane, uint64_t word, uint32_t bytes, Epoch other) const {
    if (a.values == nullptr || block_of(other) != a.mine.clocks.block) return false;
    const uint32_t u = thread_of(other);
    if (u / kLanes != static_cast<uint32_t>(a.w.index) || clock_of(other) != a.mine.clocks.own[u]) return false;
    const uint32_t o = u % kLanes;
    if (!((a.mask >> o) & 1) || static_cast<int>(o) >= lane) return false;
    for (uint32_t b = 0; b < 4; ++b) {
      if (!((bytes >> b) & 1)) continue;
      const uint64_t address = word + b, mine = address - a.addresses[lane], theirs = address - a.addresses[o];
      if (mine >= a.bytes || theirs >= a.bytes) return false;
      if (a.values[static_cast<uint32_t>(lane) * a.bytes + mine] != a.values[o * a.bytes + theirs]) return false;
    }
    return true;
  }

  void check_writer(const Touch& a, uint32_t t, int lane, uint64_t word, uint32_t bytes, Epoch w, uint32_t inst) const {
    if (w == 0 || (bytes_of(w) & bytes) == 0) return;
    const uint64_t address = word + static_cast<uint64_t>(__builtin_ctz(bytes_of(w) & bytes));
    if (!(a.strong && (w & kStrong)) && who_of(w) != (a.mine.clocks.block << kThreadBits | t) && !ordered(a, t, w) &&
        !(a.write && same_value(a, lane, word, bytes_of(w) & bytes, w)))
      race(a, lane, address, w, true, inst);
    if (a.proxy_read && !(w & kProxyWrite)) {
      const uint32_t u = thread_of(w);
      const BlockClocks* c = nullptr;
      for (const auto& block : blocks)
        if (block != nullptr && block->clocks.block == block_of(w)) c = &block->clocks;
      // Within a block the reader may have fenced as well, after the barrier; of other blocks the writer must have.
      const bool fenced = c == nullptr || u >= c->padded ||
                          (c == &a.mine.clocks ? c->fenced_for_proxy(t, u, clock_of(w)) : clock_of(w) <= c->fenced[u]);
      if (!fenced) {
        const Inst& o = m.program->code[inst];
        fault(a.w, a.in, Fault::kProxy, "the async proxy reads " + where(a, address) + ", which " + name_of(w, true, a.mine) +
              " wrote by `" + std::string(o.opcode) + "` at " + describe_location(m.module, *m.program, o) +
              " without a fence.proxy.async between", 1u << lane);
      }
    }
  }

  static Readers::Entry entry_of(Epoch e) {
    return {who_of(e) / kLanes, clock_of(e), 1u << (who_of(e) % kLanes), static_cast<uint8_t>(bytes_of(e)), (e & kStrong) != 0};
  }

  void slow_read(const Touch& a, Cell& cell, uint32_t t, int lane, uint64_t word, uint32_t bytes, uint32_t inst) {
    if (cell.w & kTag) {
      const ByteWriters by = writers[static_cast<uint32_t>(cell.w)];
      for (uint32_t b = 0; b < 4; ++b)
        if ((bytes >> b) & 1) check_writer(a, t, lane, word, 1u << b, by.w[b], cell.w_inst);
    } else {
      check_writer(a, t, lane, word, bytes, cell.w, cell.w_inst);
    }
    if (!a.record) return;
    const BlockClocks& c = a.mine.clocks;
    const uint32_t who = c.block << kThreadBits | t;
    const Epoch now = make_epoch(who, c.own[t], bytes, a.flags);
    if (!(cell.r & kTag)) {
      const Epoch r = cell.r;
      const bool replaces = r == 0 || ((bytes_of(r) & ~bytes) == 0 && (!(now & kStrong) || (r & kStrong)) &&
                                       (who_of(r) == who || (thread_of(r) < c.padded && ordered(a, t, r))));
      if (replaces) {
        cell.r = now;
        cell.r_inst = inst;
        return;
      }
      const uint32_t index = readers.take();
      readers[index].clear();
      readers[index].add(entry_of(r));
      cell.r = kTag | index;
    }
    cell.r_inst = inst;
    Readers& entries = readers[static_cast<uint32_t>(cell.r)];
    const uint32_t warp = who / kLanes, lane_bit = 1u << (who % kLanes), clock = c.own[t];
    const bool strong = (now & kStrong) != 0;
    for (uint32_t i = 0; i < entries.count; ++i) {
      auto& e = entries[i];
      if (e.warp == warp && e.clock == clock && e.bytes == bytes && e.strong == strong) {
        e.lanes |= lane_bit;
        return;
      }
    }
    // What happened before this read need not be kept: whoever is ordered after this read is ordered after that too.
    for (uint32_t i = 0; i < entries.count;) {
      auto& e = entries[i];
      const bool old = (e.warp >> (kThreadBits - 5)) == c.block && e.clock < c.phase && (e.warp * kLanes & ((1u << kThreadBits) - 1)) < c.padded;
      if (e.warp == warp && (e.bytes & ~bytes) == 0 && e.strong == strong) e.lanes &= ~lane_bit;
      if (e.lanes == 0 || (old && (e.bytes & ~bytes) == 0)) {
        entries.remove(i);
      } else {
        ++i;
      }
    }
    entries.add({warp, clock, lane_bit, static_cast<uint8_t>(bytes), strong});
  }

  void check_readers(const Touch& a, Cell& cell, uint32_t t, int lane, uint64_t word, uint32_t bytes) {
    const uint32_t who = a.mine.clocks.block << kThreadBits | t;
    if (!(cell.r & kTag)) {
      const Epoch r = cell.r;
      if (r == 0 || (bytes_of(r) & bytes) == 0) return;
      if (!(a.strong && (r & kStrong)) && who_of(r) != who && !ordered(a, t, r))
        race(a, lane, word + static_cast<uint64_t>(__builtin_ctz(bytes_of(r) & bytes)), r, false, cell.r_inst);
      if ((bytes_of(r) & ~bytes) == 0) cell.r = 0;
      return;
    }
    const auto index = static_cast<uint32_t>(cell.r);
    bool keep = false;
    for (uint32_t i = 0; i < readers[index].count; ++i) {
      const auto& e = readers[index][i];
      if ((e.bytes & bytes) == 0) {
        keep = true;
        continue;
      }
      keep |= (e.bytes & ~bytes) != 0;
      if (a.strong && e.strong) continue;
      for (uint32_t l = e.lanes; l != 0; l &= l - 1) {
        const uint32_t other = e.warp * kLanes + static_cast<uint32_t>(__builtin_ctz(l));
        const Epoch r = make_epoch(other, e.clock, e.bytes, e.strong ? kStrong : 0);
        if (other != who && !ordered(a, t, r))
          race(a, lane, word + static_cast<uint64_t>(__builtin_ctz(e.bytes & bytes)), r, false, cell.r_inst);
      }
    }
    if (keep) return;
    readers.give(index);
    cell.r = 0;
  }

  void slow_write(const Touch& a, Cell& cell, uint32_t t, int lane, uint64_t word, uint32_t bytes, uint32_t inst) {
    const BlockClocks& c = a.mine.clocks;
    const Epoch now = make_epoch(c.block << kThreadBits | t, c.own[t], bytes, a.flags);
    if (cell.w & kTag) {
      const auto index = static_cast<uint32_t>(cell.w);
      const ByteWriters by = writers[index];
      for (uint32_t b = 0; b < 4; ++b)
        if ((bytes >> b) & 1) check_writer(a, t, lane, word, 1u << b, by.w[b], cell.w_inst);
      check_readers(a, cell, t, lane, word, bytes);
      if (bytes == 15) {
        writers.give(index);
        cell.w = now;
      } else {
        for (uint32_t b = 0; b < 4; ++b)
          if ((bytes >> b) & 1) writers[index].w[b] = (now & ~Epoch{15}) | (1u << b);
      }
    } else {
      check_writer(a, t, lane, word, bytes, cell.w, cell.w_inst);
      check_readers(a, cell, t, lane, word, bytes);
      const uint32_t rest = bytes_of(cell.w) & ~bytes;
      if (cell.w == 0 || rest == 0) {
        cell.w = now;
      } else if ((cell.w & ~Epoch{15}) == (now & ~Epoch{15})) {
        cell.w |= bytes;
      } else {
        const uint32_t index = writers.take();
        ByteWriters& by = writers[index];
        for (uint32_t b = 0; b < 4; ++b) {
          const Epoch e = (bytes >> b) & 1 ? now : (bytes_of(cell.w) >> b) & 1 ? cell.w : 0;
          by.w[b] = e == 0 ? 0 : (e & ~Epoch{15}) | (1u << b);
        }
        cell.w = kTag | index;
      }
    }
    cell.w_inst = inst;
  }

  // The bytes of one word; `address` is that of the first.
  void word(const Touch& a, Cell& cell, uint32_t t, int lane, uint64_t address, uint32_t bytes, uint32_t inst) {
    const BlockClocks& c = a.mine.clocks;
    const uint32_t who = c.block << kThreadBits | t;
    const auto past = [&](Epoch e) {  // surely ordered
      return e == 0 || (!(e & kTag) && (who_of(e) == who || (block_of(e) == c.block && clock_of(e) < c.phase && thread_of(e) < c.padded)));
    };
    if (bytes == 15 && !a.proxy_read && past(cell.w)) {
      if (a.write) {
        if (past(cell.r)) {
          cell.w = make_epoch(who, c.own[t], 15, a.flags);
          cell.r = 0;
          cell.w_inst = inst;
          return;
        }
      } else if (past(cell.r) && a.record) {
        cell.r = make_epoch(who, c.own[t], 15, a.flags);
        cell.r_inst = inst;
        return;
      }
    }
    const uint64_t base = address & ~uint64_t{3};
    if (a.write) slow_write(a, cell, t, lane, base, bytes, inst);
    else slow_read(a, cell, t, lane, base, bytes, inst);
  }

  template <class F>  // cell(word address)
  void range(const Touch& a, uint32_t t, int lane, uint64_t address, uint64_t bytes, uint32_t inst, F cell) {
    const uint64_t end = address + bytes;
    while (address < end) {
      const uint64_t next = std::min((address | 3) + 1, end);
      const auto mask = static_cast<uint32_t>(((1u << (next - address)) - 1) << (address & 3));
      word(a, cell(address & ~uint64_t{3}), t, lane, address, mask, inst);
      address = next;
    }
  }

  void check_state(const Touch& a, BlockShadow& owner, int lane, uint32_t address, uint32_t bytes) {
    uint8_t* state = owner.state.data() + (address - kSharedBase);
    uint8_t all = kKnown, any = 0;
    if (bytes == 16) {
      uint64_t low, high;
      std::memcpy(&low, state, 8), std::memcpy(&high, state + 8, 8);
      constexpr uint64_t kOnes = 0x0101010101010101u;
      all = (low & high & kOnes) == kOnes ? kKnown : 0;
      any = ((low | high) & (kFlying * kOnes)) != 0 ? kFlying : 0;
    } else {
      for (uint32_t i = 0; i < bytes; ++i) all &= state[i], any |= state[i];
    }
    if (any & kFlying) {
      uint32_t i = 0;
      while (!(state[i] & kFlying)) ++i;
      fault(a.w, a.in, Fault::kAsyncInFlight, std::string(a.write ? "write" : "read") + " of " + where(a, address + i) +
            " with an asynchronous copy in flight to it", 1u << lane);
    }
    if (a.write) {
      std::memset(state, kKnown, bytes);
      for (const Reading& r : owner.readings)
        if (address < r.end && address + bytes > r.begin)
          fault(a.w, a.in, Fault::kAsyncInFlight, "write of " + where(a, address) + " while " + r.by + " may still read it", 1u << lane);
    } else if (!(all & kKnown)) {
      uint32_t i = 0;
      while (state[i] & kKnown) ++i;
      fault(a.w, a.in, Fault::kUninitialized, "read of " + where(a, address + i) + " before it was written", 1u << lane);
    }
  }
};

Checker::Checker(Machine& m) : impl_(std::make_unique<Impl>(m)) {}
Checker::~Checker() = default;

void Checker::start_block(Block& block) {
  auto& blocks = impl_->blocks;
  if (blocks.size() <= block.slot) blocks.resize(block.slot + 1);
  if (blocks[block.slot] == nullptr) blocks[block.slot] = std::make_unique<BlockShadow>();
  BlockShadow& s = *blocks[block.slot];
  s.block = &block;
  s.clocks.start(Impl::block_id(block), impl_->m.threads, impl_->m.warps);
  s.cells.assign((block.shared_bytes + 3) / 4, Cell{});
  s.state.assign(block.shared_bytes, 0);
  s.readings.clear();
  s.arrivals.clear();
}

void Checker::end_block(Block&) {}

void Checker::global(Warp& w, const Inst& in, const uint64_t* addresses, uint32_t mask, uint32_t bytes, Access access,
                     const unsigned char* values) {
  Impl& s = *impl_;
  const Touch a{w, in, s.of(*w.block), nullptr, addresses, values, mask, bytes, writes(access), strong(access),
                strong(access) ? kStrong : 0};
  const uint32_t inst = w.here(in);
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t address = addresses[lane];
    Cell* page = s.global.page(address);  // an aligned access lies in one page
    s.range(a, Impl::thread(w, lane), lane, address, bytes, inst, [&](uint64_t at) -> Cell& { return page[(at & 4095) >> 2]; });
  }
}

void Checker::shared(Warp& w, const Inst& in, Block& owner, const uint64_t* addresses, uint32_t mask, uint32_t bytes,
                     Access access, const unsigned char* values) {
  Impl& s = *impl_;
  BlockShadow& target = s.of(owner);
  const Touch a{w, in, s.of(*w.block), &owner, addresses, values, mask, bytes, writes(access), strong(access),
                strong(access) ? kStrong : 0};
  const uint32_t inst = w.here(in);
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const auto address = static_cast<uint32_t>(addresses[lane]);
    if (access == Access::kAtomic) {  // it reads as well
      Touch reads = a;
      reads.write = false;
      s.check_state(reads, target, lane, address, bytes);
    }
    s.check_state(a, target, lane, address, bytes);
    s.range(a, Impl::thread(w, lane), lane, address, bytes, inst,
            [&](uint64_t at) -> Cell& { return target.cells[(at - kSharedBase) >> 2]; });
  }
}

void Checker::shared_range(Warp& w, const Inst& in, Block& owner, uint32_t address, uint32_t bytes, int lane, bool write, Agent agent) {
  Impl& s = *impl_;
  BlockShadow& target = s.of(owner);
  BlockShadow& mine = s.of(*w.block);
  const uint64_t at = address;
  Touch a{w, in, mine, &owner, &at, nullptr, 1, bytes, write, false, 0};
  uint32_t t = Impl::thread(w, lane);
  if (agent == Agent::kAsyncProxy) a.flags = write ? kProxyWrite : 0, a.record = write, a.proxy_read = !write;
  if (agent == Agent::kMatrix) a.proxy_read = true, a.record = false;
  s.check_state(a, target, lane, address, bytes);
  const uint32_t inst = w.here(in);
  const auto cell = [&](uint64_t word) -> Cell& { return target.cells[(word - kSharedBase) >> 2]; };
  s.range(a, t, lane, address, bytes, inst, cell);
  if (agent != Agent::kMatrix) return;
  // The read itself is the matrix unit's, past once the warp has waited.
  const Epoch now = make_epoch(mine.clocks.block << kThreadBits | (mine.clocks.padded + static_cast<uint32_t>(w.index)),
                               mine.clocks.own[mine.clocks.padded + static_cast<uint32_t>(w.index)], 15, 0);
  for (uint64_t word = address & ~3u; word < uint64_t{address} + bytes; word += 4) {
    Cell& c = cell(word);
    if (c.r & kTag) {
      Readers& entries = s.readers[static_cast<uint32_t>(c.r)];
      const uint32_t who = who_of(now);
      bool known = false;
      for (uint32_t i = 0; i < entries.count; ++i)
        if (entries[i].warp == who / kLanes && entries[i].lanes == 1u << (who % kLanes)) entries[i].clock = clock_of(now), known = true;
      if (!known) entries.add(Impl::entry_of(now));
    } else if (c.r == 0 || s.ordered(a, t, c.r) || who_of(c.r) == who_of(now)) {
      c.r = now;
    } else {
      const uint32_t index = s.readers.take();
      s.readers[index].clear();
      s.readers[index].add(Impl::entry_of(c.r));
      s.readers[index].add(Impl::entry_of(now));
      c.r = kTag | index;
    }
    c.r_inst = inst;
  }
}

void Checker::global_range(Warp& w, const Inst& in, uint64_t address, uint64_t bytes, int lane, bool write, Agent agent) {
  Impl& s = *impl_;
  Touch a{w, in, s.of(*w.block), nullptr, &address, nullptr, 1, static_cast<uint32_t>(bytes), write, false, 0};
  if (agent == Agent::kAsyncProxy) a.flags = write ? kProxyWrite : 0, a.proxy_read = !write;
  s.range(a, Impl::thread(w, lane), lane, address, bytes, w.here(in),
          [&](uint64_t at) -> Cell& { return s.global.page(at)[(at & 4095) >> 2]; });
}

void Checker::in_flight(Block& owner, uint32_t address, uint32_t bytes, bool flying) {
  uint8_t* state = impl_->of(owner).state.data() + (address - kSharedBase);
  for (uint32_t i = 0; i < bytes; ++i) state[i] = flying ? state[i] | kFlying : static_cast<uint8_t>((state[i] & ~kFlying) | kKnown);
}

void Checker::mark_written(Block& owner, uint32_t address, uint32_t bytes) {
  std::memset(impl_->of(owner).state.data() + (address - kSharedBase), kKnown, bytes);
}

void Checker::reading(Block& owner, uint32_t address, uint32_t bytes, const Warp& w, const Inst& in, uint64_t ticket) {
  impl_->of(owner).readings.push_back({address, address + bytes, ticket, place(w, in, w.mask)});
}

void Checker::done_reading(Block& owner, uint64_t ticket) {
  auto& list = impl_->of(owner).readings;
  std::erase_if(list, [&](const Reading& r) { return r.ticket == ticket; });
}

void Checker::barrier_arrive(Warp& w, uint32_t id, uint32_t lanes) {
  BlockShadow& s = impl_->of(*w.block);
  for (uint32_t m = lanes; m != 0; m &= m - 1) release(w, __builtin_ctz(m), s.arrivals[id]);
}

void Checker::barrier_done(Block& block, uint32_t id, Barrier& barrier) {
  BlockShadow& s = impl_->of(block);
  std::vector<uint32_t> threads;
  bool all = true;
  for (const Barrier::Waiter& waiter : barrier.waiters) {
    all &= waiter.sync;
    if (!waiter.sync) continue;
    for (uint32_t m = waiter.lanes; m != 0; m &= m - 1) threads.push_back(Impl::thread(*waiter.warp, __builtin_ctz(m)));
  }
  if (all && threads.size() >= block.live) {
    s.clocks.meet_all();
  } else {
    const auto it = s.arrivals.find(id);
    s.clocks.meet(threads, it == s.arrivals.end() ? nullptr : &it->second);
  }
  s.arrivals.erase(id);
}

void Checker::warp_sync(Warp& w, uint32_t lanes) {
  if ((lanes & (lanes - 1)) == 0) return;
  std::vector<uint32_t> threads;
  for (uint32_t m = lanes; m != 0; m &= m - 1) threads.push_back(Impl::thread(w, __builtin_ctz(m)));
  impl_->of(*w.block).clocks.meet(threads, nullptr);
}

void Checker::fence(Warp& w, int) {
  BlockClocks& c = impl_->of(*w.block).clocks;
  impl_->any_fence = c.any_fence = true;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const uint32_t t = Impl::thread(w, __builtin_ctz(m));
    auto& f = c.fences[t];
    if (f.acquired != nullptr) c.learn(t, *f.acquired);
    f.acquired.reset();
    f.released = std::make_shared<SyncClock>(c.everything(t));
    ++c.own[t];
  }
}

void Checker::proxy_fence(Warp& w) {
  BlockClocks& c = impl_->of(*w.block).clocks;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const uint32_t t = Impl::thread(w, __builtin_ctz(m));
    c.fenced[t] = c.own[t]++;
    c.fenced_phase[t] = c.phase;
    c.fenced_rows[t] = c.rows[t];
  }
}

void Checker::release(Warp& w, int lane, SyncClock& to) {
  BlockClocks& c = impl_->of(*w.block).clocks;
  const uint32_t t = Impl::thread(w, lane);
  to.join(c.everything(t));
  ++c.own[t];
}

SyncClock Checker::snapshot(Warp& w, int lane) {
  BlockClocks& c = impl_->of(*w.block).clocks;
  const uint32_t t = Impl::thread(w, lane);
  SyncClock all = c.everything(t);
  ++c.own[t];
  return all;
}

void Checker::acquire(Warp& w, int lane, const SyncClock& from) {
  impl_->of(*w.block).clocks.learn(Impl::thread(w, lane), from);
}

void Checker::tick(Warp& w, int lane) { ++impl_->of(*w.block).clocks.own[Impl::thread(w, lane)]; }

uint32_t Checker::matrix_commit(Warp& w) {
  BlockClocks& c = impl_->of(*w.block).clocks;
  return c.own[c.padded + static_cast<uint32_t>(w.index)]++;
}

void Checker::matrix_done(Warp& w, uint32_t time) {
  BlockClocks& c = impl_->of(*w.block).clocks;
  const auto index = static_cast<uint32_t>(w.index);
  const uint32_t unit = c.padded + index;
  c.matrix_done[index] = time;
  SyncClock done;
  auto row = std::make_shared<std::vector<uint32_t>>(c.size, 0);
  (*row)[unit] = time;
  done.of(c.block) = row;
  for (uint32_t m = w.live; m != 0; m &= m - 1) c.learn(index * kLanes + static_cast<uint32_t>(__builtin_ctz(m)), done);
}

namespace {

// Shared memory of blocks has addresses of its own.
uint64_t atomic_key(const Warp& w, const Inst& in, uint64_t address) {
  const auto space = static_cast<Space>(in.space);
  const bool shared = space == Space::kShared || space == Space::kSharedCluster || address >> 56 == kSharedWindow >> 56;
  if (!shared) return address;
  const auto low = static_cast<uint32_t>(address);
  const uint32_t rank = low >> kRankShift;
  const Block& owner = rank == 0 || w.block->cluster == nullptr || rank > w.block->cluster->blocks.size()
                           ? *w.block : *w.block->cluster->blocks[rank - 1];
  return kSharedWindow | uint64_t{owner.slot} << 32 | (low & ((1u << kRankShift) - 1));
}

}  // namespace

void Checker::release_atomic(Warp& w, const Inst& in, const uint64_t* addresses) {
  if (in.sem < 2 && !impl_->any_fence) return;
  BlockClocks& c = impl_->of(*w.block).clocks;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint32_t t = Impl::thread(w, lane);
    if (in.sem >= 2) release(w, lane, impl_->atomics[atomic_key(w, in, addresses[lane])]);
    else if (c.fences[t].released != nullptr) impl_->atomics[atomic_key(w, in, addresses[lane])].join(*c.fences[t].released);
  }
}

void Checker::acquire_atomic(Warp& w, const Inst& in, const uint64_t* addresses) {
  if (impl_->atomics.empty()) return;
  BlockClocks& c = impl_->of(*w.block).clocks;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const auto it = impl_->atomics.find(atomic_key(w, in, addresses[lane]));
    if (it == impl_->atomics.end()) continue;
    const uint32_t t = Impl::thread(w, lane);
    if (in.sem >= 2) {
      c.learn(t, it->second);
    } else {
      auto seen = c.fences[t].acquired == nullptr ? std::make_shared<SyncClock>() : std::make_shared<SyncClock>(*c.fences[t].acquired);
      seen->join(it->second);
      c.fences[t].acquired = seen;
      c.any_fence = true;
    }
  }
}

void mark_local_known(Warp& w, int lane, uint32_t offset, uint32_t bytes) {
  if (w.machine->checker != nullptr) std::memset(w.local_known[lane].data() + offset, 1, bytes);
}

void acquire_loaded(Warp& w, const Inst& in, const uint64_t* addresses) {
  w.yield = w.polls = true;  // what is read like this is what other warps write: whoever polls it should let them
  if (w.machine->checker != nullptr) w.machine->checker->acquire_atomic(w, in, addresses);
}

void release_stored(Warp& w, const Inst& in, const uint64_t* addresses) {
  if (w.machine->checker != nullptr) w.machine->checker->release_atomic(w, in, addresses);
}

}  // namespace ptxsim
