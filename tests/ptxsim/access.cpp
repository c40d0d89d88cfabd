#include "access.h"

#include <algorithm>
#include <cstring>

#include "checker.h"

namespace ptxsim {
namespace {

const char* verb(Access access) {
  switch (access) {
    case Access::kRead:
    case Access::kStrongRead: return "read";
    case Access::kWrite:
    case Access::kStrongWrite: return "write";
    default: return "atomic";
  }
}

std::string bytes_text(uint32_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

[[noreturn]] void misaligned(const Warp& w, const Inst& in, const char* space, const uint64_t* addresses, uint32_t mask,
                             uint32_t bytes, Access access) {
  uint32_t bad = 0;
  uint64_t first = 0;
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    if (addresses[lane] % bytes == 0) continue;
    if (bad == 0) first = addresses[lane];
    bad |= m & -m;
  }
  fault(w, in, Fault::kMisaligned, std::string(verb(access)) + " of " + bytes_text(bytes) + " at " + space + " address " +
        hex(first) + ", which is not aligned to " + std::to_string(bytes), bad);
}

[[noreturn]] void global_out_of_bounds(const Warp& w, const Inst& in, const uint64_t* addresses, uint32_t mask,
                                       uint32_t bytes, Access access) {
  uint32_t bad = 0;
  uint64_t first = 0;
  bool read_only = false;
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const Region* region = w.machine->memory.find(addresses[lane], bytes);
    if (region != nullptr && !(region->read_only && writes(access))) continue;
    if (bad == 0) first = addresses[lane], read_only = region != nullptr;
    bad |= m & -m;
  }
  const std::string what = std::string(verb(access)) + " of " + bytes_text(bytes) + " at global address " + hex(first) + ": ";
  fault(w, in, Fault::kOutOfBounds, what + (read_only ? w.machine->memory.name(first) + " is read-only"
                                                      : w.machine->memory.explain(first, bytes)), bad);
}

void resolve_global(Warp& w, const Inst& in, const uint64_t* addresses, uint32_t mask, uint32_t bytes, Access access,
                    unsigned char** pointers, const unsigned char* values) {
  uint64_t a[kLanes];
  const uint64_t some = addresses[__builtin_ctz(mask)];
  for (int i = 0; i < kLanes; ++i) a[i] = (mask >> i) & 1 ? addresses[i] : some;
  uint64_t low = some, high = some, all = 0;
  for (int i = 0; i < kLanes; ++i) {
    low = std::min(low, a[i]), high = std::max(high, a[i]);
    all |= a[i];
  }
  if (all & (bytes - 1)) misaligned(w, in, "global", addresses, mask, bytes, access);
  const Region* region = w.machine->memory.find(low, high - low + bytes);
  if (region == nullptr || (region->read_only && writes(access))) {
    for (uint32_t m = mask; m != 0; m &= m - 1) {
      const Region* one = w.machine->memory.find(a[__builtin_ctz(m)], bytes);
      if (one == nullptr || (one->read_only && writes(access)))
        global_out_of_bounds(w, in, addresses, mask, bytes, access);
    }
  }
  for (int i = 0; i < kLanes; ++i) pointers[i] = reinterpret_cast<unsigned char*>(a[i]);
  // Constants and parameters come from a cache of their own.
  const auto space = static_cast<Space>(in.space);
  if (space != Space::kConst && space != Space::kParam) count_global(*w.machine, a, mask, bytes);
  if (w.machine->checker != nullptr) w.machine->checker->global(w, in, a, mask, bytes, access, values);
}

void resolve_shared(Warp& w, const Inst& in, const uint64_t* addresses, uint32_t mask, uint32_t bytes, Access access,
                    unsigned char** pointers, const unsigned char* values) {
  Block& own = *w.block;
  uint64_t a[kLanes];
  const uint64_t some = addresses[__builtin_ctz(mask)] & 0xffffffffu;
  uint64_t low = some, high = some, all = 0;
  for (int i = 0; i < kLanes; ++i) {
    a[i] = (mask >> i) & 1 ? addresses[i] & 0xffffffffu : some;
    low = std::min(low, a[i]), high = std::max(high, a[i]);
    all |= a[i];
  }
  if (all & (bytes - 1)) misaligned(w, in, "shared", a, mask, bytes, access);
  if (low < kSharedBase || high + bytes > kSharedBase + uint64_t{own.shared_bytes}) {
    // Other blocks of the cluster, or an error.
    for (int i = 0; i < kLanes; ++i) {
      if (!((mask >> i) & 1)) continue;
      uint32_t address = static_cast<uint32_t>(a[i]);
      Block& owner = shared_owner(w, in, address, i);
      pointers[i] = shared_pointer(w, in, owner, address, bytes, 1u << i);
      a[i] = address;
      if (w.machine->checker != nullptr) {
        uint64_t one[kLanes];
        one[i] = address;
        w.machine->checker->shared(w, in, owner, one, 1u << i, bytes, access, values);
      }
    }
    unsigned char* const any = pointers[__builtin_ctz(mask)];
    for (int i = 0; i < kLanes; ++i)
      if (!((mask >> i) & 1)) pointers[i] = any;
    return;
  }
  for (int i = 0; i < kLanes; ++i) pointers[i] = own.shared + (a[i] - kSharedBase);
  count_shared(*w.machine, a, mask, bytes);
  if (w.machine->checker != nullptr) w.machine->checker->shared(w, in, own, a, mask, bytes, access, values);
}

void resolve_local(Warp& w, const Inst& in, const uint64_t* addresses, uint32_t mask, uint32_t bytes, Access access,
                   unsigned char** pointers) {
  unsigned char* any = nullptr;
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    const uint64_t at = addresses[lane] - kLocalBase;
    const size_t size = w.local[lane].size();
    if (at > size || bytes > size - at)
      fault(w, in, Fault::kOutOfBounds, std::string(verb(access)) + " of " + bytes_text(bytes) + " at local address " +
            hex(addresses[lane]) + (addresses[lane] < kLocalBase ? ", below local memory" : ", " +
            std::to_string(at + bytes - size) + " bytes past the end of the function's local memory"), m & -m);
    if (addresses[lane] % bytes != 0) misaligned(w, in, "local", addresses, m & -m, bytes, access);
    if (w.machine->checker != nullptr) {
      unsigned char* known = w.local_known[lane].data() + at;
      if (writes(access)) std::memset(known, 1, bytes);
      else if (std::find(known, known + bytes, 0) != known + bytes)
        fault(w, in, Fault::kUninitialized, "read of local address " + hex(addresses[lane]) + " before it was written", m & -m);
    }
    pointers[lane] = any = w.local[lane].data() + at;
  }
  for (int i = 0; i < kLanes; ++i)
    if (!((mask >> i) & 1)) pointers[i] = any;
}

}  // namespace

