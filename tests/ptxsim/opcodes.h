// The table from the first word of an opcode to what resolves it, filled by the ops_*.cpp files.
#pragma once

#include <map>
#include <string_view>

#include "compiler.h"

#ifndef PTXSIM_ISA
#define PTXSIM_ISA isa_base
#endif

namespace ptxsim {

using WgmmaProduct = void (*)(const unsigned char* a, const unsigned char* b, int n, float* d);
using OpcodeTable = std::map<std::string_view, Resolver>;

// Compiled once per instruction set of the host; isa_avx2 is used where the CPU has it.
#define PTXSIM_DECLARE_ISA(isa)                     \
  namespace isa {                                   \
  void add_integer(OpcodeTable& table);             \
  void add_bits(OpcodeTable& table);                \
  void add_float(OpcodeTable& table);               \
  void add_convert(OpcodeTable& table);             \
  void add_compare(OpcodeTable& table);             \
  void add_mma(OpcodeTable& table);                 \
  void resolve_float_arithmetic(Build& b, Type type); \
  Handler move_handler(RowClass row_class);         \
  WgmmaProduct wgmma_product(Type a, Type b);       \
  }
PTXSIM_DECLARE_ISA(isa_base)
PTXSIM_DECLARE_ISA(isa_avx2)

// Once for all.
void add_move(OpcodeTable& table);
void add_control(OpcodeTable& table);
void add_memory(OpcodeTable& table);
void add_atomic(OpcodeTable& table);
void add_warp(OpcodeTable& table);
void add_matrix(OpcodeTable& table);
void add_barrier(OpcodeTable& table);
void add_async(OpcodeTable& table);
void add_mbarrier(OpcodeTable& table);
void add_bulk(OpcodeTable& table);
void add_wgmma(OpcodeTable& table);

bool host_has_avx2();

}  // namespace ptxsim
