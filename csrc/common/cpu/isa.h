// Which instruction set the CPU kernels use; resolved once, at the first call.
#pragma once

#include <string>
#include <vector>

namespace llmkernels::cpu {

// kAvx512Vnni is kAvx512 with products of bytes where a kernel is written for them, and kAmx is kAvx512Bf16 with the
// tiles of AMX; kAmxEmulated does in plain C++ what their instructions do: for tests, on machines without them, in
// builds with LLMKERNELS_BUILD_TESTS=1.
enum class Isa : int {
  kDefault = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Vnni = 3,
  kAvx512Bf16 = 4,
  kAmx = 5,
  kAmxEmulated = 6
};
constexpr int kIsaCount = 7;

// LLMKERNELS_ISA if set, else what torch chose (ATEN_CPU_CAPABILITY is honoured), limited to what this machine has.
Isa isa();
const char* isa_name(Isa isa);
// Those that were built and that this machine can run, slowest first, and at the end the emulated one.
std::vector<std::string> available_isas();
// For tests and measurements: use another instruction set from now on. Throws if it cannot run here.
void force_isa(const std::string& name);

}  // namespace llmkernels::cpu

// A kernel without a copy for AMX is the one of AVX512_BF16, and without one for VNNI that of AVX512: names are looked
// for there after the namespace itself.
namespace llmkernels::cpu {
namespace AVX512 {}
namespace AVX512_VNNI {
using namespace AVX512;
}
namespace AVX512_BF16 {}
namespace AMX {
using namespace AVX512_BF16;
}
namespace AMX_EMULATED {
using namespace AVX512_BF16;
}
}  // namespace llmkernels::cpu

// The copy of `function` for the instruction set in use, from one of those namespaces in llmkernels::cpu.
#if defined(LLMKERNELS_HAS_AMX_EMULATED)
#define LLMKERNELS_CPU_AMX(function)                                                            \
  (::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAmx ? &::llmkernels::cpu::AMX::function \
                                                            : &::llmkernels::cpu::AMX_EMULATED::function)
#else
#define LLMKERNELS_CPU_AMX(function) (&::llmkernels::cpu::AMX::function)
#endif
#if defined(LLMKERNELS_HAS_AMX)
#define LLMKERNELS_CPU_DISPATCH(function)                                                                        \
  (::llmkernels::cpu::isa() >= ::llmkernels::cpu::Isa::kAmx          ? LLMKERNELS_CPU_AMX(function)              \
   : ::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAvx512Bf16 ? &::llmkernels::cpu::AVX512_BF16::function \
   : ::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAvx512Vnni ? &::llmkernels::cpu::AVX512_VNNI::function \
   : ::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAvx512     ? &::llmkernels::cpu::AVX512::function      \
   : ::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAvx2       ? &::llmkernels::cpu::AVX2::function        \
                                                                     : &::llmkernels::cpu::DEFAULT::function)
#else
#define LLMKERNELS_CPU_DISPATCH(function) (&::llmkernels::cpu::DEFAULT::function)
#endif