void resolve(Warp& w, const Inst& in, Space space, const uint64_t* addresses, uint32_t mask, uint32_t bytes,
             Access access, unsigned char** pointers, const unsigned char* values) {
  switch (space) {
    case Space::kGlobal:
    case Space::kConst:
    case Space::kParam: return resolve_global(w, in, addresses, mask, bytes, access, pointers, values);
    case Space::kShared:
    case Space::kSharedCluster: return resolve_shared(w, in, addresses, mask, bytes, access, pointers, values);
    case Space::kLocal: return resolve_local(w, in, addresses, mask, bytes, access, pointers);
    default: break;
  }
  uint32_t shared = 0, local = 0;
  for (uint32_t m = mask; m != 0; m &= m - 1) {
    const uint64_t window = addresses[__builtin_ctz(m)] >> 56;
    if (window == kSharedWindow >> 56) shared |= m & -m;
    else if (window == kLocalWindow >> 56) local |= m & -m;
  }
  if (shared == 0 && local == 0) return resolve_global(w, in, addresses, mask, bytes, access, pointers, values);
  if (shared == mask) return resolve_shared(w, in, addresses, mask, bytes, access, pointers, values);
  uint64_t a[kLanes];
  for (int i = 0; i < kLanes; ++i) a[i] = addresses[i] & ~(kSharedWindow | kLocalWindow);
  if (local == mask) return resolve_local(w, in, a, mask, bytes, access, pointers);
  unsigned char* part[kLanes];
  const auto take = [&](uint32_t lanes) {
    for (uint32_t m = lanes; m != 0; m &= m - 1) pointers[__builtin_ctz(m)] = part[__builtin_ctz(m)];
  };
  if (local != 0) resolve_local(w, in, a, local, bytes, access, part), take(local);
  if (shared != 0) resolve_shared(w, in, a, shared, bytes, access, part, values), take(shared);
  const uint32_t global = mask & ~local & ~shared;
  if (global != 0) resolve_global(w, in, addresses, global, bytes, access, part, values), take(global);
  for (int i = 0; i < kLanes; ++i)
    if (!((mask >> i) & 1)) pointers[i] = pointers[__builtin_ctz(mask)];
}

