// Asynchronous copies, mbarriers and clusters: what the rest of the interpreter needs to know of them.
#pragma once

#include "compiler.h"
#include "machine.h"

namespace ptxsim {

// Nothing asynchronous may be left when lanes exit.
void check_exit(Warp& w, const Inst& in, uint32_t lanes);
// Something lands that need not have landed yet; false if nothing is on its way.
bool land_something(Machine& m, bool all);
void land_at_random(Machine& m);

void land_copy(Warp& w, AsyncCopy& copy);
void check_cp_async_exit(Warp& w, const Inst& in, uint32_t lanes);

void resolve_cp_async_mbarrier(Build& b);
void resolve_bulk(Build& b);
void resolve_reduce_bulk(Build& b);
void resolve_st_async(Build& b);
void resolve_red_async(Build& b);
void resolve_cluster_barrier(Build& b);
void resolve_tensormap_fence(Build& b);
std::string describe_mbarrier_wait(const Warp& w);

}  // namespace ptxsim
