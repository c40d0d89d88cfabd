#include "memory.h"

#include <algorithm>

namespace ptxsim {

Memory::Memory() : state_(std::make_shared<State>()) {}

Memory& Memory::global() {
  static Memory* memory = new Memory;  // never destroyed: allocators may call it while the process ends
  return *memory;
}

void Memory::add(const void* begin, size_t bytes, std::string_view name) {
  const auto address = reinterpret_cast<uint64_t>(begin);
  std::lock_guard lock(state_->mutex);
  state_->regions.emplace(address, Region{address, address + bytes, std::string(name), false});
  state_->snapshot.reset();
}

void Memory::remove(const void* begin) {
  std::lock_guard lock(state_->mutex);
  const auto it = state_->regions.find(reinterpret_cast<uint64_t>(begin));
  if (it == state_->regions.end()) return;
  state_->regions.erase(it);
  state_->snapshot.reset();
}

MemoryView::MemoryView(Memory& memory) {
  std::lock_guard lock(memory.state_->mutex);
  auto& snapshot = memory.state_->snapshot;
  if (snapshot == nullptr) {
    auto fresh = std::make_shared<std::vector<Region>>();
    fresh->reserve(memory.state_->regions.size());
    for (const auto& [begin, region] : memory.state_->regions) fresh->push_back(region);
    snapshot = std::move(fresh);
  }
  shared_ = snapshot;
}

void MemoryView::add(const void* begin, size_t bytes, std::string name, bool read_only) {
  const auto address = reinterpret_cast<uint64_t>(begin);
  const auto at = std::upper_bound(own_.begin(), own_.end(), address,
                                   [](uint64_t value, const Region& r) { return value < r.begin; });
  own_.insert(at, Region{address, address + bytes, std::move(name), read_only});
}

const Region* MemoryView::find(const std::vector<Region>& regions, uint64_t address, uint64_t bytes) {
  auto it = std::upper_bound(regions.begin(), regions.end(), address,
                             [](uint64_t value, const Region& r) { return value < r.begin; });
  // Regions may overlap, so the nearest begin need not be the one that reaches far enough.
  for (int tries = 0; it != regions.begin() && tries < 64; ++tries) {
    --it;
    if (address < it->end && bytes <= it->end - address) return &*it;
  }
  return nullptr;
}

const Region* MemoryView::find(uint64_t address, uint64_t bytes) const {
  const Region* region = find(*shared_, address, bytes);
  return region != nullptr ? region : find(own_, address, bytes);
}

std::string MemoryView::name(uint64_t address) const {
  const Region* region = find(address, 1);
  if (region == nullptr) return "global memory";
  const std::string offset = " + " + std::to_string(address - region->begin);
  return region->name.empty() ? "a buffer of " + std::to_string(region->end - region->begin) + " bytes" + offset
                              : "`" + region->name + "`" + offset;
}

std::string MemoryView::explain(uint64_t address, uint64_t bytes) const {
  if (address < 4096) return "a null pointer + " + std::to_string(address);
  const Region* before = nullptr;
  const Region* after = nullptr;
  for (const auto* list : {shared_.get(), static_cast<const std::vector<Region>*>(&own_)}) {
    for (const Region& r : *list) {
      if (r.begin <= address && (before == nullptr || r.end > before->end)) before = &r;
      if (r.begin > address && (after == nullptr || r.begin < after->begin)) after = &r;
    }
  }
  const auto text = [](const Region& r) {
    const std::string size = std::to_string(r.end - r.begin) + " bytes";
    return r.name.empty() ? "a buffer of " + size : "`" + r.name + "` (" + size + ")";
  };
  const uint64_t past = before != nullptr && address + bytes > before->end ? address + bytes - before->end : 0;
  const uint64_t ahead = after != nullptr ? after->begin - address : 0;
  constexpr uint64_t kNear = uint64_t{1} << 24;
  if (before != nullptr && past > 0 && past < kNear && (after == nullptr || past <= ahead + bytes))
    return std::to_string(past) + " bytes past the end of " + text(*before);
  if (after != nullptr && ahead < kNear) return std::to_string(ahead) + " bytes in front of " + text(*after);
  return "an address in no known buffer";
}

}  // namespace ptxsim
