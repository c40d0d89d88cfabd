// Launch of a planned kernel; torch-free. Errors come back as CUDA's own sentence, null for none.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/plan.h"

namespace llmkernels::cuda {

constexpr unsigned kSharedWithoutAsking = 48 << 10;

template <class Params>
cudaError_t allow_shared(void (*kernel)(Params), const Launch& plan) {
  if (plan.shared <= kSharedWithoutAsking) return cudaSuccess;
  const int bytes = static_cast<int>(plan.shared);
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

template <class Params>
const char* launch(void (*kernel)(Params), const Params& params, const Launch& plan, void* stream) {
  const dim3 grid(plan.grid[0], plan.grid[1]);
  const dim3 block(plan.block[0], plan.block[1]);
  cudaError_t error = allow_shared(kernel, plan);
  if (error == cudaSuccess) {
    kernel<<<grid, block, plan.shared, static_cast<cudaStream_t>(stream)>>>(params);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// For kernels whose blocks wait for each other: an error, not a deadlock, where they are not all resident at once.
template <class Params>
const char* launch_cooperative(void (*kernel)(Params), const Params& params, const Launch& plan, void* stream) {
  const dim3 grid(plan.grid[0], plan.grid[1]);
  const dim3 block(plan.block[0], plan.block[1]);
  cudaError_t error = allow_shared(kernel, plan);
  if (error == cudaSuccess) {
    void* arguments[] = {const_cast<Params*>(&params)};
    error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, plan.shared,
                                        static_cast<cudaStream_t>(stream));
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace llmkernels::cuda
