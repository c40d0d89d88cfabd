#include "async.h"
#include "checker.h"
#include "opcodes.h"
#include "wgmma_pending.h"
namespace ptxsim {
void resolve_cp_async_mbarrier(Build&) {}
void resolve_bulk(Build&) {}
void add_mbarrier(OpcodeTable&) {}
void add_bulk(OpcodeTable&) {}
void add_wgmma(OpcodeTable&) {}
void move_pending(Warp&, Offset, Offset) {}
void check_exit(Warp& w, const Inst& in, uint32_t lanes) { check_cp_async_exit(w, in, lanes); }
bool land_something(Machine&, bool) { return false; }
void land_at_random(Machine&) {}
void resolve_st_async(Build&) {}
void resolve_red_async(Build&) {}
void resolve_cluster_barrier(Build&) {}
void resolve_tensormap_fence(Build&) {}
std::string describe_mbarrier_wait(const Warp&) { return ""; }
void release_cluster(Cluster&) {}
struct MBarrier {};
struct PendingOp {};
std::string encode_tensor_map(TensorMap&, int, int, const void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, int, Swizzle, bool) { return "x"; }
}
