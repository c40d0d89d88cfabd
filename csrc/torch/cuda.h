// What a CUDA binding needs of torch. No header of torch's CUDA part is included: a CPU build of torch has not all of
// them, and the module should compile and import there too.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "common/cuda/gpu.h"

// The tests build the bindings a second time for CPU tensors, where an interpreter executes the kernels.
#ifndef LLMKERNELS_CUDA_KEY
#define LLMKERNELS_CUDA_KEY CUDA
#endif

namespace llmkernels {

inline void check_cuda(const char* op, const char* error) {
  TORCH_CHECK(error == nullptr, op, ": CUDA says: ", error);
}

// The device of a call: current while this object lives. `stream` is torch's current one there.
struct CudaCall {
  c10::DeviceGuard guard;
  void* stream = nullptr;
  cuda::Gpu gpu{};

  CudaCall(const char* op, c10::Device device) : guard(device) {
    if (device.is_cuda()) {
      stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
    }
    check_cuda(op, cuda::ask_gpu(device.is_cuda() ? device.index() : 0, gpu));
  }
};

}  // namespace llmkernels
