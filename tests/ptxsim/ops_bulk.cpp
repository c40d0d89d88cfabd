// cp.async.bulk: copies of whole ranges and of boxes of tensors (TMA), and tensor maps made in kernels.
#include <algorithm>
#include <array>
#include <cstring>
#include <deque>

#include "access.h"
#include "async.h"
#include "compiler_impl.h"
#include "lanes.h"
#include "mbarrier.h"
#include "opcodes.h"
#include "tensor_map.h"

namespace ptxsim {

// Stores of a lane that wait for cp.async.bulk.wait_group.
struct BulkState {
  struct Store {
    std::shared_ptr<PendingOp> op;
    uint64_t ticket;
    uint32_t address, bytes;
  };
  struct Lane {
    std::vector<Store> open;
    std::deque<std::vector<Store>> groups;
  };
  Lane lanes[kLanes];
  uint64_t tickets = 0;
};

namespace {

// Inst::kind.
enum Form : uint8_t { kLoad, kStore, kShared, kTensorLoad, kTensorStore };
// Inst::size of reductions; 0: a plain copy.
enum Reduce : uint8_t { kCopy, kAddF32, kAddF16, kAddBF16, kAddU32, kAddU64, kAddF64, kMinS32, kMaxS32, kMinU32, kMaxU32, kAnd32, kOr32, kXor32 };

template <class T, class F>
void combine(unsigned char* to, const unsigned char* from, uint64_t bytes, F f) {
  for (uint64_t i = 0; i + sizeof(T) <= bytes; i += sizeof(T)) {
    T a, b;
    std::memcpy(&a, to + i, sizeof a), std::memcpy(&b, from + i, sizeof b);
    a = f(a, b);
    std::memcpy(to + i, &a, sizeof a);
  }
}

constexpr uint8_t kByType = 200;  // an addition of the tensor's element type

uint8_t type_of_tensor(const Warp& w, const Inst& in, const TensorMapData& map, int lane) {
  switch (map.element_type) {  // CUtensorMapDataType
    case 2:
    case 3: return kAddU32;
    case 4:
    case 5: return kAddU64;
    case 6: return kAddF16;
    case 8: return kAddF64;
    case 9: return kAddBF16;
    default: break;
  }
  if (map.element_bytes == 4) return kAddF32;
  fault(w, in, Fault::kUnknownInstruction, "a reduction into a tensor whose element type is not known", 1u << lane);
}

void put(uint8_t reduce, unsigned char* to, const unsigned char* from, uint64_t bytes) {
  using namespace isa_base;
  switch (reduce) {
    case kCopy: std::memcpy(to, from, bytes); break;
    case kAddF32: combine<float>(to, from, bytes, [](float a, float b) { return a + b; }); break;
    case kAddF64: combine<double>(to, from, bytes, [](double a, double b) { return a + b; }); break;
    case kAddF16:
      combine<uint16_t>(to, from, bytes, [](uint16_t a, uint16_t b) { return static_cast<uint16_t>(float_to_half(half_to_float(a) + half_to_float(b))); });
      break;
    case kAddBF16:
      combine<uint16_t>(to, from, bytes, [](uint16_t a, uint16_t b) { return static_cast<uint16_t>(float_to_bf16(bf16_to_float(a) + bf16_to_float(b))); });
      break;
    case kAddU32: combine<uint32_t>(to, from, bytes, [](uint32_t a, uint32_t b) { return a + b; }); break;
    case kAddU64: combine<uint64_t>(to, from, bytes, [](uint64_t a, uint64_t b) { return a + b; }); break;
    case kMinS32: combine<int32_t>(to, from, bytes, [](int32_t a, int32_t b) { return std::min(a, b); }); break;
    case kMaxS32: combine<int32_t>(to, from, bytes, [](int32_t a, int32_t b) { return std::max(a, b); }); break;
    case kMinU32: combine<uint32_t>(to, from, bytes, [](uint32_t a, uint32_t b) { return std::min(a, b); }); break;
    case kMaxU32: combine<uint32_t>(to, from, bytes, [](uint32_t a, uint32_t b) { return std::max(a, b); }); break;
    case kAnd32: combine<uint32_t>(to, from, bytes, [](uint32_t a, uint32_t b) { return a & b; }); break;
    case kOr32: combine<uint32_t>(to, from, bytes, [](uint32_t a, uint32_t b) { return a | b; }); break;
    default: combine<uint32_t>(to, from, bytes, [](uint32_t a, uint32_t b) { return a ^ b; }); break;
  }
}

// Rows of a box: f(offset in the dense box, global address of the row's first element, elements before, inside, after
// the tensor). Elements of a row outside the tensor in an outer dimension count as `before`.
template <class F>
void each_row(const TensorMapData& map, const std::array<int32_t, 5>& at, F f) {
  uint64_t rows = 1;
  for (int d = 1; d < map.rank; ++d) rows *= map.box[d];
  const int64_t width = map.box[0], first = std::max<int64_t>(0, -int64_t{at[0]});
  const int64_t last = std::clamp<int64_t>(static_cast<int64_t>(map.sizes[0]) - at[0], 0, width);
  for (uint64_t row = 0; row < rows; ++row) {
    uint64_t rest = row;
    int64_t address = static_cast<int64_t>(map.base) + int64_t{at[0]} * map.element_bytes;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t c = at[static_cast<size_t>(d)] + static_cast<int64_t>(rest % map.box[d]);
      rest /= map.box[d];
      inside &= c >= 0 && c < static_cast<int64_t>(map.sizes[d]);
      address += c * static_cast<int64_t>(map.strides[d - 1]);
    }
    const int64_t begin = std::min(first, width), end = std::max(begin, last);
    f(row * static_cast<uint64_t>(width), address, inside ? begin : width, inside ? end : width);
  }
}

struct Request {
  uint32_t shared = 0;  // own-window address of the shared side
  uint64_t global = 0;
  uint32_t bytes = 0;
  TensorMapData map{};
  std::array<int32_t, 5> at{};
};

void read_map(Warp& w, const Inst& in, Request& r, uint64_t address, int lane) {
  std::memcpy(&r.map, host_pointer(w, in, address, 128, lane), sizeof r.map);
  if (r.map.magic != kTensorMapMagic) fault(w, in, Fault::kBarrier, "no tensor map at " + hex(address), 1u << lane);
  if (address % 64 != 0) fault(w, in, Fault::kMisaligned, "tensor map at " + hex(address) + ", which is not aligned to 64", 1u << lane);
  if (const std::string error = check_tensor_map(r.map); !error.empty()) fault(w, in, Fault::kBarrier, "tensor map: " + error, 1u << lane);
  if (r.map.rank != in.vec)
    fault(w, in, Fault::kBarrier, "a tensor map of rank " + std::to_string(r.map.rank) + " in an instruction of rank " + std::to_string(in.vec), 1u << lane);
  r.bytes = r.map.element_bytes;
  for (int d = 0; d < r.map.rank; ++d) r.bytes *= r.map.box[d];
}

void check_global(Warp& w, const Inst& in, uint64_t address, uint64_t bytes, int lane, bool write) {
  const Region* region = w.machine->memory.find(address, bytes);
  if (region == nullptr || (write && region->read_only))
    fault(w, in, Fault::kOutOfBounds, std::string(write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes at global address " +
          hex(address) + ": " + w.machine->memory.explain(address, bytes), 1u << lane);
}

void check_rows(Warp& w, const Inst& in, const Request& r, int lane, bool write) {
  Checker* checker = w.machine->checker.get();
  each_row(r.map, r.at, [&](uint64_t, int64_t address, int64_t begin, int64_t end) {
    if (begin >= end) return;
    const uint64_t first = static_cast<uint64_t>(address + begin * r.map.element_bytes), bytes = static_cast<uint64_t>(end - begin) * r.map.element_bytes;
    check_global(w, in, first, bytes, lane, write);
    if (checker != nullptr && in.size == kCopy) checker->global_range(w, in, first, bytes, lane, write, Checker::Agent::kAsyncProxy);
  });
}

void land_tensor(const Request& r, unsigned char* shared) {
  const uint32_t es = r.map.element_bytes;
  std::vector<unsigned char> row(size_t{r.map.box[0]} * es);
  each_row(r.map, r.at, [&](uint64_t offset, int64_t address, int64_t begin, int64_t end) {
    std::fill(row.begin(), row.end(), static_cast<unsigned char>(r.map.nan_fill ? 0xff : 0));
    if (r.map.nan_fill && es == 2) {
      for (size_t i = 1; i < row.size(); i += 2) row[i] = 0x7f;
    } else if (r.map.nan_fill) {
      for (size_t i = es - 1; i < row.size(); i += es) row[i] = 0x7f;
    }
    if (begin < end)
      std::memcpy(row.data() + begin * es, reinterpret_cast<const unsigned char*>(address + begin * static_cast<int64_t>(es)),
                  static_cast<size_t>(end - begin) * es);
    const uint32_t first = r.shared + static_cast<uint32_t>(offset) * es;
    for (uint32_t i = 0; i < row.size(); i += 16)
      std::memcpy(shared + (swizzled(first + i, r.map.swizzle) - kSharedBase), row.data() + i, 16);
  });
}

void land_tensor_store(const Request& r, const unsigned char* shared, uint8_t reduce) {
  const uint32_t es = r.map.element_bytes;
  std::vector<unsigned char> row(size_t{r.map.box[0]} * es);
  each_row(r.map, r.at, [&](uint64_t offset, int64_t address, int64_t begin, int64_t end) {
    const uint32_t first = r.shared + static_cast<uint32_t>(offset) * es;
    for (uint32_t i = 0; i < row.size(); i += 16)
      std::memcpy(row.data() + i, shared + (swizzled(first + i, r.map.swizzle) - kSharedBase), 16);
    if (begin < end)
      put(reduce, reinterpret_cast<unsigned char*>(address + begin * static_cast<int64_t>(es)), row.data() + begin * es,
          static_cast<uint64_t>(end - begin) * es);
  });
}

uint64_t operand64(const Warp& w, Offset row, bool wide, int lane) {
  return wide ? w.row<uint64_t>(row)[lane] : w.row<uint32_t>(row)[lane];
}

// o: first address, second address, third address (mbarrier) or zero, size, multicast mask, coordinates.
// imm, imm2, target: constant parts of the addresses; flags bits 0-2: they are 64 bits wide.
void bulk(Warp& w, const Inst& in) {
  const Offset* o = in.operands();
  Machine* m = w.machine;
  Checker* checker = m->checker.get();
  for (uint32_t lanes = w.mask; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const uint32_t bit = lanes & -lanes;
    const uint64_t first = operand64(w, o[0], in.flags & 1, lane) + static_cast<uint64_t>(in.imm);
    const uint64_t second = operand64(w, o[1], in.flags & 2, lane) + static_cast<uint64_t>(in.imm2);
    auto r = std::make_shared<Request>();
    for (int d = 0; d < in.vec; ++d) r->at[static_cast<size_t>(d)] = static_cast<int32_t>(w.row<uint32_t>(o[5 + d])[lane]);
    const bool tensor = in.kind == kTensorLoad || in.kind == kTensorStore, store = in.kind == kStore || in.kind == kTensorStore;
    if (tensor) read_map(w, in, *r, store ? first : second, lane);
    else r->bytes = w.row<uint32_t>(o[3])[lane];
    r->shared = static_cast<uint32_t>(store || in.kind == kShared ? second : first);
    r->global = store ? first : second;
    if (!tensor && (r->bytes % 16 != 0 || first % 16 != 0 || second % 16 != 0))
      fault(w, in, Fault::kMisaligned, "a bulk copy of " + std::to_string(r->bytes) + " bytes from " + hex(second) + " to " + hex(first) +
            "; all three must be multiples of 16", bit);
    if (tensor && r->shared % 128 != 0)
      fault(w, in, Fault::kMisaligned, "shared address " + hex(r->shared) + " of a box, which is not aligned to 128", bit);

    if (store) {
      Block& owner = shared_owner(w, in, r->shared, lane);
      unsigned char* base = owner.shared;
      shared_pointer(w, in, owner, r->shared, r->bytes, bit);
      if (tensor) check_rows(w, in, *r, lane, true);
      else check_global(w, in, r->global, r->bytes, lane, true);
      if (w.bulk == nullptr) w.bulk = std::make_shared<BulkState>();
      const uint64_t ticket = (uint64_t(w.index) * kLanes + static_cast<uint64_t>(lane)) << 32 | ++w.bulk->tickets;
      if (checker != nullptr) {
        checker->shared_range(w, in, owner, r->shared, r->bytes, lane, false, Checker::Agent::kAsyncProxy);
        if (!tensor && in.size == kCopy) checker->global_range(w, in, r->global, r->bytes, lane, true, Checker::Agent::kAsyncProxy);
        checker->reading(owner, r->shared, r->bytes, w, in, ticket);
      }
      const uint8_t reduce = in.size == kByType ? type_of_tensor(w, in, r->map, lane) : in.size;
      auto op = start_operation(*m, [=] {
        if (tensor) land_tensor_store(*r, base, reduce);
        else put(reduce, reinterpret_cast<unsigned char*>(r->global), base + (r->shared - kSharedBase), r->bytes);
      }, nullptr, {});
      w.bulk->lanes[lane].open.push_back({op, ticket, r->shared, r->bytes});
      continue;
    }

    // Into shared memory of one block or, with a mask, of several, at the same place in each.
    const uint64_t barrier_address = operand64(w, o[2], in.flags & 4, lane) + in.target;
    uint32_t own_target = in.kind == kShared ? static_cast<uint32_t>(first) : r->shared;
    Block& direct = shared_owner(w, in, own_target, lane);
    std::vector<Block*> targets;
    if (in.scope) {
      const uint32_t mask = w.row<uint32_t>(o[4])[lane] & 0xffff;
      for (uint32_t rank = 0; rank < 16; ++rank) {
        if (!((mask >> rank) & 1)) continue;
        if (rank >= w.block->cluster->blocks.size()) fault(w, in, Fault::kOutOfBounds, "multicast to rank " + std::to_string(rank), bit);
        targets.push_back(w.block->cluster->blocks[rank]);
      }
    } else {
      targets.push_back(&direct);
    }
    const unsigned char* source = nullptr;
    if (in.kind == kShared) {
      Block& owner = shared_owner(w, in, r->shared, lane);
      source = shared_pointer(w, in, owner, r->shared, r->bytes, bit);
      if (checker != nullptr) checker->shared_range(w, in, owner, r->shared, r->bytes, lane, false, Checker::Agent::kAsyncProxy);
      r->shared = own_target;
    } else {
      r->shared = own_target;
      if (tensor) check_rows(w, in, *r, lane, false);
      else check_global(w, in, r->global, r->bytes, lane, false);
      if (!tensor && checker != nullptr) checker->global_range(w, in, r->global, r->bytes, lane, false, Checker::Agent::kAsyncProxy);
      source = reinterpret_cast<const unsigned char*>(r->global);
    }
    for (Block* target : targets) {
      shared_pointer(w, in, *target, r->shared, r->bytes, bit);
      if (checker != nullptr) {
        checker->shared_range(w, in, *target, r->shared, r->bytes, lane, true, Checker::Agent::kAsyncProxy);
        checker->in_flight(*target, r->shared, r->bytes, true);
      }
    }
    auto known = std::make_shared<SyncClock>();
    if (checker != nullptr) *known = checker->snapshot(w, lane);
    for (Block* target : targets) {
      uint32_t barrier = static_cast<uint32_t>(barrier_address);
      if (in.scope) barrier = (target->rank + 1) << kRankShift | (barrier & ((1u << kRankShift) - 1));
      Block* barrier_owner = nullptr;
      const std::shared_ptr<MBarrier> signal = find_mbarrier(w, in, barrier, lane, &barrier_owner).shared_from_this();
      Warp* warp = &w;
      const Inst* inst = &in;
      start_operation(*m, [=] {
        if (tensor) land_tensor(*r, target->shared);
        else std::memcpy(target->shared + (r->shared - kSharedBase), source, r->bytes);
        if (warp->machine->checker != nullptr) warp->machine->checker->in_flight(*target, r->shared, r->bytes, false);
        signal->arriving.join(*known);
        add_tx(*warp, *inst, lane, *signal, -int64_t{r->bytes}, *warp->machine);
      }, target, place(w, in, bit));
    }
  }
}

void bulk_commit(Warp& w, const Inst&) {
  if (w.bulk == nullptr) w.bulk = std::make_shared<BulkState>();
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    auto& lane = w.bulk->lanes[__builtin_ctz(m)];
    lane.groups.push_back(std::move(lane.open));
    lane.open.clear();
  }
}

void bulk_wait(Warp& w, const Inst& in) {
  if (w.bulk == nullptr) return;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int index = __builtin_ctz(m);
    auto& lane = w.bulk->lanes[index];
    while (lane.groups.size() > static_cast<size_t>(in.imm)) {
      for (auto& store : lane.groups.front()) {
        land(*store.op);
        if (w.machine->checker == nullptr) continue;
        w.machine->checker->done_reading(*w.block, store.ticket);
        w.machine->checker->shared_range(w, in, *w.block, store.address, store.bytes, index, false, Checker::Agent::kThread);
      }
      lane.groups.pop_front();
    }
  }
}

