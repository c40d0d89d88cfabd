// One PTX instruction per function, for sm_80 and newer; ptx_sm90.cuh has Hopper's. Nowhere else in the library is
// there inline PTX that does something.
//
// The quoted words are section titles of chapter 9.7 of the PTX ISA manual (version 9.0). Shared memory is named by its
// 32-bit address. Whatever touches memory behind the compiler's back clobbers "memory", so that the C++ loads and
// stores around it stay where they were written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace llmkernels::cuda::ptx {

// The 32-bit address, within the shared window, of an object in shared memory.
__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- "cp.async": global to shared memory, while the thread goes on ----

// Copies the first `bytes` of kBytes = 4, 8 or 16 and fills the rest with zeros; 0 reads nothing. 16 bytes bypass L1.
template <int kBytes>
__device__ inline void cp_async(uint32_t shared, const void* global, int bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}

// "cp.async.commit_group": what this thread issued since the last one becomes a group, possibly an empty one.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// "cp.async.wait_group": all but the newest kPending groups of this thread have landed, for this thread only.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- "ldmatrix", "stmatrix": 8x8 tiles of 16-bit elements between shared memory and the registers of a warp ----
//
// Lanes 8q .. 8q+7 give the row addresses of tile q, each aligned to 16 bytes. A lane holds, of tile q, row lane / 4
// and columns 2 * (lane % 4) + {0, 1}; the transposed forms exchange row and column.

__device__ inline void ldmatrix_x1(uint32_t (&tile)[1], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(tile[0]) : "r"(row) : "memory");
}
__device__ inline void ldmatrix_x2(uint32_t (&tile)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(tile[0]), "=r"(tile[1])
               : "r"(row)
               : "memory");
}
__device__ inline void ldmatrix_x4(uint32_t (&tile)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(row)
               : "memory");
}
__device__ inline void ldmatrix_x1_trans(uint32_t (&tile)[1], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(tile[0]) : "r"(row) : "memory");
}
__device__ inline void ldmatrix_x2_trans(uint32_t (&tile)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(tile[0]), "=r"(tile[1])
               : "r"(row)
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&tile)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(row)
               : "memory");
}

// ---- "mma": d += a * b within a warp ----
//
// g = lane / 4, t = lane % 4. The accumulator of all of them: d[0], d[1] are row g, columns 2t, 2t + 1; d[2], d[3] the
// same of row g + 8.

// T = __nv_bfloat16 or __half. a[r]: row g + 8 * (r & 1), k = 2t + 8 * (r >> 1) + {0, 1}; b[r]: k = 2t + 8r + {0, 1} of
// column g.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// a[r]: row g + 8 * (r & 1), k = t + 4 * (r >> 1); b[r]: k = t + 4r of column g.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Byte j of a[r]: row g + 8 * (r & 1), k = 4t + j + 16 * (r >> 1); byte j of b[r]: k = 4t + j + 16r of column g. Sums
// wrap around.
__device__ inline void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Fragments as in mma_m16n8k32_s8.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
__device__ inline void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// ---- "cvt": two floats to one register of two 16-bit floats, to nearest even; `low` goes to the low half ----

__device__ inline uint32_t pack_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ inline uint32_t pack_f16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// To 19 bits, ties away from zero: what the tf32 mma expects in its operands.
__device__ inline uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

// "ex2": 2^x by the special function unit; the relative error is below 2^-22, subnormals count as zero.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- "red", "ld": words in global memory by which blocks of a grid wait for each other ----

// Adds, and makes everything that this thread wrote or has seen (what is ordered before it by a barrier of the block
// too) visible to whoever acquires the word.
__device__ inline void red_add_release_gpu(unsigned* word, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "r"(value)
               : "memory");
}
__device__ inline unsigned ld_acquire_gpu(const unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(word))
               : "memory");
  return value;
}

// "bar": a barrier of `threads` threads (a multiple of 32) that need not be the whole block. Barrier 0 is
// __syncthreads.
__device__ inline void named_barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// The same without waiting: the others learn that this warp is there.
__device__ inline void named_barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace llmkernels::cuda::ptx
