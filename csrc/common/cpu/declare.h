// For the headers of CPU kernels, which the sources that are compiled once per instruction set include too: nothing of
// the standard library, whose inline functions would become weak symbols of that instruction set.
#pragma once

// Declares something in the namespace of every instruction set that a kernel may be compiled for.
#define LLMKERNELS_CPU_DECLARE(...)   \
  namespace DEFAULT { __VA_ARGS__ }     \
  namespace AVX2 { __VA_ARGS__ }        \
  namespace AVX512 { __VA_ARGS__ }      \
  namespace AVX512_BF16 { __VA_ARGS__ }

// The same for a kernel that multiplies on AMX's tiles; AMX_EMULATED is of builds for tests. Others have no copy there:
// isa.h has them found in AVX512_BF16. CMakeLists.txt lists the sources.
#define LLMKERNELS_CPU_DECLARE_AMX(...) \
  LLMKERNELS_CPU_DECLARE(__VA_ARGS__)   \
  namespace AMX { __VA_ARGS__ }         \
  namespace AMX_EMULATED { __VA_ARGS__ }

// The same for one that multiplies bytes by VNNI too; others have no copy there and are found in AVX512.
#define LLMKERNELS_CPU_DECLARE_VNNI_AMX(...) \
  LLMKERNELS_CPU_DECLARE_AMX(__VA_ARGS__)     \
  namespace AVX512_VNNI { __VA_ARGS__ }