uint8_t take_reduction(Build& b) {
  const int op = b.take_one({"add", "min", "max", "and", "or", "xor"}, -1);
  b.take("noftz");
  const Type type = b.take_type();
  if (op == 0) {
    switch (type) {
      case Type::kNone: return 255;  // of a tensor: by its element type
      case Type::kF32: return kAddF32;
      case Type::kF64: return kAddF64;
      case Type::kF16: return kAddF16;
      case Type::kBF16: return kAddBF16;
      case Type::kU64:
      case Type::kS64: return kAddU64;
      default: return kAddU32;
    }
  }
  if (op == 1) return type == Type::kU32 ? kMinU32 : kMinS32;
  if (op == 2) return type == Type::kU32 ? kMaxU32 : kMaxS32;
  return op == 3 ? kAnd32 : op == 4 ? kOr32 : kXor32;
}

void resolve(Build& b, bool reduces) {
  if (b.take("commit_group")) {
    b.in.fn = bulk_commit;
    return;
  }
  if (b.take("wait_group")) {
    b.take("read");
    b.operands(1, 1);
    b.in.imm = static_cast<int64_t>(b.ops[0].number.bits);
    b.in.fn = bulk_wait;
    return;
  }
  if (b.take("prefetch")) {
    b.mods.clear();
    b.in.fn = [](Warp&, const Inst&) {};
    return;
  }
  const bool tensor = b.take("tensor");
  int rank = 0;
  if (tensor) {
    rank = 1 + b.take_one({"1d", "2d", "3d", "4d", "5d"}, -1);
    b.take("tile");
    if (rank == 0) b.fail("it has no dimension");
  }
  b.in.vec = static_cast<uint8_t>(rank);
  const bool barrier = b.take("mbarrier::complete_tx::bytes"), group = b.take("bulk_group");
  b.in.scope = b.take("multicast::cluster");
  const bool hint = b.take("L2::cache_hint");
  const bool to_global = b.mods.size() >= 2 && b.mods[0] == "global";
  const bool from_global = b.mods.size() >= 2 && b.mods[1] == "global";
  b.mods.erase(b.mods.begin(), b.mods.begin() + std::min<long>(2, static_cast<long>(b.mods.size())));
  if (reduces) b.in.size = take_reduction(b);
  if (reduces && !to_global) b.fail("reductions into shared memory are not implemented");
  if (b.in.size == 255) b.in.size = 0, b.in.imm = 1;
  const bool reduce_by_type = reduces && b.in.size == 0;
  b.in.kind = tensor ? (to_global ? kTensorStore : kTensorLoad) : to_global ? kStore : from_global ? kLoad : kShared;
  if (to_global != group || to_global == barrier) b.fail("its way of completion does not fit");
  size_t at = 0;
  bool wide[3] = {true, true, true};
  int64_t part[3] = {};
  const Operand& first = b.ops.at(at++);
  const Operand& second = b.ops.at(at++);
  b.address(first, part[0], wide[0]);
  b.address(second, part[1], wide[1]);
  Operand size;
  if (!tensor) size = b.ops.at(at++);
  if (barrier) b.address(b.ops.at(at++), part[2], wide[2]);
  else b.append(b.constant(0, true));
  if (tensor) b.append(b.constant(0, false));
  else b.src(size, Type::kU32);
  if (b.in.scope) b.src(b.ops.at(at++), Type::kU16);
  else b.append(b.constant(0, false));
  if (hint) ++at;
  if (tensor) {
    const Operand& map = to_global ? first : second;
    if (map.parts.size() != 1 || map.parts[0].parts.size() != static_cast<size_t>(rank)) b.fail("its coordinates do not fit");
    for (const Operand& c : map.parts[0].parts) b.src(c, Type::kU32);
  }
  b.in.imm = part[0], b.in.imm2 = part[1], b.in.target = static_cast<uint32_t>(part[2]);
  b.in.flags = static_cast<uint8_t>((wide[0] ? 1 : 0) | (wide[1] ? 2 : 0) | (wide[2] ? 4 : 0));
  b.in.fn = bulk;
  if (reduce_by_type) b.in.size = kByType;
  if (at != b.ops.size()) b.fail("it has too many operands");
}

