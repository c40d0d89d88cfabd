// Barriers in shared memory that count arrivals of threads and bytes of asynchronous copies.
#pragma once

#include <functional>
#include <memory>

#include "checker.h"
#include "machine.h"

namespace ptxsim {

struct MBarrier : std::enable_shared_from_this<MBarrier> {  // a copy in flight may outlive its place
  uint32_t expected = 0, pending = 0;
  int64_t tx = 0;        // bytes announced and not yet there; may be negative for a while
  uint64_t phase = 0;
  SyncClock arriving, done;
  const Inst* made = nullptr;
};

// An asynchronous operation on its way.
struct PendingOp {
  std::function<void()> land;
  bool landed = false;
  Block* target = nullptr;   // whose shared memory it writes; null: none
  std::string by;
};

// The valid mbarrier at an address of some block of the cluster, with the access checked; faults if there is none.
MBarrier& find_mbarrier(Warp& w, const Inst& in, uint32_t address, int lane, Block** owner = nullptr);
MBarrier* mbarrier_at(Block& owner, uint32_t address);
void arrive_mbarrier(const Warp& w, const Inst& in, int lane, MBarrier& barrier, uint32_t count, bool no_complete, Machine& m);
void add_tx(const Warp& w, const Inst& in, int lane, MBarrier& barrier, int64_t bytes, Machine& m);
// Queues an operation, or executes it at once, as the options say.
std::shared_ptr<PendingOp> start_operation(Machine& m, std::function<void()> land, Block* target, std::string by);
void land(PendingOp& op);

}  // namespace ptxsim
