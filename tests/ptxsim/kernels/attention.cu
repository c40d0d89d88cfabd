// Attention forward in the style of FlashAttention-2 (Dao 2023, arXiv:2307.08691): a block of 4 warps owns 64 queries
// of one head and walks over the keys in tiles of 64, double-buffered with cp.async; shared memory is swizzled; scores
// and output stay in registers. Grouped heads; causal masks are aligned to the bottom right; a row without keys is zero.
#include "bug.cuh"
#include "common/cuda/ptx.cuh"

namespace {

using namespace llmkernels::cuda;
using bf16 = __nv_bfloat16;

constexpr int kThreads = 128;
constexpr int kTile = 64;  // queries of a block, and keys of a step
constexpr float kLog2e = 1.44269504f;

struct Params {
  const bf16* q;  // [batch, heads, sq, D]
  const bf16* k;  // [batch, kv_heads, sk, D]
  const bf16* v;  // [batch, kv_heads, sk, D]
  bf16* out;      // [batch, heads, sq, D]
  float* lse;     // [batch, heads, sq], natural logarithm
  int heads, kv_heads, sq, sk;
  float scale;
};

#if BUG == 36
__device__ uint32_t pack_bf16x2(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(low), "f"(high));
  return packed;
}
#else
using ptx::pack_bf16x2;
#endif

// Byte offset of 8 elements (16 bytes) in a tile of rows of D elements. ldmatrix reads one chunk of 8 rows at a time:
// exchanging the chunks of a row by its number puts those into 8 different groups of banks.
template <int D>
__device__ uint32_t swizzled(int row, int chunk) {
  return (row * (D / 8) + (chunk ^ (row % 8))) * 16;
}

// 64 rows of a matrix with `rows` rows from row `first` on, zeros after its last one.
template <int D>
__device__ void fetch(uint32_t tile, const bf16* matrix, int first, int rows) {
  constexpr int kChunks = D / 8;
#pragma unroll
  for (int i = 0; i < kTile * kChunks / kThreads; ++i) {
    const int row = (threadIdx.x + i * kThreads) / kChunks, chunk = threadIdx.x % kChunks;
    const bool inside = kBug<1> || first + row < rows;
    const bf16* source = matrix + (int64_t{first} + row) * D + chunk * 8;
    ptx::cp_async<16>(tile + swizzled<D>(row, chunk), source, inside ? 16 : 0);  // [1] [5]
  }
}

// The fragments of b for 16 rows of a tile, 16 columns each: two pairs.
template <int D>
__device__ void load_keys(uint32_t (&b)[4], uint32_t tile, int first, int chunk) {
  const int lane = threadIdx.x % 32;
  ptx::ldmatrix_x4(b, tile + swizzled<D>(first + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));  // [2] [3] [7]
}
template <int D>
__device__ void load_values(uint32_t (&b)[4], uint32_t tile, int first, int chunk) {
  const int lane = threadIdx.x % 32;
  const uint32_t row = tile + swizzled<D>(first + lane % 16, chunk + lane / 16);
  if constexpr (kBug<6>) {
    ptx::ldmatrix_x4(b, row);
  } else {
    ptx::ldmatrix_x4_trans(b, row);  // [5]
  }
}

__device__ void multiply_pair(float (&left)[4], float (&right)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  const uint32_t first[2] = {b[kBug<4>], b[!kBug<4>]};
  const uint32_t second[2] = {b[2 + kBug<4>], b[2 + !kBug<4>]};
  ptx::mma_m16n8k16<bf16>(left, a, first);
  ptx::mma_m16n8k16<bf16>(right, a, second);
}

// Over the four lanes that share a row of an accumulator.
__device__ float row_max(float value) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    if (!kBug<8> || threadIdx.x % 32 < 16) {
      value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));  // [8]
    }
  }
  return value;
}
__device__ float row_sum(float value) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

