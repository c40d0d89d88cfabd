#include "allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "ptxsim.h"
#include "regions.h"

namespace ptxsim {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kGuard = 64;  // between two allocations, so that one past the end is nobody's

thread_local bool tracking = false;
std::mutex mutex;
c10::Allocator* usual = nullptr;

// Never destroyed: torch frees tensors while the process ends.
std::unordered_set<const void*>& tracked() {
  static auto* set = new std::unordered_set<const void*>;
  return *set;
}

void release(void* begin) {
  {
    const std::lock_guard lock(mutex);
    tracked().erase(begin);
  }
  remove_region(begin);
  std::free(begin);
}

// What raw_allocate gave may be of either kind.
void release_any(void* begin) { is_tracked(begin) ? release(begin) : usual->raw_deleter()(begin); }

class Allocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!tracking || bytes == 0) return usual->allocate(bytes);
    void* begin = nullptr;
    const size_t padded = (bytes + kGuard + kAlignment - 1) / kAlignment * kAlignment;
    TORCH_CHECK(posix_memalign(&begin, kAlignment, padded) == 0, "ptxsim: no memory for ", bytes, " bytes");
    std::memset(begin, kPoison, padded);
    {
      const std::lock_guard lock(mutex);
      tracked().insert(begin);
    }
    add_region(begin, bytes, "a tensor");
    return {begin, begin, &release, c10::Device(c10::kCPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &release_any; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

}  // namespace

void install_allocator() {
  static Allocator* ours = nullptr;
  if (ours != nullptr) return;
  ours = new Allocator;
  usual = c10::GetAllocator(c10::kCPU);
  c10::SetAllocator(c10::kCPU, ours, std::numeric_limits<uint8_t>::max());
}

bool track(bool on) { return std::exchange(tracking, on); }

bool is_tracked(const void* begin) {
  const std::lock_guard lock(mutex);
  return tracked().count(begin) != 0;
}

}  // namespace ptxsim
