// dweight and dbias of the norms, and the launches of a backward.
#include "ops/norm/norm_bwd.cuh"

namespace llmkernels::cuda {
namespace {

// Adds, over the threads (x, 0 .. kNormColumnsY - 1) in their order, what each of them brings; all threads take part.
template <class Sum, int kVec>
__device__ void sum_over_y(Sum (&value)[kVec]) {
  __shared__ Sum of_thread[kNormColumnsY][padded(kNormColumnsX * kVec)];
  __syncthreads();  // the sums before these are read
#pragma unroll
  for (int j = 0; j < kVec; ++j) of_thread[threadIdx.y][padded(threadIdx.x * kVec + j)] = value[j];
  __syncthreads();
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const int col = padded(threadIdx.x * kVec + j);
    value[j] = of_thread[0][col];
    for (int y = 1; y < kNormColumnsY; ++y) value[j] += of_thread[y][col];
  }
}

// Partial dweight and dbias of the rows of one slab (blockIdx.y), 32 vectors of columns to a block: for the rows that
// norm_bwd_long_kernel handles.
template <class T, NormKind kKind, int kVec>
__global__ void __launch_bounds__(kNormColumnsX * kNormColumnsY) norm_bwd_columns_kernel(const NormBwdParams p) {
  const int64_t index = int64_t{blockIdx.x} * kNormColumnsX + threadIdx.x;
  const bool inside = index < p.cols / kVec;
  Acc<T> dweight[kVec] = {}, dbias[kVec] = {};
  const int64_t end = p.rows * (blockIdx.y + 1) / gridDim.y;
  for (int64_t row = p.rows * blockIdx.y / gridDim.y + threadIdx.y; inside && row < end; row += kNormColumnsY) {
    const Row<T, kKind> r(p, row);
    const auto x = load<T, kVec>(r.x, index);
    const auto dy = load<T, kVec>(r.dy, index);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      dweight[j] += widen(dy.at[j]) * r.xhat(x.at[j]);
      dbias[j] += widen(dy.at[j]);
    }
  }
  sum_over_y(dweight);
  sum_over_y(dbias);
  if (threadIdx.y != 0 || !inside) return;
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    if (p.dweight != nullptr) partial_dweight<T>(p, blockIdx.y)[index * kVec + j] = dweight[j];
    if (p.dbias != nullptr) partial_dbias<T>(p, blockIdx.y)[index * kVec + j] = dbias[j];
  }
}

// dweight (or, with a second row of blocks or alone, dbias) from the partial sums: every thread adds each eighth block.
template <class T>
__global__ void __launch_bounds__(kNormColumnsX * kNormColumnsY) norm_bwd_reduce_kernel(const NormBwdParams p) {
  const int64_t col = int64_t{blockIdx.x} * kNormColumnsX + threadIdx.x;
  const bool is_dweight = p.dweight != nullptr && blockIdx.y == 0;
  const Acc<T>* partial = is_dweight ? partial_dweight<T>(p, 0) : partial_dbias<T>(p, 0);
  Acc<T> total[1] = {0};
  if (col < p.cols) {
    for (int64_t block = threadIdx.y; block < p.partial_blocks; block += kNormColumnsY) total[0] += partial[block * p.cols + col];
  }
  sum_over_y(total);
  if (threadIdx.y != 0 || col >= p.cols) return;
  void* out = is_dweight ? p.dweight : p.dbias;
  if (p.weight_dtype == p.dtype) {
    static_cast<T*>(out)[col] = narrow<T>(total[0]);
  } else {
    static_cast<Acc<T>*>(out)[col] = total[0];
  }
}

template <class T, NormKind kKind>
const char* run(const NormBwdParams& p, const NormBwdPlan& plan, void* stream) {
  constexpr int kWide = kVectorBytes / sizeof(T);
  const char* error = nullptr;
  const bool in_registers = plan.rows.vectors > 0;
  if (p.rows > 0 && (p.dx != nullptr || (in_registers && plan.partial_blocks > 0))) {
    error = p.seed != nullptr ? norm_bwd_rows_dropout(p, plan.rows, stream)
                              : launch(choose_rows<T, kKind, false>(plan.rows), p, plan.rows.launch, stream);
  }
  if (error == nullptr && plan.partial_blocks > 0 && !in_registers) {
    const Kernel kernel =
        plan.rows.wide ? norm_bwd_columns_kernel<T, kKind, kWide> : norm_bwd_columns_kernel<T, kKind, 1>;
    error = launch(kernel, p, plan.columns, stream);
  }
  // Without rows this writes the zeros.
  if (error == nullptr && (p.dweight != nullptr || p.dbias != nullptr)) {
    error = launch<NormBwdParams>(norm_bwd_reduce_kernel<T>, p, plan.reduce, stream);
  }
  return error;
}

template <class T>
const char* run(const NormBwdParams& p, const NormBwdPlan& plan, void* stream) {
  return p.kind == NormKind::kLayerNorm ? run<T, NormKind::kLayerNorm>(p, plan, stream)
                                        : run<T, NormKind::kRmsNorm>(p, plan, stream);
}

}  // namespace

const char* norm_bwd(const NormBwdParams& params, const NormBwdPlan& plan, void* stream) {
  return with_type(params.dtype, [&](auto t) { return run<decltype(t)>(params, plan, stream); });
}

}  // namespace llmkernels::cuda
