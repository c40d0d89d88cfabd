// Launch of a planned kernel; torch-free. Errors come back as CUDA's own sentence, null for none.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/plan.h"

namespace llmkernels::cuda {

constexpr unsigned kSharedWithoutAsking = 48 << 10;

template <class Params>
const char* launch(void (*kernel)(Params), const Params& params, const Launch& plan, void* stream) {
  const dim3 grid(plan.grid[0], plan.grid[1]);
  const dim3 block(plan.block[0], plan.block[1]);
  cudaError_t error = cudaSuccess;
  if (plan.shared > kSharedWithoutAsking) {
    const int bytes = static_cast<int>(plan.shared);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (error == cudaSuccess) {
    kernel<<<grid, block, plan.shared, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace llmkernels::cuda
