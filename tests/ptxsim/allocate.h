#pragma once

#include "compiler_impl.h"

namespace ptxsim {

// Gives every register of the program its place in the register file of a warp, and patches the operands.
void allocate_rows(Compiler& compiler);

bool is_branch(const Inst& inst);
bool is_indexed_branch(const Inst& inst);
bool ends_flow(const Inst& inst);
bool is_move32(const Inst& inst);  // one that carries pending values of wgmma along

}  // namespace ptxsim
