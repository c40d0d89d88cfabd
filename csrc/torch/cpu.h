// What a CPU binding needs of torch: its threads.
#pragma once

#include <ATen/Parallel.h>

namespace llmkernels {

constexpr int64_t kGrainElements = 16384;  // less work than this is not worth a second thread

}  // namespace llmkernels
