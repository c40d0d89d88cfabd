#include "clocks.h"

#include <algorithm>

namespace ptxsim {

Row& SyncClock::of(uint32_t block) {
  for (auto& [id, row] : rows)
    if (id == block) return row;
  return rows.emplace_back(block, nullptr).second;
}

const Row* SyncClock::find(uint32_t block) const {
  for (const auto& [id, row] : rows)
    if (id == block) return &row;
  return nullptr;
}

void SyncClock::join(const SyncClock& other) {
  for (const auto& [id, row] : other.rows) join_row(of(id), row);
}

void join_row(Row& into, const Row& from) {
  if (from == nullptr || into == from) return;
  if (into == nullptr) {
    into = from;
    return;
  }
  auto joined = std::make_shared<std::vector<uint32_t>>(*into);
  const size_t n = std::min(joined->size(), from->size());
  for (size_t i = 0; i < n; ++i) (*joined)[i] = std::max((*joined)[i], (*from)[i]);
  into = std::move(joined);
}

void BlockClocks::start(uint32_t id, uint32_t threads, uint32_t warps) {
  block = id;
  padded = warps * kLanes;
  size = padded + warps;
  phase = 1;
  own.assign(size, 1);
  rows.assign(padded, nullptr);
  foreign.assign(padded, nullptr);
  matrix_done.assign(warps, 0);
  matrix_base.assign(warps, 0);
  fenced.assign(padded, 0);
  fenced_phase.assign(padded, 0);
  fenced_rows.assign(padded, nullptr);
  fences.clear();
  fences.resize(padded);
  any_fence = false;
  memo_into_ = memo_from_ = memo_result_ = nullptr;
  (void)threads;
}

bool BlockClocks::knows(uint32_t t, uint32_t u, uint32_t clock) const {
  if (u == t) return true;
  if (u < padded ? clock < phase : clock <= matrix_base[u - padded]) return true;
  return rows[t] != nullptr && (*rows[t])[u] >= clock;
}

bool BlockClocks::fenced_for_proxy(uint32_t t, uint32_t u, uint32_t clock) const {
  if (u >= padded || clock <= fenced[u] || clock < fenced_phase[t]) return true;
  return fenced_rows[t] != nullptr && (*fenced_rows[t])[u] >= clock;
}

bool BlockClocks::knows_foreign(uint32_t t, uint32_t other, uint32_t u, uint32_t clock) const {
  if (foreign[t] == nullptr) return false;
  const Row* row = foreign[t]->find(other);
  return row != nullptr && *row != nullptr && u < (*row)->size() && (**row)[u] >= clock;
}

Row BlockClocks::known(uint32_t t) const {
  auto row = rows[t] != nullptr ? std::make_shared<std::vector<uint32_t>>(*rows[t])
                                : std::make_shared<std::vector<uint32_t>>(size, 0);
  for (uint32_t u = 0; u < padded; ++u) (*row)[u] = std::max((*row)[u], phase - 1);
  for (uint32_t w = padded; w < size; ++w) (*row)[w] = std::max((*row)[w], matrix_base[w - padded]);
  (*row)[t] = own[t];
  return row;
}

SyncClock BlockClocks::everything(uint32_t t) const {
  SyncClock all;
  if (foreign[t] != nullptr) all = *foreign[t];
  all.of(block) = known(t);
  return all;
}

void BlockClocks::learn(uint32_t t, const SyncClock& from) {
  for (const auto& [id, row] : from.rows) {
    if (row == nullptr) continue;
    if (id != block) {
      if (foreign[t] == nullptr) foreign[t] = std::make_shared<SyncClock>();
      else if (foreign[t].use_count() > 1) foreign[t] = std::make_shared<SyncClock>(*foreign[t]);
      join_row(foreign[t]->of(id), row);
      continue;
    }
    // Lanes of a warp learn the same again and again.
    if (rows[t] == memo_into_ && row == memo_from_ && memo_result_ != nullptr) {
      rows[t] = memo_result_;
      continue;
    }
    const Row before = rows[t];
    join_row(rows[t], row);
    memo_into_ = before, memo_from_ = row, memo_result_ = rows[t];
  }
}

void BlockClocks::meet(const std::vector<uint32_t>& threads, const SyncClock* more) {
  meet_fences(&threads);
  Row joined;
  std::shared_ptr<SyncClock> other;
  const auto learn_foreign = [&](const SyncClock& from) {
    for (const auto& [id, row] : from.rows) {
      if (id == block) continue;
      if (other == nullptr) other = std::make_shared<SyncClock>();
      join_row(other->of(id), row);
    }
  };
  const Row* last = nullptr;
  const SyncClock* last_foreign = nullptr;
  for (const uint32_t t : threads) {
    if (rows[t] != nullptr && (last == nullptr || *last != rows[t])) join_row(joined, rows[t]), last = &rows[t];
    if (foreign[t] != nullptr && foreign[t].get() != last_foreign) learn_foreign(*foreign[t]), last_foreign = foreign[t].get();
  }
  if (more != nullptr) {
    learn_foreign(*more);
    if (const Row* row = more->find(block); row != nullptr) join_row(joined, *row);
  }
  auto result = joined != nullptr ? std::make_shared<std::vector<uint32_t>>(*joined)
                                  : std::make_shared<std::vector<uint32_t>>(size, 0);
  for (const uint32_t t : threads) (*result)[t] = own[t]++;
  for (const uint32_t t : threads) {
    rows[t] = result;
    if (other != nullptr) foreign[t] = other;
  }
}

// What one thread has made visible by a fence, or has seen without one, holds for all who meet.
void BlockClocks::meet_fences(const std::vector<uint32_t>* threads) {
  if (!any_fence) return;
  const size_t count = threads != nullptr ? threads->size() : padded;
  const auto thread = [&](size_t i) { return threads != nullptr ? (*threads)[i] : i; };
  for (auto member : {&Fence::released, &Fence::acquired}) {
    std::shared_ptr<SyncClock> joined;
    const SyncClock* last = nullptr;
    for (size_t i = 0; i < count; ++i) {
      const auto& one = fences[thread(i)].*member;
      if (one == nullptr || one.get() == last) continue;
      last = one.get();
      if (joined == nullptr) joined = std::make_shared<SyncClock>(*one);
      else joined->join(*one);
    }
    if (joined == nullptr) continue;
    for (size_t i = 0; i < count; ++i) fences[thread(i)].*member = joined;
  }
}

void BlockClocks::meet_all() {
  meet_fences(nullptr);
  uint32_t latest = 0;
  for (uint32_t t = 0; t < padded; ++t) latest = std::max(latest, own[t]);
  phase = latest + 1;
  std::fill(own.begin(), own.begin() + padded, phase);
  std::fill(rows.begin(), rows.end(), nullptr);
  matrix_base = matrix_done;
  std::shared_ptr<SyncClock> all;
  const SyncClock* last = nullptr;
  for (const auto& one : foreign) {
    if (one == nullptr || one.get() == last) continue;
    last = one.get();
    if (all == nullptr) all = one;
    else {
      if (all.use_count() > 1) all = std::make_shared<SyncClock>(*all);
      all->join(*one);
    }
  }
  if (all != nullptr) std::fill(foreign.begin(), foreign.end(), all);
}

}  // namespace ptxsim