// ---- tensor maps made in kernels ----

// o: base, value, ordinal. kind: field; size: bytes of the value.
void replace(Warp& w, const Inst& in) {
  uint64_t addresses[kLanes];
  gather_addresses(w, in, 0, addresses);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    uint64_t a = addresses[lane];
    if (static_cast<Space>(in.space) == Space::kShared) a |= kSharedWindow;
    unsigned char* p = host_pointer(w, in, a, 128, lane);
    TensorMapData map;
    std::memcpy(&map, p, sizeof map);
    map.magic = kTensorMapMagic;
    const uint64_t value = in.size == 64 ? w.row<uint64_t>(in.o[1])[lane] : w.row<uint32_t>(in.o[1])[lane];
    const auto ordinal = static_cast<uint32_t>(in.imm2);
    switch (in.kind) {
      case 0: map.base = value; break;
      case 1: map.rank = static_cast<uint8_t>(value + 1); break;
      case 2: if (ordinal < 5) map.box[ordinal] = static_cast<uint16_t>(value); break;
      case 3: if (ordinal < 5) map.sizes[ordinal] = value; break;
      case 4: if (ordinal < 4) map.strides[ordinal] = value * static_cast<uint64_t>(in.vec); break;
      case 5: break;  // element strides
      case 6: {
        constexpr uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 4, 8, 2, 4, 4};
        constexpr uint8_t kDriver[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12};  // PTX counts differently
        if (value < sizeof kBytes) map.element_bytes = kBytes[value], map.element_type = kDriver[value];
        break;
      }
      case 7: break;  // interleave
      case 8: map.swizzle = static_cast<uint8_t>(value); break;
      default: map.nan_fill = value != 0; break;
    }
    std::memcpy(p, &map, sizeof map);
    if (w.machine->checker != nullptr && static_cast<Space>(in.space) == Space::kShared)
      w.machine->checker->mark_written(*w.block, static_cast<uint32_t>(addresses[lane]), 128);
  }
}

