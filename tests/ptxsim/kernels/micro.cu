// One mistake, or one legal pattern that looks like one, per kernel. One block of a warp unless told otherwise; `in`
// and `out` have a word per thread unless told otherwise. A line that ends in "// [name]" is where kernel `name` has to
// be reported.
#include <cassert>

#include "common/cuda/ptx.cuh"

using namespace llmkernels::cuda;

#define MICRO(name) extern "C" __global__ void name(const unsigned* in, unsigned* out)

namespace {

// What thread i of the warp contributes, by way of shared memory.
__device__ void exchange(const unsigned* in, unsigned* out, bool synchronised) {
  __shared__ unsigned values[32];
  const int i = threadIdx.x;
  values[i] = in[i];
  if (synchronised) __syncwarp();
  out[i] = values[i ^ 1];  // [missing_syncwarp]
}

// One thread of each block: all wait for all, `arrivals` of them.
__device__ void wait_for_blocks(unsigned* counter, unsigned arrivals, bool fenced) {
  __threadfence();
  atomicAdd(counter, 1u);
  while (atomicAdd(counter, 0u) < arrivals) {
  }
  if (fenced) __threadfence();  // or what follows overtakes the loop: atomics of themselves order nothing
}

// Every block hands its word to the block before it, in place.
__device__ void around_the_blocks(const unsigned* in, unsigned* out, bool fenced) {
  if (threadIdx.x != 0) return;
  out[1 + blockIdx.x] = in[blockIdx.x];
  wait_for_blocks(out, gridDim.x, true);
  const unsigned next = out[1 + (blockIdx.x + 1) % gridDim.x];  // [grid_barrier_without_fence]
  wait_for_blocks(out, 2 * gridDim.x, fenced);
  out[1 + blockIdx.x] = next;  // [grid_barrier_without_fence]
}

__device__ unsigned spin_until(volatile const unsigned* word, unsigned value) {
  while (*word != value) {  // [endless_loop]
  }
  return value;
}

__noinline__ __device__ unsigned recurse(const unsigned* in, unsigned depth) {
  unsigned frame[64];
  for (int i = 0; i < 64; ++i) frame[i] = in[i % 32] + depth;
  return depth == 0 ? frame[in[1] % 64] : recurse(in, depth - 1) + frame[in[depth % 32] % 64];
}

}  // namespace

// ---- To be reported: addresses ----

MICRO(shared_over_read) {  // in[0] = 1
  __shared__ unsigned values[32];
  values[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = values[threadIdx.x + in[0]];  // [shared_over_read]
}
MICRO(shared_under_read) {  // in[0] = 1
  __shared__ unsigned values[32];
  values[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = values[static_cast<int>(threadIdx.x) - static_cast<int>(in[0])];  // [shared_under_read]
}
MICRO(global_over_read) {
  out[threadIdx.x] = in[threadIdx.x + 1];  // [global_over_read]
}
MICRO(global_under_read) {
  out[threadIdx.x] = in[static_cast<int>(threadIdx.x) - 1];  // [global_under_read]
}
MICRO(host_pointer) {  // in is in no device buffer
  out[threadIdx.x] = in[threadIdx.x];  // [host_pointer]
}
MICRO(misaligned_vector_load) {
  const uint4 words = *reinterpret_cast<const uint4*>(in + 1);  // [misaligned_vector_load]
  out[threadIdx.x] = words.x + words.y + words.z + words.w;
}
MICRO(misaligned_ldmatrix_row) {
  __shared__ __align__(16) unsigned tile[40];
  for (int i = threadIdx.x; i < 40; i += 32) tile[i] = in[i % 32];
  __syncwarp();
  uint32_t values[1];
  ptx::ldmatrix_x1(values, ptx::shared_address(tile) + threadIdx.x % 8 * 16 + 8);  // [misaligned_ldmatrix_row]
  out[threadIdx.x] = values[0];
}
MICRO(misaligned_cp_async_source) {
  __shared__ __align__(16) unsigned tile[4];
  if (threadIdx.x == 0) ptx::cp_async<16>(ptx::shared_address(tile), in + 1);  // [misaligned_cp_async_source]
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x % 4];
}
MICRO(local_array_overflow) {  // in[0] = 4
  unsigned values[4];
  for (unsigned i = 0; i < 4; ++i) values[(i + in[1]) % 4] = in[i];
  values[in[0]] = 7;  // [local_array_overflow]
  out[threadIdx.x] = values[in[1] % 4];
}
MICRO(stack_overflow) {  // in[0] = 1000000
  out[threadIdx.x] = recurse(in, in[0]);
}

// ---- To be reported: order ----

MICRO(uninitialised_shared) {
  __shared__ unsigned values[32];
  if (threadIdx.x < 31) values[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = values[31 - threadIdx.x];  // [uninitialised_shared]
}
MICRO(unwaited_cp_async) {
  __shared__ __align__(16) unsigned tile[128];
  ptx::cp_async<4>(ptx::shared_address(tile + threadIdx.x), in + threadIdx.x);
  ptx::cp_async_commit();
  out[threadIdx.x] = 0;
}
MICRO(cp_async_read_in_flight) {
  __shared__ __align__(16) unsigned tile[32];
  ptx::cp_async<4>(ptx::shared_address(tile + threadIdx.x), in + threadIdx.x);
  ptx::cp_async_commit();
  out[threadIdx.x] = tile[threadIdx.x];  // [cp_async_read_in_flight]
  ptx::cp_async_wait<0>();
}
MICRO(missing_syncwarp) { exchange(in, out, false); }
MICRO(cross_block_sum) {  // several blocks; out[0] = 0
  if (threadIdx.x == 0) out[0] += in[blockIdx.x];  // [cross_block_sum]
}
MICRO(cross_block_read) {  // two blocks, of which one reads what the other writes
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[0] = in[0];  // [cross_block_read]
  } else {
    out[1] = out[0];  // [cross_block_read]
  }
}
MICRO(grid_barrier_without_fence) {  // cooperative, several blocks; out [1 + blocks], out[0] = 0
  around_the_blocks(in, out, false);
}

// ---- To be reported: who takes part ----

MICRO(exited_lane_in_mask) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);  // [exited_lane_in_mask]
}
MICRO(barrier_short_of_threads) {  // two warps, of which one comes
  if (threadIdx.x < 32) ptx::named_barrier_sync(1, 64);
  out[threadIdx.x] = in[threadIdx.x];
}
MICRO(barrier_under_divergence) {  // half of the warp is at another barrier of the program
  if (threadIdx.x % 32 < 16) __syncthreads();  // [barrier_under_divergence]
  out[threadIdx.x] = in[threadIdx.x];
  __syncthreads();  // [barrier_under_divergence]
  out[threadIdx.x] += in[threadIdx.x];
}
MICRO(two_barriers_deadlock) {  // two warps
  const int warp = threadIdx.x / 32;
  ptx::named_barrier_sync(1 + warp, 64);  // [two_barriers_deadlock]
  ptx::named_barrier_sync(2 - warp, 64);
  out[threadIdx.x] = in[threadIdx.x];
}
MICRO(endless_loop) {  // in[0] = 0
  out[threadIdx.x] = spin_until(in, 1);
}
MICRO(trap) {
  if (in[threadIdx.x] == 5) __trap();
  out[threadIdx.x] = 0;
}
MICRO(failed_assert) {
  assert(in[threadIdx.x] != 5);
  out[threadIdx.x] = 0;
}

