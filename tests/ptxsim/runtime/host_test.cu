#include "host_test.h"

#include <cooperative_groups.h>
#include <cuda.h>
#include <cuda_runtime.h>

namespace host_test {
namespace {

__device__ int counter = 40;
__constant__ int table[2] = {0, 1};

__global__ void iota_kernel(int* out) { out[blockIdx.x * 32 + threadIdx.x] = blockIdx.x * 32 + threadIdx.x; }

__global__ void through_shared_kernel(int* out) {
  extern __shared__ int shared[];
  shared[31 - threadIdx.x] = 31 - threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void cluster_ranks_kernel(int* out) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) out[blockIdx.x] = cooperative_groups::this_cluster().block_rank();
#endif
}

__global__ void cooperative_sum_kernel(int* out, int* scratch) {
  if (threadIdx.x == 0) scratch[blockIdx.x] = blockIdx.x;
  cooperative_groups::this_grid().sync();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < gridDim.x; ++i) sum += scratch[i];
    out[blockIdx.x] = sum;
  }
}

__global__ void count_kernel() { counter += 1; }
__global__ void read_kernel(int* out) { out[0] = counter + table[1]; }

__global__ void tensor_map_kernel(const __grid_constant__ CUtensorMap map, int row, int* out) {
#if __CUDA_ARCH__ >= 900
  __shared__ alignas(128) int tile[32 * 8];
  __shared__ alignas(8) uint64_t barrier;
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(at) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at), "r"(32 * 8 * 4) : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(&map), "r"(0), "r"(row), "r"(at)
        : "memory");
  }
  __syncthreads();
  asm volatile(
      "{\n.reg .pred done;\nwait:\nmbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n@!done bra wait;\n}" ::"r"(at)
      : "memory");
  for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = tile[threadIdx.x * 8 + i];
#endif
}

const char* sentence(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

const char* encode(CUtensorMap& map, const int* in, int rows) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const cuuint64_t sizes[2] = {8, static_cast<cuuint64_t>(rows)}, strides[1] = {32};
  const cuuint32_t box[2] = {8, 32}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<Encode>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_INT32, 2, const_cast<int*>(in), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : sentence(cudaGetLastError());
}

}  // namespace

const char* iota(int* out, int blocks) {
  iota_kernel<<<blocks, 32>>>(out);
  return sentence(cudaGetLastError());
}

const char* through_shared(int* out, int bytes, bool opt_in) {
  if (opt_in) {
    const cudaError_t error =
        cudaFuncSetAttribute(through_shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return sentence(cudaGetLastError());
  }
  through_shared_kernel<<<1, 32, bytes>>>(out);
  return sentence(cudaGetLastError());
}

const char* cluster_ranks(int* out, int blocks, int cluster) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = 32;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, cluster_ranks_kernel, out);
  return sentence(cudaGetLastError());
}

const char* cooperative_sum(int* out, int* scratch, int blocks) {
  void* arguments[] = {&out, &scratch};
  cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(cooperative_sum_kernel), blocks, 32, arguments, 0, nullptr);
  return sentence(cudaGetLastError());
}

const char* set_and_copy(int* out, int* copy, int64_t bytes) {
  cudaMemsetAsync(out, 1, bytes, nullptr);
  const char* error = sentence(cudaGetLastError());
  if (error != nullptr) return error;
  cudaMemcpyAsync(copy, out, bytes, cudaMemcpyDeviceToDevice, nullptr);
  return sentence(cudaGetLastError());
}

const char* variables(int* out) {
  void* address = nullptr;
  cudaError_t error = cudaGetSymbolAddress(&address, counter);
  if (error == cudaSuccess) error = cudaMemsetAsync(address, 0, sizeof(int), nullptr);
  if (error != cudaSuccess) return sentence(error);
  count_kernel<<<1, 1>>>();
  read_kernel<<<1, 1>>>(out);
  return sentence(cudaGetLastError());
}

const char* tensor_map(const int* in, int rows, int row, int* out) {
  CUtensorMap map;
  const char* error = encode(map, in, rows);
  if (error != nullptr) return error;
  tensor_map_kernel<<<1, 32>>>(map, row, out);
  return sentence(cudaGetLastError());
}

const char* refused_tensor_map(const int* in) {
  CUtensorMap map;
  return encode(map, in + 1, 64);
}

int occupancy(int bytes) {
  int blocks = 0;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, through_shared_kernel, 256, bytes);
  return blocks;
}

}  // namespace host_test