void fence_copy(Warp& w, const Inst& in) {  // tensormap.cp_fenceproxy: 128 bytes from shared to global memory
  if (!aligned_here(w, in, false)) return;
  uint64_t target[kLanes];
  gather_addresses(w, in, 0, target);
  const int lane = __builtin_ctz(w.mask);
  uint64_t source = operand64(w, in.o[1], in.flags & 2, lane) + static_cast<uint64_t>(in.imm2);
  if (source >> 56 == 0) source |= kSharedWindow;
  check_global(w, in, target[lane], 128, lane, true);
  std::memcpy(reinterpret_cast<void*>(target[lane]), host_pointer(w, in, source, 128, lane), 128);
}

void tensormap(Build& b) {
  if (b.take("cp_fenceproxy")) {
    b.mods.clear();
    b.operands(3, 3);
    b.address(b.ops[0]);
    bool wide = true;
    b.address(b.ops[1], b.in.imm2, wide);
    b.in.flags = wide ? 2 : 0;
    b.in.fn = fence_copy;
    return;
  }
  b.take("replace"), b.take("tile");
  const int field = b.take_one({"global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
                                "interleave_layout", "swizzle_mode", "fill_mode"}, -1);
  b.in.space = b.take_space();
  b.take("b1024");
  const Type type = b.need_type();
  b.operands(2, 3);
  b.address(b.ops[0]);
  b.src(b.ops.back(), type);
  if (b.ops.size() == 3) b.in.imm2 = static_cast<int64_t>(b.ops[1].number.bits);
  b.in.kind = static_cast<uint8_t>(field);
  b.in.size = static_cast<uint8_t>(bits_of(type));
  // Before PTX 8.6 the assembler took strides in units of 16 bytes.
  b.in.vec = b.compiler().module().version() <= 85 ? 16 : 1;
  if (field >= 0) b.in.fn = replace;
}

}  // namespace

