// PTX has as many registers as it has values; one row each would not fit any cache. Registers that are never alive
// together share a row: liveness over the basic blocks, then one interval of instructions per register.
#include "allocate.h"

#include <algorithm>

namespace ptxsim {
namespace {

constexpr uint32_t kBytes[] = {4, 128, 256, 512};  // by RowClass

class Liveness {
 public:
  Liveness(const Compiler& compiler, uint32_t begin, uint32_t end) : compiler_(compiler), begin_(begin), end_(end) {}

  // First and last instruction at which each register is alive; first > last: nowhere.
  void intervals(std::vector<uint32_t>& first, std::vector<uint32_t>& last) {
    find_blocks();
    const size_t words = (compiler_.registers.size() + 63) / 64;
    for (Block& b : blocks_) b.in.assign(words, 0), b.out.assign(words, 0), b.use.assign(words, 0), b.def.assign(words, 0);
    for (Block& b : blocks_) {
      for (uint32_t pc = b.begin; pc < b.end; ++pc) {
        each_use(pc, [&](uint32_t r) {
          if (!test(b.def, r)) set(b.use, r);
        });
        each_def(pc, [&](uint32_t r) { set(b.def, r); });
      }
    }
    for (bool changed = true; changed;) {
      changed = false;
      for (auto b = blocks_.rbegin(); b != blocks_.rend(); ++b) {
        for (const uint32_t next : b->next)
          for (size_t i = 0; i < words; ++i) b->out[i] |= blocks_[next].in[i];
        for (size_t i = 0; i < words; ++i) {
          const uint64_t in = b->use[i] | (b->out[i] & ~b->def[i]);
          changed |= in != b->in[i];
          b->in[i] = in;
        }
      }
    }
    const auto extend = [&](uint32_t r, uint32_t pc) {
      first[r] = std::min(first[r], pc);
      last[r] = std::max(last[r], pc);
    };
    for (const Block& b : blocks_) {
      for (size_t i = 0; i < words; ++i) {
        for (uint64_t bits = b.in[i]; bits != 0; bits &= bits - 1) extend(static_cast<uint32_t>(64 * i) + static_cast<uint32_t>(__builtin_ctzll(bits)), b.begin);
        for (uint64_t bits = b.out[i]; bits != 0; bits &= bits - 1) extend(static_cast<uint32_t>(64 * i) + static_cast<uint32_t>(__builtin_ctzll(bits)), b.end - 1);
      }
      for (uint32_t pc = b.begin; pc < b.end; ++pc) {
        each_use(pc, [&](uint32_t r) { extend(r, pc); });
        each_def(pc, [&](uint32_t r) { extend(r, pc); });
      }
    }
  }

 private:
  struct Block {
    uint32_t begin, end;
    std::vector<uint32_t> next;
    std::vector<uint64_t> in, out, use, def;
  };
  static bool test(const std::vector<uint64_t>& set, uint32_t r) { return set[r / 64] >> (r % 64) & 1; }
  static void set(std::vector<uint64_t>& set, uint32_t r) { set[r / 64] |= uint64_t{1} << (r % 64); }

  template <class F>
  void each_use(uint32_t pc, F f) const {
    const Inst& in = compiler_.program->code[pc];
    // A guarded write leaves lanes as they were, so it needs the old value too.
    const bool keeps = in.inout || in.guard != kNoOffset;
    for (uint32_t i = keeps ? 0 : in.defs; i < in.count; ++i)
      if (!(in.operands()[i] & 1)) f(in.operands()[i] >> 1);
    if (in.guard != kNoOffset) f(in.guard >> 1);
  }
  template <class F>
  void each_def(uint32_t pc, F f) const {
    const Inst& in = compiler_.program->code[pc];
    for (uint32_t i = 0; i < in.defs; ++i) f(in.operands()[i] >> 1);
  }

  void find_blocks() {
    const Program& program = *compiler_.program;
    std::vector<bool> starts(end_ - begin_ + 1, false);
    starts[0] = true;
    for (uint32_t pc = begin_; pc < end_; ++pc) {
      const Inst& in = program.code[pc];
      if (is_branch(in)) starts[in.target - begin_] = true;
      if (is_indexed_branch(in))
        for (const uint32_t target : program.jump_tables[static_cast<size_t>(in.imm)]) starts[target - begin_] = true;
      if (is_branch(in) || is_indexed_branch(in) || ends_flow(in)) starts[pc + 1 - begin_] = true;
    }
    std::vector<uint32_t> block_of(end_ - begin_, 0);
    for (uint32_t pc = begin_; pc < end_; ++pc) {
      if (starts[pc - begin_]) blocks_.push_back({pc, pc, {}, {}, {}, {}, {}});
      blocks_.back().end = pc + 1;
      block_of[pc - begin_] = static_cast<uint32_t>(blocks_.size() - 1);
    }
    for (Block& b : blocks_) {
      const Inst& in = program.code[b.end - 1];
      const bool always = in.guard == kNoOffset;
      if (is_branch(in)) b.next.push_back(block_of[in.target - begin_]);
      if (is_indexed_branch(in))
        for (const uint32_t target : program.jump_tables[static_cast<size_t>(in.imm)]) b.next.push_back(block_of[target - begin_]);
      const bool leaves = always && (is_branch(in) || is_indexed_branch(in) || ends_flow(in));
      if (!leaves && b.end < end_) b.next.push_back(block_of[b.end - begin_]);
    }
  }

