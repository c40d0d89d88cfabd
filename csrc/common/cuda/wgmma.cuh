// Hopper's asynchronous warpgroup products, one instruction per function (sm_90a); conventions as in ptx.cuh. The
// sections are in the chapter "Asynchronous Warpgroup Level Matrix Instructions" of the PTX ISA manual.
//
//   wgmma_fence(); wgmma_m64k16<...>(d, a, b) ...; wgmma_commit(); wgmma_wait_all(d);
#pragma once

#include "common/cuda/ptx_sm90.cuh"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

namespace llmkernels::cuda::ptx {

// "wgmma.fence": before the first wgmma that touches registers which this warp wrote.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group": the wgmma since the last one become a group.
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "wgmma.wait_group": all but the newest kPending groups are done.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// All groups are done, and the compiler does not read the accumulator earlier.
template <int kCount>
__device__ inline void wgmma_wait_all(float (&d)[kCount]) {
  wgmma_wait<0>();
#pragma unroll
  for (float& value : d) asm volatile("" : "+f"(value)::"memory");
}

// ---- "Matrix Descriptor Format" ----
//
//   63 62 | 61 .. 52 | 51 .. 49    | 48 .. 46 | 45 .. 32 | 31 30 | 29 .. 16 | 15 14 | 13 .. 0
//   mode  | 0        | base offset | 0        | SBO      | 0     | LBO      | 0     | start       in units of 16 bytes
//
// With W = 8, 4, 2 for a swizzle of 128, 64, 32 bytes: a K-major operand is made of rows of 16 W bytes, eight of which
// are a core block; SBO is the step from eight rows (of M or N) to the next eight, LBO is not used. The base offset is
// zero when blocks of 8 rows start at multiples of 128 W bytes.
enum class Swizzle : uint64_t { kNone = 0, k128B = 1, k64B = 2, k32B = 3 };

__device__ inline uint64_t wgmma_descriptor(uint32_t shared, int leading_bytes, int stride_bytes, Swizzle swizzle) {
  const auto field = [](int bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return field(static_cast<int>(shared)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 |
         static_cast<uint64_t>(swizzle) << 62;
}

// ---- "wgmma.mma_async": d[64, kN] = a[64, 16] * b[16, kN] (+ d unless `scale_d` is 0) by four warps ----
//
// Warp w of the four owns rows 16w .. 16w + 15. Element e of d: row 16w + lane / 4 + 8 * ((e >> 1) & 1), column
// 8 * (e / 4) + 2 * (lane % 4) + (e & 1). An a in registers has the fragments of mma_m16n8k16. kTransA, kTransB = 1:
// the operand in shared memory is M- or N-major.
template <class T, int kN, int kTransA = 0, int kTransB = 0>
__device__ void wgmma_m64k16(float (&d)[kN / 2], uint64_t a, uint64_t b, int scale_d);
template <class T, int kN, int kTransB = 0>
__device__ void wgmma_m64k16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int scale_d);

// What a kN needs in the text of the instruction, operands %0 .. %(kN / 2 - 1), and among its operands.
#define LLMKERNELS_TEN(t)                                                                                       \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define LLMKERNELS_REGS_8 "%0, %1, %2, %3"
#define LLMKERNELS_REGS_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define LLMKERNELS_REGS_32 LLMKERNELS_TEN() "%10, %11, %12, %13, %14, %15"
#define LLMKERNELS_REGS_64 LLMKERNELS_TEN() LLMKERNELS_TEN(1) LLMKERNELS_TEN(2) "%30, %31"
#define LLMKERNELS_TO_40 LLMKERNELS_TEN() LLMKERNELS_TEN(1) LLMKERNELS_TEN(2) LLMKERNELS_TEN(3)
#define LLMKERNELS_REGS_96 LLMKERNELS_TO_40 "%40, %41, %42, %43, %44, %45, %46, %47"
#define LLMKERNELS_REGS_128 LLMKERNELS_TO_40 LLMKERNELS_TEN(4) LLMKERNELS_TEN(5) "%60, %61, %62, %63"
#define LLMKERNELS_TO_90                                                                        \
  LLMKERNELS_TO_40 LLMKERNELS_TEN(4) LLMKERNELS_TEN(5) LLMKERNELS_TEN(6) LLMKERNELS_TEN(7) LLMKERNELS_TEN(8)
#define LLMKERNELS_REGS_192 LLMKERNELS_TO_90 "%90, %91, %92, %93, %94, %95"
#define LLMKERNELS_TO_120 LLMKERNELS_TO_90 LLMKERNELS_TEN(9) LLMKERNELS_TEN(10) LLMKERNELS_TEN(11)
#define LLMKERNELS_REGS_256 LLMKERNELS_TO_120 "%120, %121, %122, %123, %124, %125, %126, %127"

#define LLMKERNELS_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LLMKERNELS_D8(i) LLMKERNELS_D4(i), LLMKERNELS_D4(i + 4)
#define LLMKERNELS_D16(i) LLMKERNELS_D8(i), LLMKERNELS_D8(i + 8)
#define LLMKERNELS_D32(i) LLMKERNELS_D16(i), LLMKERNELS_D16(i + 16)
#define LLMKERNELS_D64(i) LLMKERNELS_D32(i), LLMKERNELS_D32(i + 32)
#define LLMKERNELS_D_8 LLMKERNELS_D4(0)
#define LLMKERNELS_D_16 LLMKERNELS_D8(0)
#define LLMKERNELS_D_32 LLMKERNELS_D16(0)
#define LLMKERNELS_D_64 LLMKERNELS_D32(0)
#define LLMKERNELS_D_96 LLMKERNELS_D32(0), LLMKERNELS_D16(32)
#define LLMKERNELS_D_128 LLMKERNELS_D64(0)
#define LLMKERNELS_D_192 LLMKERNELS_D64(0), LLMKERNELS_D32(64)
#define LLMKERNELS_D_256 LLMKERNELS_D64(0), LLMKERNELS_D64(64)

// The operands that follow have numbers p0 = kN / 2, p1, ..: a (one descriptor or four registers), b, scale_d, and the
// majors.
#define LLMKERNELS_WGMMA(T, kType, kN, p0, p1, p2, p3, p4, p5, p6)                                              \
  template <int kTransA, int kTransB>                                                                           \
  struct Wgmma<T, kN, kTransA, kTransB> {                                                                       \
    static __device__ void run(float (&d)[kN / 2], uint64_t a, uint64_t b, int scale_d) {                       \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p2 ", 0;\n"                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType                           \
                   " {" LLMKERNELS_REGS_##kN "}, %" #p0 ", %" #p1 ", p, 1, 1, %" #p3 ", %" #p4 ";\n}"           \
                   : LLMKERNELS_D_##kN                                                                          \
                   : "l"(a), "l"(b), "r"(scale_d), "n"(kTransA), "n"(kTransB)                                   \
                   : "memory");                                                                                 \
    }                                                                                                           \
    static __device__ void run(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p5 ", 0;\n"                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #kN "k16.f32." kType "." kType " {" LLMKERNELS_REGS_##kN \
                   "}, {%" #p0 ", %" #p1 ", %" #p2 ", %" #p3 "}, %" #p4 ", p, 1, 1, %" #p6 ";\n}"               \
                   : LLMKERNELS_D_##kN                                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(scale_d), "n"(kTransB)             \
                   : "memory");                                                                                 \
    }                                                                                                           \
  };