void resolve_bulk(Build& b) { resolve(b, false); }

void resolve_tensormap_fence(Build& b) {
  b.mods.clear();
  b.in.fn = [](Warp&, const Inst&) {};
}

void check_exit(Warp& w, const Inst& in, uint32_t lanes) {
  check_cp_async_exit(w, in, lanes);
  if (w.bulk != nullptr) {
    for (uint32_t m = lanes; m != 0; m &= m - 1) {
      const auto& lane = w.bulk->lanes[__builtin_ctz(m)];
      bool some = !lane.open.empty();
      for (const auto& group : lane.groups) some |= !group.empty();
      if (some) fault(w, in, Fault::kAsyncInFlight, "exit with bulk stores that nobody waited for", m & -m);
    }
  }
  if (w.block->live != static_cast<uint32_t>(__builtin_popcount(lanes))) return;
  for (const auto& op : w.machine->pending)
    if (!op->landed && op->target == w.block)
      fault(w, in, Fault::kAsyncInFlight, "the block ends with an asynchronous copy on its way into its shared memory, issued by " + op->by, lanes);
}

void add_bulk(OpcodeTable& table) {
  table["tensormap"] = tensormap;
}

void resolve_reduce_bulk(Build& b) {
  b.take("reduce"), b.take("async"), b.take("bulk");
  resolve(b, true);
}

}  // namespace ptxsim