  const Compiler& compiler_;
  uint32_t begin_, end_;
  std::vector<Block> blocks_;
};

// Registers that are written while nobody looks: accumulators of wgmma at its wait, and copies of them.
void pin_accumulators(Compiler& compiler) {
  bool changed = false;
  for (const Inst& in : compiler.program->code) {
    if (in.product == nullptr) continue;
    for (uint32_t i = 0; i < in.defs; ++i) compiler.registers[in.operands()[i] >> 1].pinned = true;
    changed = true;
  }
  while (changed) {
    changed = false;
    for (const Inst& in : compiler.program->code) {
      if (!is_move32(in) || (in.o[1] & 1) || !compiler.registers[in.o[1] >> 1].pinned) continue;
      changed |= !compiler.registers[in.o[0] >> 1].pinned;
      compiler.registers[in.o[0] >> 1].pinned = true;
    }
  }
}

}  // namespace

void allocate_rows(Compiler& compiler) {
  Program& program = *compiler.program;
  pin_accumulators(compiler);
  const size_t count = compiler.registers.size();
  std::vector<uint32_t> first(count, ~0u), last(count, 0);
  std::vector<uint32_t> bounds{0};
  for (const auto& callee : program.callees) bounds.push_back(callee.pc);
  bounds.push_back(static_cast<uint32_t>(program.code.size()));
  for (size_t i = 0; i + 1 < bounds.size(); ++i) Liveness(compiler, bounds[i], bounds[i + 1]).intervals(first, last);

  // Slots of each class, by first fit; what is pinned, or saved around recursive calls, keeps its own.
  std::vector<uint32_t> order, slot(count, 0);
  for (uint32_t r = 0; r < count; ++r) {
    auto& reg = compiler.registers[r];
    if (reg.callee >= 0 && program.callees[static_cast<size_t>(reg.callee)].recursive) reg.pinned = true;
    order.push_back(r);
  }
  std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return first[a] < first[b]; });
  uint32_t slots[4] = {};
  std::vector<uint32_t> free_slots[4];
  std::vector<std::pair<uint32_t, uint32_t>> active[4];  // heaps of (last, slot)
  int function = -1;
  for (const uint32_t r : order) {
    const auto& reg = compiler.registers[r];
    if (reg.callee != function) {  // a caller's registers live on during the call
      function = reg.callee;
      for (size_t c = 0; c < 4; ++c) free_slots[c].clear(), active[c].clear();
    }
    if (first[r] > last[r] && !reg.pinned) continue;  // never used
    const auto c = static_cast<size_t>(reg.row_class);
    if (reg.pinned) {
      slot[r] = slots[c]++;
      continue;
    }
    auto& heap = active[c];
    while (!heap.empty() && heap.front().first < first[r]) {
      std::pop_heap(heap.begin(), heap.end(), std::greater<>());
      free_slots[c].push_back(heap.back().second);
      heap.pop_back();
    }
    if (free_slots[c].empty()) {
      slot[r] = slots[c]++;
    } else {
      slot[r] = free_slots[c].back();
      free_slots[c].pop_back();
    }
    heap.emplace_back(last[r], slot[r]);
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }

  uint32_t base[4], end = 0;
  for (const RowClass c : {RowClass::k128, RowClass::k64, RowClass::k32, RowClass::kPred}) {
    base[static_cast<int>(c)] = end;
    end += slots[static_cast<int>(c)] * kBytes[static_cast<int>(c)];
  }
  program.register_bytes = (end + 63) / 64 * 64;
  std::vector<Offset> place(count);
  for (size_t r = 0; r < count; ++r) {
    const auto& reg = compiler.registers[r];
    place[r] = base[static_cast<int>(reg.row_class)] + slot[r] * kBytes[static_cast<int>(reg.row_class)];
    if (reg.callee >= 0 && program.callees[static_cast<size_t>(reg.callee)].recursive && reg.row_class != RowClass::k128)
      program.callees[static_cast<size_t>(reg.callee)].rows.emplace_back(
          place[r], static_cast<uint8_t>(reg.row_class == RowClass::kPred ? 0 : reg.row_class == RowClass::k32 ? 4 : 8));
  }
  const auto patch = [&](Offset& o) {
    if (o != kNoOffset && !(o & 1)) o = place[o >> 1];
  };
  for (Inst& in : program.code) {
    patch(in.guard);
    for (size_t i = 0; i < std::min<size_t>(in.count, kInlineOperands); ++i) patch(in.o[i]);
    if (in.list != nullptr)
      for (size_t i = 0; i < in.count; ++i) patch(const_cast<Offset*>(in.list)[i]);
  }
  for (auto& special : program.specials) patch(special.row);
}

}  // namespace ptxsim
