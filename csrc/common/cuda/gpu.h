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

// What a planner has to know that keeps data in shared memory: how much of it there is.
inline const char* ask_shared(int device, Gpu& gpu) {
  int value = 0;
  cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  gpu.shared_per_block = value;
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    gpu.shared_per_multiprocessor = value;
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&value, cudaDevAttrReservedSharedMemoryPerBlock, device);
    gpu.shared_reserved = value;
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What a planner has to know whose kernels keep data in registers.
inline const char* ask_registers(int device, Gpu& gpu) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxRegistersPerMultiprocessor, device);
  gpu.registers_per_multiprocessor = value;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace llmkernels::cuda
