// The part of the CUDA runtime that nvcc's host stubs and our host code call, on the emulated device. Everything is
// done when a call returns, whatever its stream. A function that is missing here is an error of the linker that names
// it.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <vector>

#include "device.h"
#include "regions.h"

namespace {

using ptxsim::Dim3;
using ptxsim::Kernel;

struct Error {
  cudaError_t code = cudaSuccess;  // cleared by cudaGetLastError
  std::string sentence;            // kept until the next error: cudaGetErrorString returns its text
};
thread_local Error last;

cudaError_t fail(cudaError_t code, std::string sentence) {
  last.code = code;
  last.sentence = std::move(sentence);
  return code;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;

Dim3 plain(dim3 size) { return {size.x, size.y, size.z}; }

cudaError_t run(const Kernel* kernel, dim3 grid, dim3 block, size_t shared, void** arguments, Dim3 cluster = {},
                bool cooperative = false) {
  if (kernel == nullptr) return fail(cudaErrorInvalidDeviceFunction, "invalid device function");
  ptxsim::Launch launch;
  launch.grid = plain(grid);
  launch.block = plain(block);
  launch.cluster = cluster;
  launch.dynamic_shared = static_cast<uint32_t>(shared);
  std::string sentence = ptxsim::run(*kernel, std::move(launch), arguments, cooperative);
  return sentence.empty() ? cudaSuccess : fail(cudaErrorLaunchFailure, std::move(sentence));
}

// A range that an operation of the device touches.
cudaError_t check_range(const char* function, const void* begin, size_t bytes) {
  if (bytes == 0) return cudaSuccess;
  const std::string sentence = ptxsim::outside(begin, bytes);
  return sentence.empty() ? cudaSuccess : fail(cudaErrorInvalidValue, std::string(function) + ": " + sentence);
}

int element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ: return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 0;
  }
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  ptxsim::TensorMap encoded;
  std::string sentence = "this element type or swizzle is not emulated";
  if (element_bytes(type) > 0 && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B) {
    sentence = ptxsim::encode_tensor_map(encoded, element_bytes(type), static_cast<int>(rank), base, sizes, strides, box,
                                         element_strides, interleave, static_cast<ptxsim::Swizzle>(swizzle),
                                         fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA);
  }
  if (!sentence.empty()) {
    fail(cudaErrorInvalidValue, "cuTensorMapEncodeTiled: " + sentence);
    return CUDA_ERROR_INVALID_VALUE;
  }
  static_assert(sizeof(CUtensorMap) == sizeof(encoded.opaque));
  std::memcpy(map, encoded.opaque, sizeof(encoded.opaque));
  return CUDA_SUCCESS;
}

CUresult error_string(CUresult, const char** text) {
  *text = last.sentence.c_str();
  return CUDA_SUCCESS;
}

cudaError_t entry_point(const char* symbol, void** function, cudaDriverEntryPointQueryResult* status) {
  const std::string name = symbol;
  *function = name == "cuTensorMapEncodeTiled" ? reinterpret_cast<void*>(encode_tiled)
              : name == "cuGetErrorString"     ? reinterpret_cast<void*>(error_string)
                                               : nullptr;
  if (status != nullptr) *status = *function != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function != nullptr ? cudaSuccess : fail(cudaErrorSymbolNotFound, "named symbol not found: " + name);
}

}  // namespace

// The stubs that nvcc writes.
extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;  // the PTX comes from files, so one handle serves all
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  ptxsim::register_kernel(host, name);
}

void __cudaRegisterVar(void**, char* host, char*, const char* name, int, size_t, int, int) {
  ptxsim::register_variable(host, name);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return fail(cudaErrorMissingConfiguration, "missing launch configuration");
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid;
  *block = top.block;
  *shared = top.shared;
  *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}

// A handle is kept in a static variable of the stub, so it cannot depend on the architecture: it is the host address.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return run(ptxsim::find_kernel(kernel), grid, block, shared, arguments);
}

// Our host code.

cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return run(ptxsim::find_kernel(host), grid, block, shared, arguments);
}

cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                                        cudaStream_t) {
  return run(ptxsim::find_kernel(host), grid, block, shared, arguments, {}, true);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
  Dim3 cluster;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
    } else if (attribute.id == cudaLaunchAttributeCooperative) {
      cooperative = attribute.val.cooperative != 0;
    } else if (attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization) {  // no overlap: always correct
      return fail(cudaErrorNotSupported, "launch attribute " + std::to_string(attribute.id) + " is not emulated");
    }
  }
  return run(ptxsim::find_kernel(host), config->gridDim, config->blockDim, config->dynamicSmemBytes, arguments, cluster,
             cooperative);
}

cudaError_t cudaGetLastError() {
  const cudaError_t code = last.code;
  last.code = cudaSuccess;
  return code;
}

cudaError_t cudaPeekAtLastError() { return last.code; }

const char* cudaGetErrorString(cudaError_t code) { return code == cudaSuccess ? "no error" : last.sentence.c_str(); }

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ptxsim::Limits& limits = ptxsim::limits();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = ptxsim::device().multiprocessors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = limits.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = limits.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = ptxsim::kSharedWithoutOptIn; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = limits.shared_per_block; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = limits.shared_per_multiprocessor; return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = ptxsim::kSharedReserved; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = ptxsim::kThreadsPerMultiprocessor; return cudaSuccess;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = ptxsim::device().registers; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = ptxsim::kBlocksPerMultiprocessor; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 1; return cudaSuccess;
    default: return fail(cudaErrorNotSupported, "device attribute " + std::to_string(attribute) + " is not emulated");
  }
}

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Kernel* kernel = ptxsim::find_kernel(host);
  if (kernel == nullptr) return fail(cudaErrorInvalidDeviceFunction, "invalid device function");
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    kernel->any_cluster = value != 0;
  } else if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    const int static_shared = static_cast<int>(ptxsim::module_of(kernel->name).static_shared(kernel->name));
    const int most = static_cast<int>(ptxsim::limits().shared_per_block) - static_shared;
    if (value < 0 || value > most) {
      return fail(cudaErrorInvalidValue, kernel->name + ": invalid argument: " + std::to_string(value) +
                                             " bytes of dynamic shared memory, possible are " + std::to_string(most) +
                                             " on " + ptxsim::device().options.arch);
    }
    kernel->dynamic_shared_limit = static_cast<uint32_t>(value);
  } else if (attribute != cudaFuncAttributePreferredSharedMemoryCarveout) {  // a hint: no effect on results
    return fail(cudaErrorNotSupported, "function attribute " + std::to_string(attribute) + " is not emulated");
  }
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t shared, unsigned) {
  const Kernel* kernel = ptxsim::find_kernel(host);
  if (kernel == nullptr) return fail(cudaErrorInvalidDeviceFunction, "invalid device function");
  *blocks = ptxsim::blocks_per_multiprocessor(*kernel, static_cast<uint32_t>(threads), static_cast<uint32_t>(shared));
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}

cudaError_t cudaMemsetAsync(void* begin, int value, size_t bytes, cudaStream_t) {
  const cudaError_t error = check_range("cudaMemsetAsync", begin, bytes);
  if (error == cudaSuccess) std::memset(begin, value, bytes);
  return error;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  // With cudaMemcpyDefault either side may be the host's.
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  cudaError_t error = from_device ? check_range("cudaMemcpyAsync, source", from, bytes) : cudaSuccess;
  if (error == cudaSuccess && to_device) error = check_range("cudaMemcpyAsync, destination", to, bytes);
  if (error == cudaSuccess) std::memmove(to, from, bytes);
  return error;
}

cudaError_t cudaGetSymbolAddress(void** address, const void* host) {
  size_t bytes = 0;
  *address = ptxsim::variable(host, &bytes);
  return *address != nullptr ? cudaSuccess : fail(cudaErrorInvalidSymbol, "invalid device symbol");
}

cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* status) {
  return entry_point(symbol, function, status);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  return entry_point(symbol, function, status);
}

}  // extern "C"
