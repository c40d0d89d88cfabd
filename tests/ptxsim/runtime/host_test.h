// Host code as a launcher of the library may write it, for tests/ptxsim/test_runtime.py. Each function returns CUDA's
// sentence, null for none. `out` is memory of the GPU.
#pragma once

#include <cstdint>

namespace host_test {

// out[i] = i for `blocks` blocks of 32 threads, whatever the size of out.
const char* iota(int* out, int blocks);
// out[i] = i through `bytes` of dynamic shared memory (at least 128), opted in to before if `opt_in`.
const char* through_shared(int* out, int bytes, bool opt_in);
// out[block] = rank in its cluster, by cudaLaunchKernelEx.
const char* cluster_ranks(int* out, int blocks, int cluster);
// out[block] = sum of the numbers of all blocks, exchanged behind a grid barrier in a cooperative launch.
const char* cooperative_sum(int* out, int* scratch, int blocks);
// Fills with cudaMemsetAsync, then copies by cudaMemcpyAsync.
const char* set_and_copy(int* out, int* copy, int64_t bytes);
// out[0] = counter + table[1], both device variables: a first launch adds one to counter, the address comes from
// cudaGetSymbolAddress.
const char* variables(int* out);
// out[32][8] = the box at (row, 0) of in[rows][8], read by TMA through cuTensorMapEncodeTiled.
const char* tensor_map(const int* in, int rows, int row, int* out);
// `misaligned`: a base that the driver refuses.
const char* refused_tensor_map(const int* in);
// How many blocks of 256 threads with `bytes` of dynamic shared memory fit a multiprocessor.
int occupancy(int bytes);

}  // namespace host_test
