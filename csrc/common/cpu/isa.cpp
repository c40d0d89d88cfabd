#include "common/cpu/isa.h"

#include <ATen/Version.h>
#if defined(LLMKERNELS_HAS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace llmkernels::cpu {
namespace {

constexpr const char* kNames[kIsaCount] = {"default",     "avx2", "avx512",      "avx512_vnni",
                                           "avx512_bf16", "amx",  "amx_emulated"};

#if defined(LLMKERNELS_HAS_AMX)
// The system keeps the tiles of a process only if that asked; threads and forks of it have the permission too.
bool tiles_permitted() {
#if defined(__linux__)
  static const bool permitted = [] {
    // Some virtual machines announce the instructions but no palette of tiles, and then refuse to configure them.
    unsigned palettes = 0, unused = 0, names_and_bytes = 0;
    if (!__get_cpuid_count(0x1d, 0, &palettes, &unused, &unused, &unused) || palettes < 1) return false;
    if (!__get_cpuid_count(0x1d, 1, &unused, &names_and_bytes, &unused, &unused)) return false;
    if (names_and_bytes >> 16 < 8 || (names_and_bytes & 0xffff) < 64) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return permitted;
#else
  return false;
#endif
}
#endif

bool runs_here(Isa isa) {
#if defined(LLMKERNELS_HAS_AMX)
  switch (isa) {
    case Isa::kDefault:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return runs_here(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::kAvx512Vnni:
      return runs_here(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
    case Isa::kAvx512Bf16:
      return runs_here(Isa::kAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
    case Isa::kAmx:
      return runs_here(Isa::kAvx512Bf16) && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
             __builtin_cpu_supports("amx-int8") && tiles_permitted();
    case Isa::kAmxEmulated:
#if defined(LLMKERNELS_HAS_AMX_EMULATED)
      return runs_here(Isa::kAvx512Bf16);
#else
      return false;
#endif
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
  std::string known = kNames[0];
  for (int i = 1; i < kIsaCount; ++i) known += std::string(", ") + kNames[i];
  throw std::invalid_argument(std::string(source) + ": unknown instruction set '" + name + "', expected one of " +
                              known);
}

Isa choose() {
  const char* forced = std::getenv("LLMKERNELS_ISA");
  if (forced != nullptr && *forced != '\0') return parse(forced, "LLMKERNELS_ISA");
  const std::string torch = at::get_cpu_capability();
  if (torch == "AVX512" && runs_here(Isa::kAmx)) return Isa::kAmx;
  if (torch == "AVX512" && runs_here(Isa::kAvx512Bf16)) return Isa::kAvx512Bf16;
  if (torch == "AVX512" && runs_here(Isa::kAvx512Vnni)) return Isa::kAvx512Vnni;
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
