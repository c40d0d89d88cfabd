// Global memory: what is registered in Memory at launch, and what the launch itself owns.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ptxsim.h"

namespace ptxsim {

struct Region {
  uint64_t begin = 0, end = 0;
  std::string name;
  bool read_only = false;
};

struct Memory::State {
  std::mutex mutex;
  std::multimap<uint64_t, Region> regions;
  std::shared_ptr<const std::vector<Region>> snapshot;  // by begin; null after a change
};

// A frozen copy, sorted by begin.
class MemoryView {
 public:
  explicit MemoryView(Memory& memory);
  void add(const void* begin, size_t bytes, std::string name, bool read_only);  // before the first find
  // A region that holds [address, address + bytes), or null.
  const Region* find(uint64_t address, uint64_t bytes) const;
  // "4 bytes past the end of `x` (256 bytes)" for an access that find() rejected.
  std::string explain(uint64_t address, uint64_t bytes) const;
  std::string name(uint64_t address) const;  // "`x` + 12"

 private:
  static const Region* find(const std::vector<Region>& regions, uint64_t address, uint64_t bytes);
  std::shared_ptr<const std::vector<Region>> shared_;
  std::vector<Region> own_;
};

}  // namespace ptxsim
