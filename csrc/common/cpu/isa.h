// Which instruction set the CPU kernels use; resolved once, at the first call.
#pragma once

#include <string>
#include <vector>

namespace llmkernels::cpu {

enum class Isa : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
constexpr int kIsaCount = 4;

// LLMKERNELS_ISA if set, else what torch chose (ATEN_CPU_CAPABILITY is honoured), limited to what this machine has.
Isa isa();
const char* isa_name(Isa isa);
// Those that were built and that this machine can run, slowest first.
std::vector<std::string> available_isas();
// For tests and measurements: use another instruction set from now on. Throws if it cannot run here.
void force_isa(const std::string& name);

}  // namespace llmkernels::cpu

// The copy of `function` for the instruction set in use, from one of those namespaces in llmkernels::cpu.
#if defined(LLMKERNELS_HAS_AVX512)
#define LLMKERNELS_CPU_DISPATCH(function)                                                                      \
  (::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAvx512Bf16 ? &::llmkernels::cpu::AVX512_BF16::function \
   : ::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAvx512   ? &::llmkernels::cpu::AVX512::function      \
   : ::llmkernels::cpu::isa() == ::llmkernels::cpu::Isa::kAvx2     ? &::llmkernels::cpu::AVX2::function        \
                                                                   : &::llmkernels::cpu::DEFAULT::function)
#else
#define LLMKERNELS_CPU_DISPATCH(function) (&::llmkernels::cpu::DEFAULT::function)
#endif