#define LLMKERNELS_WGMMA_BOTH(kN, ...)                 \
  LLMKERNELS_WGMMA(__nv_bfloat16, "bf16", kN, __VA_ARGS__) \
  LLMKERNELS_WGMMA(__half, "f16", kN, __VA_ARGS__)

template <class T, int kN, int kTransA, int kTransB>
struct Wgmma;
LLMKERNELS_WGMMA_BOTH(8, 4, 5, 6, 7, 8, 9, 10)
LLMKERNELS_WGMMA_BOTH(16, 8, 9, 10, 11, 12, 13, 14)
LLMKERNELS_WGMMA_BOTH(32, 16, 17, 18, 19, 20, 21, 22)
LLMKERNELS_WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37, 38)
LLMKERNELS_WGMMA_BOTH(96, 48, 49, 50, 51, 52, 53, 54)
LLMKERNELS_WGMMA_BOTH(128, 64, 65, 66, 67, 68, 69, 70)
LLMKERNELS_WGMMA_BOTH(192, 96, 97, 98, 99, 100, 101, 102)
LLMKERNELS_WGMMA_BOTH(256, 128, 129, 130, 131, 132, 133, 134)

template <class T, int kN, int kTransA, int kTransB>
__device__ inline void wgmma_m64k16(float (&d)[kN / 2], uint64_t a, uint64_t b, int scale_d) {
  Wgmma<T, kN, kTransA, kTransB>::run(d, a, b, scale_d);
}
template <class T, int kN, int kTransB>
__device__ inline void wgmma_m64k16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, int scale_d) {
  Wgmma<T, kN, 0, kTransB>::run(d, a, b, scale_d);
}


}  // namespace llmkernels::cuda::ptx

#endif
