// Threads that stay together for many short steps, with a barrier instead of a fork and a join at each.
//
// at::parallel_for runs serially where it is nested or the range is short, and a barrier that expects more threads than
// there are never opens. So a team is one parallel region, and its barrier counts the threads that really came.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>

namespace llmkernels {

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // A step takes microseconds; whoever is still not here after some of them has probably lost its core.
    for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin) {
      if (spin < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 4096;

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// libgomp's threads do not survive a fork, and a region of several in the child waits for them for ever. The first call,
// when the module is loaded, registers what notices a fork.
inline bool forked() {
  static std::atomic<bool> child{false};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { child.store(true); });
  return registered != 0 || child.load(std::memory_order_relaxed);
}

inline const bool kForkedAtLoad = forked();

// Calls work(thread, threads, wait) on up to `wanted` threads at once, where wait() returns when all have called it.
template <class Work>
void with_team(int64_t wanted, Work&& work) {
  const bool never_forked = !forked();
  const int64_t limit = never_forked && !at::in_parallel_region() && !omp_in_parallel() ? at::get_num_threads() : 1;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(wanted, limit)));
  if (threads == 1) {
    work(0, 1, [] {});
    return;
  }
  Barrier* barrier = nullptr;
#pragma omp parallel num_threads(threads)
  {
#pragma omp single
    barrier = new Barrier(omp_get_num_threads());
    work(omp_get_thread_num(), omp_get_num_threads(), [&] { barrier->wait(); });
  }
  delete barrier;
}

}  // namespace llmkernels