void gather_addresses(const Warp& w, const Inst& in, int operand, uint64_t* addresses) {
  const auto imm = static_cast<uint64_t>(in.imm);
  if (in.width == 64) {
    const uint64_t* base = w.row<uint64_t>(in.operands()[operand]);
    if (in.flags & kFrameAddress) {
      for (int i = 0; i < kLanes; ++i) addresses[i] = base[i] + w.frame[i] + imm;
    } else {
      for (int i = 0; i < kLanes; ++i) addresses[i] = base[i] + imm;
    }
  } else {
    const uint32_t* base = w.row<uint32_t>(in.operands()[operand]);
    for (int i = 0; i < kLanes; ++i) addresses[i] = base[i] + static_cast<uint32_t>(imm);
  }
}

unsigned char* host_pointer(Warp& w, const Inst& in, uint64_t address, uint32_t bytes, int lane) {
  const uint32_t mask = 1u << lane;
  if (address >> 56 == kSharedWindow >> 56) {
    uint32_t low = static_cast<uint32_t>(address);
    Block& owner = shared_owner(w, in, low, lane);
    return shared_pointer(w, in, owner, low, bytes, mask);
  }
  uint64_t a[kLanes] = {};
  a[lane] = address;
  if (address >> 56 == kLocalWindow >> 56) {
    unsigned char* pointers[kLanes];
    a[lane] &= ~kLocalWindow;
    resolve_local(w, in, a, mask, bytes, Access::kRead, pointers);
    return pointers[lane];
  }
  if (w.machine->memory.find(address, bytes) == nullptr) global_out_of_bounds(w, in, a, mask, bytes, Access::kRead);
  return reinterpret_cast<unsigned char*>(address);
}

Block& shared_owner(const Warp& w, const Inst& in, uint32_t& address, int lane) {
  const uint32_t rank = address >> kRankShift;
  if (rank == 0) return *w.block;
  if (w.block->cluster == nullptr || rank - 1 >= w.block->cluster->blocks.size())
    fault(w, in, Fault::kOutOfBounds, "shared address " + hex(address) + " is in no block of the cluster", 1u << lane);
  address &= (1u << kRankShift) - 1;
  Block& owner = *w.block->cluster->blocks[rank - 1];
  if (owner.live == 0)
    fault(w, in, Fault::kOutOfBounds, "shared memory of " + owner.name() + ", which has exited", 1u << lane);
  return owner;
}

