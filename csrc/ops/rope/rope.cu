#include "common/cuda/launch.h"
#include "common/cuda/vec.cuh"
#include "ops/rope/rope_cuda.h"

namespace llmkernels::cuda {
namespace {

// Which heads of which tensor at which place an item is, and the row of cos and sin that turns them.
struct Item {
  int64_t batch, place, row;
  const RopeTensor* tensor;
  int64_t first;  // head
  bool inside;    // whether the table has the row
};

__device__ inline Item item_of(const RopeParams& p, int64_t index) {
  Item item;
  const int64_t of_q = (p.tensors[0].heads + kRopeHeads - 1) / kRopeHeads;
  const int64_t of_place = of_q + (p.tensors[1].heads + kRopeHeads - 1) / kRopeHeads;
  const int64_t token = index / of_place, part = index - token * of_place;
  item.batch = token / p.seq;
  item.place = token - item.batch * p.seq;
  item.tensor = part < of_q ? &p.tensors[0] : &p.tensors[1];
  item.first = (part < of_q ? part : part - of_q) * kRopeHeads;
  item.row = item.place;
  if (p.positions != nullptr) {
    const int64_t at = item.batch * p.position_batch_stride + item.place * p.position_seq_stride;
    item.row = p.narrow_positions ? static_cast<const int32_t*>(p.positions)[at] : static_cast<const int64_t*>(p.positions)[at];
  }
  item.inside = item.row >= 0 && item.row < p.length;
  return item;
}

// Vectors `first` and `second` of kRopeHeads heads hold the pairs: in the same lanes if half-rotated, else neighbours.
template <class T, bool kInterleaved, int kVec>
__device__ void turn(const RopeParams& p, const Item& item, int64_t first, int64_t second, const Acc<T> (&c)[kVec],
                     const Acc<T> (&s)[kVec]) {
  const RopeTensor& t = *item.tensor;
  const T* x = static_cast<const T*>(t.x) + item.batch * t.x_batch_stride + item.place * t.x_seq_stride;
  T* y = static_cast<T*>(t.y) + item.batch * t.y_batch_stride + item.place * t.y_seq_stride;
  Vec<T, kVec> a[kRopeHeads], b[kRopeHeads];
#pragma unroll
  for (int i = 0; i < kRopeHeads; ++i) {
    if (item.first + i >= t.heads) break;
    a[i] = load<T, kVec>(x + (item.first + i) * t.x_head_stride, first);
    b[i] = load<T, kVec>(x + (item.first + i) * t.x_head_stride, second);
  }
#pragma unroll
  for (int i = 0; i < kRopeHeads; ++i) {
    if (item.first + i >= t.heads) break;
    T in[2 * kVec], out[2 * kVec];
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      in[j] = a[i].at[j];
      in[kVec + j] = b[i].at[j];
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const int one = kInterleaved ? 2 * j : j, other = kInterleaved ? 2 * j + 1 : kVec + j;
      const Acc<T> u = widen(in[one]), v = widen(in[other]);
      out[one] = narrow<T>(u * c[j] - v * s[j]);
      out[other] = narrow<T>(v * c[j] + u * s[j]);
    }
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      a[i].at[j] = out[j];
      b[i].at[j] = out[kVec + j];
    }
    store(y + (item.first + i) * t.y_head_stride, first, a[i]);
    store(y + (item.first + i) * t.y_head_stride, second, b[i]);
  }
}

// The elements of the heads that are not turned.
template <class T, int kVec>
__device__ void copy_rest(const RopeParams& p, const Item& item) {
  const RopeTensor& t = *item.tensor;
  if (t.x == t.y) return;
  const T* x = static_cast<const T*>(t.x) + item.batch * t.x_batch_stride + item.place * t.x_seq_stride;
  T* y = static_cast<T*>(t.y) + item.batch * t.y_batch_stride + item.place * t.y_seq_stride;
  for (int64_t index = 2 * p.half / kVec + threadIdx.x; index < p.cols / kVec; index += blockDim.x) {
    for (int64_t head = item.first; head < item.first + kRopeHeads && head < t.heads; ++head) {
      store(y + head * t.y_head_stride, index, load<T, kVec>(x + head * t.x_head_stride, index));
    }
  }
}

template <class T, bool kInterleaved, int kVec>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const RopeParams p) {
  const int64_t items = p.batch * p.seq *
                        ((p.tensors[0].heads + kRopeHeads - 1) / kRopeHeads + (p.tensors[1].heads + kRopeHeads - 1) / kRopeHeads);
  const bool wide_table = p.table_dtype != p.dtype;
  const int64_t bytes = wide_table ? sizeof(Acc<T>) : sizeof(T);
  const int64_t vectors = p.half / kVec, step = int64_t{gridDim.x} * blockDim.y;
  for (int64_t index = int64_t{blockIdx.x} * blockDim.y + threadIdx.y; index < items; index += step) {
    const Item item = item_of(p, index);
    const int64_t row = item.inside ? item.row : 0;
    const char* cos = static_cast<const char*>(p.cos) + (item.batch * p.cos_batch_stride + row * p.cos_row_stride) * bytes;
    const char* sin = static_cast<const char*>(p.sin) + (item.batch * p.sin_batch_stride + row * p.sin_row_stride) * bytes;
#pragma unroll 1
    for (int64_t vector = threadIdx.x; vector < vectors; vector += blockDim.x) {
      Acc<T> c[kVec], s[kVec];
      load_widened<T, kVec>(cos, wide_table, vector, c);
      load_widened<T, kVec>(sin, wide_table, vector, s);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        if (p.inverse) s[j] = -s[j];
        if (!item.inside) c[j] = s[j] = static_cast<Acc<T>>(__int_as_float(0x7fc00000));
      }
      turn<T, kInterleaved, kVec>(p, item, kInterleaved ? 2 * vector : vector, kInterleaved ? 2 * vector + 1 : vectors + vector,
                                  c, s);
    }
    copy_rest<T, kVec>(p, item);
  }
}

using Kernel = void (*)(RopeParams);

template <class T>
Kernel choose(bool interleaved, bool wide) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  if (interleaved) return wide ? rope_kernel<T, true, kWide> : rope_kernel<T, true, 1>;
  return wide ? rope_kernel<T, false, kWide> : rope_kernel<T, false, 1>;
}

}  // namespace

const char* rope(const RopeParams& params, const RopePlan& plan, void* stream) {
  const Kernel kernel =
      with_type(params.dtype, [&](auto t) { return choose<decltype(t)>(params.interleaved, plan.wide); });
  return launch(kernel, params, plan.launch, stream);
}

}  // namespace llmkernels::cuda
