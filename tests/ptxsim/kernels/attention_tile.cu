// Causal attention forward in bf16 with mma, ldmatrix and double-buffered cp.async: a test kernel of the interpreter,
// with bugs to be planted by -DBUG=n. One block: 64 query rows, 4 warps of 16 rows; head dim 64.
#include <cuda_bf16.h>

#include <cstdint>

#ifndef BUG
#define BUG 0
#endif

constexpr int kRows = 64, kDim = 64, kThreads = 128;

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Byte offset of 16-byte chunk `chunk` of row `row`, swizzled so that eight rows of a matrix lie in eight bank groups.
__device__ uint32_t offset(int row, int chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }

__device__ void copy16(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
}

__device__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ void load_matrices_trans(uint32_t (&r)[4], uint32_t address) {
#if BUG == 6
  load_matrices(r, address);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
#endif
}

__device__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// A tile of 64 rows into shared memory; rows past the end are zero.
__device__ void load_tile(uint32_t to, const __nv_bfloat16* base, int first, int rows) {
  for (int i = threadIdx.x; i < kRows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    const int source = first + row;
#if BUG == 1
    const bool inside = true;
#else
    const bool inside = source < rows;
#endif
    copy16(to + offset(row, chunk), base + static_cast<int64_t>(BUG == 1 || inside ? source : 0) * kDim + chunk * 8, inside);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads) attention(const __nv_bfloat16* q, const __nv_bfloat16* k,
                                                                const __nv_bfloat16* v, __nv_bfloat16* out, int length,
                                                                float scale) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t q_tile = shared_address(shared), k_tiles = q_tile + 8192, v_tiles = k_tiles + 16384;
  const int64_t head = static_cast<int64_t>(blockIdx.y) * length * kDim;
  const int first = blockIdx.x * kRows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles = min((length + kRows - 1) / kRows, static_cast<int>(blockIdx.x) + 1);

  load_tile(q_tile, q + head, first, length);
  load_tile(k_tiles, k + head, 0, length);
  load_tile(v_tiles, v + head, 0, length);
  asm volatile("cp.async.commit_group;");

  float o[8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
  uint32_t qa[4][4];
  for (int tile = 0; tile < tiles; ++tile) {
    const int stage = tile & 1;
    if (tile + 1 < tiles) {
#if BUG == 5
      const int next = stage;
#else
      const int next = stage ^ 1;
#endif
      load_tile(k_tiles + (stage ^ 1) * 8192, k + head, (tile + 1) * kRows, length);
      load_tile(v_tiles + next * 8192, v + head, (tile + 1) * kRows, length);
    }
    asm volatile("cp.async.commit_group;");
#if BUG == 2
    asm volatile("cp.async.wait_group 2;");
#else
    asm volatile("cp.async.wait_group 1;");
#endif
#if BUG == 7
    if (warp == 0) __syncthreads();
#elif BUG != 3
    __syncthreads();
#endif
    if (tile == 0) {
      for (int s = 0; s < 4; ++s) load_matrices(qa[s], q_tile + offset(warp * 16 + lane % 16, s * 2 + lane / 16));
    }
    float p[8][4] = {};
    for (int s = 0; s < 4; ++s) {
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_matrices(b, k_tiles + stage * 8192 + offset(n * 16 + lane % 8 + (lane / 16) * 8, s * 2 + (lane / 8) % 2));
#if BUG == 4
        mma(p[2 * n], qa[s], b[1], b[0]);
#else
        mma(p[2 * n], qa[s], b[0], b[1]);
#endif
        mma(p[2 * n + 1], qa[s], b[2], b[3]);
      }
    }
    const int row0 = first + warp * 16 + lane / 4;
    for (int n = 0; n < 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        const int col = tile * kRows + n * 8 + 2 * (lane % 4) + (e & 1), row = row0 + 8 * (e / 2);
        p[n][e] = col <= row && col < length ? p[n][e] * scale : -INFINITY;
      }
    }
    for (int h = 0; h < 2; ++h) {
      float most = row_max[h];
      for (int n = 0; n < 8; ++n) most = fmaxf(most, fmaxf(p[n][2 * h], p[n][2 * h + 1]));
#if BUG == 8
      if (lane < 16)
#endif
      {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      }
      const float correction = exp2f(row_max[h] - most);
      row_max[h] = most;
      row_sum[h] *= correction;
      for (int n = 0; n < 8; ++n) {
        o[n][2 * h] *= correction, o[n][2 * h + 1] *= correction;
        p[n][2 * h] = exp2f(p[n][2 * h] - most), p[n][2 * h + 1] = exp2f(p[n][2 * h + 1] - most);
        row_sum[h] += p[n][2 * h] + p[n][2 * h + 1];
      }
    }
    for (int s = 0; s < 4; ++s) {
      const uint32_t a[4] = {pack(p[2 * s][0], p[2 * s][1]), pack(p[2 * s][2], p[2 * s][3]),
                             pack(p[2 * s + 1][0], p[2 * s + 1][1]), pack(p[2 * s + 1][2], p[2 * s + 1][3])};
      for (int n = 0; n < 4; ++n) {
        uint32_t b[4];
        load_matrices_trans(b, v_tiles + stage * 8192 + offset(s * 16 + lane % 16, n * 2 + lane / 16));
        mma(o[2 * n], a, b[0], b[1]);
        mma(o[2 * n + 1], a, b[2], b[3]);
      }
    }
#if BUG != 9
    __syncthreads();
#endif
  }
  asm volatile("cp.async.wait_all;");
  for (int h = 0; h < 2; ++h) {
    float sum = row_sum[h];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const int row = first + warp * 16 + lane / 4 + 8 * h;
    if (row >= length) continue;
    for (int n = 0; n < 8; ++n) {
      const uint32_t pair = pack(o[n][2 * h] / sum, o[n][2 * h + 1] / sum);
      *reinterpret_cast<uint32_t*>(out + head + static_cast<int64_t>(row) * kDim + n * 8 + 2 * (lane % 4)) = pair;
    }
  }
}
