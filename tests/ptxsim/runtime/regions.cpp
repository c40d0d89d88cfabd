#include "regions.h"

#include <map>
#include <mutex>
#include <sstream>

#include "ptxsim.h"

namespace ptxsim {
namespace {

struct Region {
  size_t bytes;
  std::string name;
  int count;
};

std::mutex mutex;

// Never destroyed: torch frees tensors while the process ends.
std::map<const unsigned char*, Region>& regions() {
  static auto* map = new std::map<const unsigned char*, Region>;
  return *map;
}

}  // namespace

void add_region(const void* begin, size_t bytes, const std::string& name) {
  const std::lock_guard lock(mutex);
  const auto [found, added] = regions().try_emplace(static_cast<const unsigned char*>(begin), Region{bytes, name, 0});
  Region& region = found->second;
  ++region.count;
  if (!added && bytes <= region.bytes) return;
  if (!added) Memory::global().remove(begin);
  region.bytes = bytes;
  region.name = name;
  Memory::global().add(begin, bytes, name);
}

void remove_region(const void* begin) {
  const std::lock_guard lock(mutex);
  const auto found = regions().find(static_cast<const unsigned char*>(begin));
  if (found == regions().end() || --found->second.count > 0) return;
  Memory::global().remove(begin);
  regions().erase(found);
}

std::string outside(const void* begin, size_t bytes) {
  const std::lock_guard lock(mutex);
  const auto* first = static_cast<const unsigned char*>(begin);
  // Regions may overlap, so every one that begins at or before `first` can be the one.
  for (auto at = regions().upper_bound(first); at != regions().begin();) {
    --at;
    if (first + bytes <= at->first + at->second.bytes) return {};
  }
  std::ostringstream text;
  text << bytes << " bytes at " << begin << " are not inside one region of the GPU's memory";
  return text.str();
}

}  // namespace ptxsim
