// wgmma: four warps multiply 64 rows, A from shared memory or registers, B from shared memory, both described by 64-bit
// matrix descriptors. Warp w of the four owns rows 16 w to 16 w + 15, so each computes its own part when it gets there.
//
// The product is computed at issue, but accumulators read as NaN until wgmma.wait_group: a missing wait shows at once.
#include <cstring>
#include <map>

#include "access.h"
#include "checker.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "opcodes.h"
#include "tensor_map.h"
#include "wgmma_pending.h"

namespace ptxsim {

struct WgmmaState {
  struct Pending {
    uint32_t value[kLanes];
    uint64_t group;
  };
  std::map<Offset, Pending> registers;
  uint64_t committed = 0;
  std::map<uint64_t, uint32_t> times;  // of groups, for the checker
  bool open = false;
};

void move_pending(Warp& w, Offset from, Offset to) {
  if (w.wgmma == nullptr) return;
  const auto it = w.wgmma->registers.find(from);
  if (it == w.wgmma->registers.end()) w.wgmma->registers.erase(to);
  else w.wgmma->registers[to] = it->second;
}

namespace {

constexpr uint32_t kPoisoned = 0x7fffdead;  // NaN as float and as two halves

struct Descriptor {
  uint32_t start, lbo, sbo, base_offset;
  int mode;  // 0 none, 1 128B, 2 64B, 3 32B

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4), lbo(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        sbo(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4), base_offset(static_cast<uint32_t>(bits >> 49 & 7)),
        mode(static_cast<int>(bits >> 62)) {}

  // Where 16 bytes along k (K-major) or along m or n (MN-major) start.
  uint32_t k_major(uint32_t mn, uint32_t chunk) const {
    const uint32_t w = width();
    return place(mn % 8 * 16 * w + mn / 8 * sbo + chunk * (mode != 0 ? 16 : lbo));
  }
  uint32_t mn_major(uint32_t mn, uint32_t k) const {  // of 16-bit elements; mn a multiple of 8
    const uint32_t w = width();
    if (mode == 0) return place(mn / 8 * sbo + k % 8 * 16 + k / 8 * lbo);
    return place(mn / 8 % w * 16 + mn / (8 * w) * lbo + k % 8 * 16 * w + k / 8 * sbo);
  }

 private:
  uint32_t width() const { return mode == 1 ? 8 : mode == 2 ? 4 : mode == 3 ? 2 : 1; }
  uint32_t place(uint32_t offset) const {
    return swizzled(start + offset, mode == 1 ? 3 : mode == 2 ? 2 : mode == 3 ? 1 : 0);
  }
};

// `count` rows from `first` on, 32 bytes along k each.
void read_rows(Warp& w, const Inst& in, uint64_t bits, uint32_t first, uint32_t count, bool mn_major, unsigned char* out) {
  const Descriptor d(bits);
  if (d.base_offset != 0) fault(w, in, Fault::kUnknownInstruction, "matrix descriptors with a base offset are not implemented", w.mask);
  Checker* checker = w.machine->checker.get();
  const auto read = [&](uint32_t address) -> const unsigned char* {
    const unsigned char* p = shared_pointer(w, in, *w.block, address, 16, w.mask);
    if (checker != nullptr) checker->shared_range(w, in, *w.block, address, 16, 0, false, Checker::Agent::kMatrix);
    return p;
  };
  if (!mn_major) {
    for (uint32_t i = 0; i < count; ++i)
      for (uint32_t chunk = 0; chunk < 2; ++chunk) std::memcpy(out + 32 * i + 16 * chunk, read(d.k_major(first + i, chunk)), 16);
    return;
  }
  for (uint32_t i = 0; i < count; i += 8)
    for (uint32_t k = 0; k < 16; ++k) {
      const unsigned char* p = read(d.mn_major(first + i, k));
      for (uint32_t j = 0; j < 8; ++j) std::memcpy(out + 32 * (i + j) + 2 * k, p + 2 * j, 2);
    }
}

uint64_t uniform(const Warp& w, const Inst& in, Offset row) {
  const uint64_t* d = w.row<uint64_t>(row);
  for (int i = 1; i < kLanes; ++i)
    if (d[i] != d[0]) fault(w, in, Fault::kDivergence, "its matrix descriptor differs between lanes", 1u << i);
  return d[0];
}

// Column-wise lane layout of accumulator register e: row g + 8 (e / 2 % 2), column 8 (e / 4) + 2 t + e % 2.
int row_of(int e, int lane) { return lane / 4 + 8 * ((e >> 1) & 1); }
int col_of(int e, int lane) { return 8 * (e / 4) + 2 * (lane % 4) + (e & 1); }

// o: D, A (4 registers or a descriptor), B, scale-d. imm: n; vec: registers of D; kind: type of D; size, width: types of A
// and B; flags bits: 0 A in registers, 1 negate A, 2 negate B, 3 A MN-major, 4 B MN-major, 5 scale-d negated, 6 satfinite.
void wgmma(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  if (w.wgmma == nullptr) w.wgmma = std::make_shared<WgmmaState>();
  WgmmaState& state = *w.wgmma;
  const Offset* o = in.operands();
  const int n = static_cast<int>(in.imm), regs = static_cast<int>(in.imm2);
  const auto a_type = static_cast<Type>(in.size), d_type = static_cast<Type>(in.kind);
  alignas(64) unsigned char a[16 * 32], b[256 * 32];
  int at = regs;
  if (in.flags & 1) {
    for (int r = 0; r < 4; ++r) {  // row g + 8 (r % 2), bytes 4 t + 16 (r / 2)
      const uint32_t* s = w.row<uint32_t>(o[at + r]);
      for (int l = 0; l < kLanes; ++l) std::memcpy(a + 32 * (l / 4 + 8 * (r & 1)) + 4 * (l % 4) + 16 * (r >> 1), s + l, 4);
    }
    at += 4;
  } else {
    read_rows(w, in, uniform(w, in, o[at]), 16 * static_cast<uint32_t>(w.index % 4), 16, in.flags & 8, a);
    ++at;
  }
  read_rows(w, in, uniform(w, in, o[at]), 0, static_cast<uint32_t>(n), in.flags & 16, b);
  const uint32_t scale = w.pred(o[at + 1]) ^ (in.flags & 32 ? kFull : 0);
  if (scale != 0 && scale != kFull) fault(w, in, Fault::kDivergence, "scale-d differs between lanes", scale);

  alignas(64) float d[16 * 256];
  const auto before = [&](int r) -> const uint32_t* {
    const auto it = state.registers.find(o[r]);
    return it != state.registers.end() ? it->second.value : w.row<uint32_t>(o[r]);
  };
  const bool integer = d_type == Type::kS32, half = d_type == Type::kF16;
  std::memset(d, 0, sizeof(float) * static_cast<size_t>(16 * n));
  const float sign = ((in.flags >> 1) ^ (in.flags >> 2)) & 1 ? -1.0f : 1.0f;
  if (scale != 0 && !integer) {
    for (int r = 0; r < regs; ++r) {
      const uint32_t* v = before(r);
      for (int l = 0; l < kLanes; ++l) {
        if (half) {
          d[row_of(2 * r, l) * n + col_of(2 * r, l)] = sign * isa_base::half_to_float(v[l] & 0xffff);
          d[row_of(2 * r + 1, l) * n + col_of(2 * r + 1, l)] = sign * isa_base::half_to_float(v[l] >> 16);
        } else {
          d[row_of(r, l) * n + col_of(r, l)] = sign * isa_base::as_float(v[l]);
        }
      }
    }
  }
  in.product(a, b, n, d);
  for (int r = 0; r < regs; ++r) {
    WgmmaState::Pending pending;
    pending.group = state.committed;
    const uint32_t* v = integer && scale != 0 ? before(r) : nullptr;
    for (int l = 0; l < kLanes; ++l) {
      if (half) {
        pending.value[l] = isa_base::float_to_half(sign * d[row_of(2 * r, l) * n + col_of(2 * r, l)]) |
                           isa_base::float_to_half(sign * d[row_of(2 * r + 1, l) * n + col_of(2 * r + 1, l)]) << 16;
      } else if (integer) {
        const int64_t sum = static_cast<int64_t>(d[row_of(r, l) * n + col_of(r, l)]) + (v != nullptr ? static_cast<int32_t>(v[l]) : 0);
        const int64_t kept = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
        pending.value[l] = static_cast<uint32_t>(in.flags & 64 ? kept : sum);
      } else {
        pending.value[l] = isa_base::as_bits(sign * d[row_of(r, l) * n + col_of(r, l)]);
      }
    }
    state.registers[o[r]] = pending;
    uint32_t* row = w.row<uint32_t>(o[r]);
    for (int l = 0; l < kLanes; ++l) row[l] = kPoisoned;
  }
  w.pending_wgmma = true;
  const int element = bits_of(a_type) / 8;
  w.machine->counters.mma_flops += 2LL * 16 * n * (32 / (a_type == Type::kTF32 ? 4 : element));
}

void commit(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  if (w.wgmma == nullptr) w.wgmma = std::make_shared<WgmmaState>();
  if (w.machine->checker != nullptr) w.wgmma->times[w.wgmma->committed] = w.machine->checker->matrix_commit(w);
  ++w.wgmma->committed;
}

void wait(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  if (w.wgmma == nullptr) return;
  WgmmaState& state = *w.wgmma;
  const auto keep = static_cast<uint64_t>(in.imm);
  if (state.committed <= keep) return;
  const uint64_t done = state.committed - keep;  // groups before this
  for (auto it = state.registers.begin(); it != state.registers.end();) {
    if (it->second.group >= done) {
      ++it;
      continue;
    }
    std::memcpy(w.row<uint32_t>(it->first), it->second.value, sizeof it->second.value);
    it = state.registers.erase(it);
  }
  w.pending_wgmma = !state.registers.empty();
  if (w.machine->checker == nullptr) return;
  uint32_t time = 0;
  while (!state.times.empty() && state.times.begin()->first < done) {
    time = state.times.begin()->second;
    state.times.erase(state.times.begin());
  }
  if (time != 0) w.machine->checker->matrix_done(w, time);
}

void wgmma_resolver(Build& b) {
  if (b.take("fence")) {
    b.take("sync"), b.take("aligned");
    b.in.fn = [](Warp& w, const Inst& in) { aligned_here(w, in, true); };
    return;
  }
  if (b.take("commit_group")) {
    b.take("sync"), b.take("aligned");
    b.in.fn = commit;
    return;
  }
  if (b.take("wait_group")) {
    b.take("sync"), b.take("aligned");
    b.operands(1, 1);
    b.in.imm = static_cast<int64_t>(b.ops[0].number.bits);
    b.in.fn = wait;
    return;
  }
  if (!b.take("mma_async")) return;
  b.take("sync"), b.take("aligned");
  int m = 0, n = 0, k = 0;
  for (size_t i = 0; i < b.mods.size(); ++i) {
    const std::string mod(b.mods[i]);
    if (std::sscanf(mod.c_str(), "m%dn%dk%d", &m, &n, &k) != 3) continue;
    b.mods.erase(b.mods.begin() + static_cast<long>(i));
    break;
  }
  if (m != 64 || n < 8 || n > 256 || n % 8 != 0) b.fail("its shape does not exist");
  if (b.take("satfinite")) b.in.flags |= 64;
  const Type d = b.need_type(), a = b.need_type(), bt = b.need_type();
  const int bits = a == Type::kTF32 ? 32 : bits_of(a);
  if (k * bits != 256) b.fail("its shape does not fit its types");
  const int regs = d == Type::kF16 ? n / 4 : n / 2;
  b.operands(4, 9);
  if (b.ops[0].parts.size() != static_cast<size_t>(regs)) b.fail("it needs " + std::to_string(regs) + " accumulator registers");
  for (const Operand& part : b.ops[0].parts) b.dst(part, Type::kB32);
  b.in.inout = true;
  if (b.ops[1].kind == Operand::Kind::kVector) {
    if (b.ops[1].parts.size() != 4) b.fail("A needs 4 registers");
    for (const Operand& part : b.ops[1].parts) b.src(part, Type::kB32);
    b.in.flags |= 1;
  } else {
    b.src(1, Type::kB64);
  }
  b.src(2, Type::kB64);
  b.src_pred(b.ops[3]);
  if (b.ops[3].negated) b.in.flags |= 32;
  const auto immediate = [&](size_t i) { return i < b.ops.size() ? static_cast<int64_t>(b.ops[i].number.bits) : int64_t{0}; };
  const bool integer = d == Type::kS32;
  if (!integer && immediate(4) == -1) b.in.flags |= 2;
  if (!integer && immediate(5) == -1) b.in.flags |= 4;
  size_t at = 6;
  if (!integer && bits == 16) {
    if (!(b.in.flags & 1) && b.ops.size() > 7 && immediate(at++) != 0) b.in.flags |= 8;
    if (at < b.ops.size() && immediate(at) != 0) b.in.flags |= 16;
  }
  b.in.imm = n;
  b.in.imm2 = regs;
  b.in.kind = static_cast<uint8_t>(d);
  b.in.size = static_cast<uint8_t>(a);
  b.in.width = static_cast<uint8_t>(bt);
  b.in.product = host_has_avx2() ? isa_avx2::wgmma_product(a, bt) : isa_base::wgmma_product(a, bt);
  if (b.in.product != nullptr && (d == Type::kF32 || d == Type::kF16 || d == Type::kS32)) b.in.fn = wgmma;
}

}  // namespace

void add_wgmma(OpcodeTable& table) { table["wgmma"] = wgmma_resolver; }

}  // namespace ptxsim
