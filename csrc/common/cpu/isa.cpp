#include "common/cpu/isa.h"

#include <ATen/Version.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace llmkernels::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"default", "avx2", "avx512", "avx512_bf16"};

bool runs_here(Isa isa) {
#if defined(LLMKERNELS_HAS_AVX512)
  switch (isa) {
    case Isa::kDefault:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return runs_here(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx512Bf16:
      return runs_here(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::kDefault;
#endif
}

Isa parse(const std::string& name, const char* source) {
  for (int i = 0; i < kIsaCount; ++i) {
    if (name != kNames[i]) continue;
    if (runs_here(static_cast<Isa>(i))) return static_cast<Isa>(i);
    throw std::invalid_argument(std::string(source) + ": instruction set '" + name +
                                "' was not built or cannot run on this CPU");
  }
  throw std::invalid_argument(std::string(source) + ": unknown instruction set '" + name +
                              "', expected one of default, avx2, avx512, avx512_bf16");
}

Isa choose() {
  const char* forced = std::getenv("LLMKERNELS_ISA");
  if (forced != nullptr && *forced != '\0') return parse(forced, "LLMKERNELS_ISA");
  const std::string torch = at::get_cpu_capability();
  if (torch == "AVX512" && runs_here(Isa::kAvx512Bf16)) return Isa::kAvx512Bf16;
  if (torch == "AVX512" && runs_here(Isa::kAvx512)) return Isa::kAvx512;
  if (torch != "DEFAULT" && runs_here(Isa::kAvx2)) return Isa::kAvx2;
  return Isa::kDefault;
}

std::atomic<int>& chosen() {
  static std::atomic<int> value{static_cast<int>(choose())};
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (runs_here(static_cast<Isa>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

void force_isa(const std::string& name) { chosen().store(static_cast<int>(parse(name, "force_isa"))); }

}  // namespace llmkernels::cpu
