// Vector clocks of the threads of one resident block.
#pragma once

#include <memory>
#include <vector>

#include "checker.h"

namespace ptxsim {

class BlockClocks {
 public:
  void start(uint32_t block, uint32_t threads, uint32_t warps);

  uint32_t block = 0, padded = 0, size = 0;  // padded: threads in whole warps; size: with the matrix units
  uint32_t phase = 1;                        // everything of this block before it is known to all its threads
  std::vector<uint32_t> own;                 // of threads, then of matrix units
  std::vector<Row> rows;                     // null: nothing beyond the phase
  std::vector<std::shared_ptr<SyncClock>> foreign;  // what a thread knows of other blocks; null: nothing
  std::vector<uint32_t> matrix_done, matrix_base;
  // For the async proxy: when a thread executed its last fence.proxy.async, and what it knew of others by then.
  std::vector<uint32_t> fenced, fenced_phase;
  std::vector<Row> fenced_rows;
  struct Fence {
    std::shared_ptr<const SyncClock> released, acquired;
  };
  std::vector<Fence> fences;                 // what is visible to all, and what relaxed reads saw but no fence took in
  bool any_fence = false;

  // Does thread `t` know of time `clock` of thread `u` of this block (or of `other`)?
  bool knows(uint32_t t, uint32_t u, uint32_t clock) const;
  bool fenced_for_proxy(uint32_t t, uint32_t u, uint32_t clock) const;  // by the writer u, or by t who knew of it
  bool knows_foreign(uint32_t t, uint32_t other, uint32_t u, uint32_t clock) const;
  Row known(uint32_t t) const;               // all that t knows, with its own time
  SyncClock everything(uint32_t t) const;
  void learn(uint32_t t, const SyncClock& from);
  void meet(const std::vector<uint32_t>& threads, const SyncClock* more);  // a barrier of some
  void meet_all();                           // a barrier of the whole block

 private:
  void meet_fences(const std::vector<uint32_t>* threads);  // null: all
  Row memo_into_, memo_from_, memo_result_;
};

}  // namespace ptxsim