// ---- Legal ----

MICRO(early_exit_before_barrier) {  // two warps; the second is there in part
  __shared__ unsigned values[40];
  if (threadIdx.x >= 40) return;
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[39 - threadIdx.x];
}
MICRO(arrive_and_sync) {  // two warps: the first produces twice, the second consumes
  __shared__ unsigned values[32];
  const int lane = threadIdx.x % 32;
  for (int round = 0; round < 2; ++round) {
    if (threadIdx.x < 32) {
      values[lane] = in[lane + 32 * round];
      ptx::named_barrier_arrive(1, 64);
      ptx::named_barrier_sync(2, 64);
    } else {
      ptx::named_barrier_sync(1, 64);
      out[lane + 32 * round] = values[lane ^ 1];
      ptx::named_barrier_arrive(2, 64);
    }
  }
}
MICRO(half_warp_masks) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, in[threadIdx.x], 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(0xffff0000u, in[threadIdx.x], 3) + 1;
  }
}
MICRO(exchange_with_syncwarp) { exchange(in, out, true); }
MICRO(several_named_barriers) {  // four warps in two pairs, which take two different numbers of rounds
  __shared__ unsigned values[2][64];
  const int pair = threadIdx.x / 64, i = threadIdx.x % 64;
  unsigned value = in[threadIdx.x];
  for (int round = 0; round <= pair; ++round) {
    values[pair][i] = value;
    ptx::named_barrier_sync(3 + pair, 64);
    value = values[pair][(i + 33) % 64];
    ptx::named_barrier_sync(5 + pair, 64);
  }
  out[threadIdx.x] = value;
}
MICRO(same_value_stores) {
  __shared__ unsigned value;
  value = in[0];
  out[0] = in[0];
  __syncwarp();
  if (threadIdx.x > 0) out[threadIdx.x] = value;
}
MICRO(atomics) {  // several blocks of two warps; out [4] = 0: how many words of in are 0, 1, 2, 3 modulo 4
  __shared__ unsigned counts[4];
  if (threadIdx.x < 4) counts[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(counts + in[blockIdx.x * blockDim.x + threadIdx.x] % 4, 1u);
  __syncthreads();
  if (threadIdx.x < 4) atomicAdd(out + threadIdx.x, counts[threadIdx.x]);
}
MICRO(last_block_sums) {  // out [1 + blocks], out[0] = 0: the block that arrives last reads what the others wrote
  __shared__ bool last;
  if (threadIdx.x == 0) {
    out[1 + blockIdx.x] = in[blockIdx.x];
    __threadfence();
    last = atomicAdd(out, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  unsigned sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += out[1 + i];
  out[0] = sum;
}
MICRO(grid_barrier) {  // cooperative, several blocks; out [1 + blocks], out[0] = 0
  around_the_blocks(in, out, true);
}