unsigned char* shared_pointer(Warp& w, const Inst& in, Block& owner, uint32_t address, uint32_t bytes, uint32_t lanes) {
  const uint64_t end = kSharedBase + uint64_t{owner.shared_bytes};
  if (address < kSharedBase || uint64_t{address} + bytes > end) {
    const std::string size = " (" + std::to_string(owner.shared_bytes) + " bytes)";
    fault(w, in, Fault::kOutOfBounds, "access of " + bytes_text(bytes) + " at shared address " + hex(address) + ": " +
          (address < kSharedBase ? "below shared memory" + size
                                 : std::to_string(address + bytes - end) + " bytes past the end of shared memory" + size), lanes);
  }
  return owner.shared + (address - kSharedBase);
}

std::string shared_name(const Warp& w, uint32_t address) {
  const Program& program = *w.machine->program;
  for (const Symbol& s : program.shared)
    if (address >= s.offset && address < static_cast<uint64_t>(s.offset) + s.bytes)
      return "`" + s.name + "` + " + std::to_string(address - s.offset);
  if (address >= kSharedBase + program.dynamic_offset)
    return "dynamic shared memory + " + std::to_string(address - kSharedBase - program.dynamic_offset);
  return "shared memory + " + std::to_string(address - kSharedBase);
}

void count_global(Machine& m, const uint64_t* a, uint32_t mask, uint32_t bytes) {
  ++m.counters.global_requests;
  uint64_t low = a[0] >> 5, high = low;
  for (int i = 0; i < kLanes; ++i) low = std::min(low, a[i] >> 5), high = std::max(high, (a[i] + bytes - 1) >> 5);
  if (high - low < 64) {
    uint64_t seen = 0;
    for (int i = 0; i < kLanes; ++i) seen |= uint64_t{1} << ((a[i] >> 5) - low) | uint64_t{1} << (((a[i] + bytes - 1) >> 5) - low);
    m.counters.global_sectors += __builtin_popcountll(seen);
    return;
  }
  uint64_t sectors[2 * kLanes];
  int count = 0;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    sectors[count++] = a[i] >> 5;
    if ((a[i] + bytes - 1) >> 5 != a[i] >> 5) sectors[count++] = (a[i] + bytes - 1) >> 5;
  }
  std::sort(sectors, sectors + count);
  m.counters.global_sectors += std::unique(sectors, sectors + count) - sectors;
}

// Lanes go in groups that move at most 128 bytes; in each the bank with most distinct words decides.
void count_shared(Machine& m, const uint64_t* a, uint32_t mask, uint32_t bytes) {
  ++m.counters.shared_requests;
  const uint32_t words = std::max(1u, bytes / 4), lanes = std::min(32u, 32 / words);
  int64_t waves = 0;
  for (uint32_t first = 0; first < kLanes; first += lanes) {
    const uint32_t group = lanes == 32 ? mask : (mask >> first) & ((1u << lanes) - 1);
    if (group == 0) continue;
    uint32_t bank_seen = 0;
    uint64_t bank_word[32];
    uint8_t distinct[32];
    uint64_t more[32][32];
    int most = 1;
    for (uint32_t rest = group; rest != 0; rest &= rest - 1) {
      const uint64_t word = a[first + static_cast<uint32_t>(__builtin_ctz(rest))] >> 2;
      for (uint32_t k = 0; k < words; ++k) {
        const uint32_t bank = (word + k) & 31;
        if (!((bank_seen >> bank) & 1)) {
          bank_seen |= 1u << bank;
          bank_word[bank] = word + k;
          distinct[bank] = 1;
        } else if (bank_word[bank] != word + k) {
          int j = 1;
          while (j < distinct[bank] && more[bank][j] != word + k) ++j;
          if (j == distinct[bank] && j < 32) more[bank][j] = word + k, ++distinct[bank];
          most = std::max<int>(most, distinct[bank]);
        }
      }
    }
    waves += most;
  }
  m.counters.shared_wavefronts += waves;
}

}  // namespace ptxsim
