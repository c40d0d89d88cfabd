// Launch of a planned kernel; torch-free. Errors come back as CUDA's own sentence, null for none.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda/plan.h"

namespace llmkernels::cuda {

template <class Params>
const char* launch(void (*kernel)(Params), const Params& params, const Launch& plan, void* stream) {
  const dim3 grid(plan.grid[0], plan.grid[1]);
  const dim3 block(plan.block[0], plan.block[1]);
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace llmkernels::cuda
