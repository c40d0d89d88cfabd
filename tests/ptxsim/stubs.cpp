#include "async.h"
#include "checker.h"
#include "opcodes.h"
#include "wgmma_pending.h"
namespace ptxsim {
void resolve_cp_async_mbarrier(Build&) {}
void resolve_bulk(Build&) {}
void Checker::in_flight(Block&, uint32_t, uint32_t, bool) {}
void Checker::shared_range(Warp&, const Inst&, Block&, uint32_t, uint32_t, int, bool, Agent) {}
void Checker::global_range(Warp&, const Inst&, uint64_t, uint64_t, int, bool, Agent) {}
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
struct Checker::Impl {};
Checker::Checker(Machine&) {}
Checker::~Checker() {}
void Checker::start_block(Block&) {}
void Checker::end_block(Block&) {}
void Checker::global(Warp&, const Inst&, const uint64_t*, uint32_t, uint32_t, Access, const unsigned char*) {}
void Checker::shared(Warp&, const Inst&, Block&, const uint64_t*, uint32_t, uint32_t, Access, const unsigned char*) {}
void Checker::barrier_arrive(Warp&, uint32_t, uint32_t) {}
void Checker::barrier_done(Block&, uint32_t, Barrier&) {}
void Checker::warp_sync(Warp&, uint32_t) {}
void Checker::fence(Warp&, int) {}
void Checker::proxy_fence(Warp&) {}
void Checker::release_atomic(Warp&, const Inst&, const uint64_t*) {}
void Checker::acquire_atomic(Warp&, const Inst&, const uint64_t*) {}
void mark_local_known(Warp& w, int lane, uint32_t offset, uint32_t bytes) { if (w.machine->checker) for (uint32_t i = 0; i < bytes; ++i) w.local_known[lane][offset + i] = 1; }
void acquire_loaded(Warp&, const Inst&, const uint64_t*) {}
void release_stored(Warp&, const Inst&, const uint64_t*) {}
}