template <int D, bool kCausal>
__device__ void attention(const Params& p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int kTileBytes = kTile * D * static_cast<int>(sizeof(bf16));
  const uint32_t q_tile = ptx::shared_address(shared);
  const auto k_tile = [&](int step) { return q_tile + (1 + step % 2) * kTileBytes; };
  const auto v_tile = [&](int step) { return q_tile + (3 + step % 2) * kTileBytes; };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int batch = blockIdx.y / p.heads, head = blockIdx.y % p.heads;
  const int kv = batch * p.kv_heads + head / (p.heads / p.kv_heads);
  const bf16* q = p.q + int64_t{blockIdx.y} * p.sq * D;
  const bf16* k = p.k + int64_t{kv} * p.sk * D;
  const bf16* v = p.v + int64_t{kv} * p.sk * D;
  const int first_query = blockIdx.x * kTile;
  const int diagonal = p.sk - p.sq;  // query i sees keys up to i + diagonal
  const int keys = kCausal ? max(0, min(p.sk, first_query + kTile + diagonal)) : p.sk;
  const int steps = (keys + kTile - 1) / kTile;

  fetch<D>(q_tile, q, first_query, p.sq);
  if (steps > 0) fetch<D>(k_tile(0), k, 0, p.sk);
  ptx::cp_async_commit();
  if (steps > 0) fetch<D>(v_tile(0), v, 0, p.sk);
  ptx::cp_async_commit();

  float out[D / 8][4] = {};
  float most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};  // of rows lane / 4 and lane / 4 + 8 of the warp's 16
  const float scale = p.scale * kLog2e;
  const int row = first_query + warp * 16 + lane / 4;

  for (int step = 0; step < steps; ++step) {
    // In flight, oldest first: keys and values of this step, keys of the next.
    if (step + 1 < steps) fetch<D>(k_tile(step + 1), k, (step + 1) * kTile, p.sk);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kBug<2> ? 3 : 2>();
    // Keys are there; nobody reads the values of step - 1 any more.
    if (!kBug<3> && (!kBug<7> || warp == 0)) __syncthreads();

    float scores[kTile / 8][4] = {};
#pragma unroll
    for (int chunk = 0; chunk < D / 8; chunk += 2) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, q_tile + swizzled<D>(warp * 16 + lane % 16, chunk + lane / 16));  // [2] [3] [7]
#pragma unroll
      for (int key = 0; key < kTile; key += 16) {
        uint32_t b[4];
        load_keys<D>(b, k_tile(step), key, chunk);
        multiply_pair(scores[key / 8], scores[key / 8 + 1], a, b);
      }
    }

    if (step + 1 < steps) fetch<D>(v_tile(step + (kBug<5> ? 0 : 1)), v, (step + 1) * kTile, p.sk);
    ptx::cp_async_commit();

#pragma unroll
    for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = step * kTile + j * 8 + lane % 4 * 2 + e % 2;
        const bool seen = key < p.sk && (!kCausal || key <= row + e / 2 * 8 + diagonal);
        scores[j][e] = seen ? scores[j][e] * scale : -INFINITY;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float next = most[half];
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) next = fmaxf(next, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      next = row_max(next);
      const float base = next == -INFINITY ? 0.0f : next;  // a row without keys so far: exp2(-inf - 0) = 0, not NaN
      const float shrink = ptx::exp2_approx(most[half] - base);
      most[half] = next;
      total[half] *= shrink;
#pragma unroll
      for (int j = 0; j < kTile / 8; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          scores[j][e] = ptx::exp2_approx(scores[j][e] - base);
          total[half] += scores[j][e];
        }
      }
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        out[j][2 * half] *= shrink;
        out[j][2 * half + 1] *= shrink;
      }
    }

    ptx::cp_async_wait<2>();
    __syncthreads();  // values are there; nobody reads the keys of this step any more
#pragma unroll
    for (int key = 0; key < kTile; key += 16) {
      // An accumulator of 16 x 16 scores is laid out like the operand a of the next product.
      const float(&left)[4] = scores[key / 8];
      const float(&right)[4] = scores[key / 8 + 1];
      const uint32_t a[4] = {pack_bf16x2(left[0], left[1]), pack_bf16x2(left[2], left[3]),
                             pack_bf16x2(right[0], right[1]), pack_bf16x2(right[2], right[3])};
#pragma unroll
      for (int chunk = 0; chunk < D / 8; chunk += 2) {
        uint32_t b[4];
        load_values<D>(b, v_tile(step), key, chunk);
        multiply_pair(out[chunk], out[chunk + 1], a, b);
      }
    }
  }

  ptx::cp_async_wait<0>();  // a block without keys has fetched its queries all the same
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = row + half * 8;
    const float sum = row_sum(total[half]);
    if (query >= p.sq) continue;
    const int64_t index = int64_t{blockIdx.y} * p.sq + query;
    const float inverse = sum == 0 ? 0.0f : 1 / sum;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      const uint32_t pair = pack_bf16x2(out[j][2 * half] * inverse, out[j][2 * half + 1] * inverse);
      *reinterpret_cast<uint32_t*>(p.out + index * D + j * 8 + lane % 4 * 2) = pair;
    }
    if (lane % 4 == 0) p.lse[index] = sum == 0 ? -INFINITY : (most[half] + log2f(sum)) / kLog2e;
  }
}

}  // namespace

// Grid (tiles of queries, batch * heads); shared memory for five tiles.
#define ATTENTION(name, D, kCausal)                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                      \
      name(const bf16* q, const bf16* k, const bf16* v, bf16* out, float* lse, int heads, int kv_heads,       \
           int sq, int sk, float scale) {                                                                     \
    attention<D, kCausal>({q, k, v, out, lse, heads, kv_heads, sq, sk, scale});                               \
  }
ATTENTION(attention_d64_full, 64, false)
ATTENTION(attention_d64_causal, 64, true)
ATTENTION(attention_d128_full, 128, false)
ATTENTION(attention_d128_causal, 128, true)
