// On which grid sample runs: a pure function of the params and the GPU.
#pragma once

#include <algorithm>

#include "common/cuda/plan.h"
#include "ops/sample/sample.h"

namespace llmkernels::cuda {

constexpr int kSampleThreads = 512;
constexpr int kSampleThreadsPerSm = 1024;

// One block per row; blocks stay and step over the rows.
inline Launch plan_sample(const SampleParams& p, const Gpu& gpu) {
  const int64_t resident = int64_t{gpu.multiprocessors} * (kSampleThreadsPerSm / kSampleThreads);
  Launch launch;
  launch.block[0] = kSampleThreads;
  launch.grid[0] = static_cast<unsigned>(std::clamp<int64_t>(p.rows, 1, resident));
  return launch;
}

}  // namespace llmkernels::cuda
