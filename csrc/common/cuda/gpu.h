// Asking the CUDA runtime about a GPU; torch-free. The answer feeds the planners.
#pragma once

#include <cuda_runtime_api.h>

#include "common/cuda/plan.h"

namespace llmkernels::cuda {

// Costs about a microsecond: the runtime keeps attributes in memory. Null, or CUDA's own sentence.
inline const char* ask_gpu(int device, Gpu& gpu) {
  const cudaError_t error = cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace llmkernels::cuda
