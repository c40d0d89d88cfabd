// The race detector: happens-before by vector clocks, after FastTrack (Flanagan, Freund, PLDI 2009), and what is known of
// every byte of shared memory.
//
// Every thread counts its own time, which advances with each release. A barrier of the whole block sets all its threads
// to the same time, so that one comparison tells that an earlier access is ordered; only threads that synchronised in
// another way since then carry vectors. Each 4-byte word remembers its last write and the reads since.
#pragma once

#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include "access.h"
#include "machine.h"

namespace ptxsim {

// Times of all threads of one block as somebody knows them, shared until changed. Index threads + w is the warp's
// matrix unit (wgmma), whose reads end when it is waited for.
using Row = std::shared_ptr<std::vector<uint32_t>>;

// What a synchronisation object carries: times by block.
struct SyncClock {
  std::vector<std::pair<uint32_t, Row>> rows;
  Row& of(uint32_t block);
  const Row* find(uint32_t block) const;
  void join(const SyncClock& other);
  bool empty() const { return rows.empty(); }
};

void join_row(Row& into, const Row& from);

class Checker {
 public:
  explicit Checker(Machine& m);
  ~Checker();

  void start_block(Block& block);
  void end_block(Block& block);

  // Accesses of the lanes of `mask`; addresses are valid for these lanes.
  void global(Warp& w, const Inst& in, const uint64_t* addresses, uint32_t mask, uint32_t bytes, Access access,
              const unsigned char* values);
  void shared(Warp& w, const Inst& in, Block& owner, const uint64_t* addresses, uint32_t mask, uint32_t bytes,
              Access access, const unsigned char* values);

  // Copies into and out of shared memory that proceed on their own.
  enum class Agent : uint8_t { kThread, kAsyncProxy, kMatrix };
  void shared_range(Warp& w, const Inst& in, Block& owner, uint32_t address, uint32_t bytes, int lane, bool write, Agent agent);
  void global_range(Warp& w, const Inst& in, uint64_t address, uint64_t bytes, int lane, bool write, Agent agent);
  void in_flight(Block& owner, uint32_t address, uint32_t bytes, bool flying);       // a copy writes these bytes
  void mark_written(Block& owner, uint32_t address, uint32_t bytes);
  void reading(Block& owner, uint32_t address, uint32_t bytes, const Warp& w, const Inst& in, uint64_t ticket);
  void done_reading(Block& owner, uint64_t ticket);

  // Order.
  void barrier_arrive(Warp& w, uint32_t id, uint32_t lanes);
  void barrier_done(Block& block, uint32_t id, Barrier& barrier);
  void warp_sync(Warp& w, uint32_t lanes);
  void fence(Warp& w, int scope);
  void proxy_fence(Warp& w);
  void release(Warp& w, int lane, SyncClock& to);        // what the lane knows, and its own past
  SyncClock snapshot(Warp& w, int lane);                  // the same, for a copy that completes later
  void acquire(Warp& w, int lane, const SyncClock& from);
  void release_atomic(Warp& w, const Inst& in, const uint64_t* addresses);
  void acquire_atomic(Warp& w, const Inst& in, const uint64_t* addresses);
  uint32_t matrix_commit(Warp& w);                        // a group of wgmma ends: its time
  void matrix_done(Warp& w, uint32_t time);               // the warp has waited for the group: its reads are past
  void tick(Warp& w, int lane);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

void mark_local_known(Warp& w, int lane, uint32_t offset, uint32_t bytes);
void acquire_loaded(Warp& w, const Inst& in, const uint64_t* addresses);
void release_stored(Warp& w, const Inst& in, const uint64_t* addresses);

}  // namespace ptxsim
