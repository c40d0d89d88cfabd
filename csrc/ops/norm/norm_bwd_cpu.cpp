// The backward of layer_norm and rms_norm on the CPU, compiled once per instruction set. The maths is in norm.h.
#include <initializer_list>

#include "common/cpu/ahead.h"
#include "ops/norm/norm_cpu_rows.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// What a row's dx and xhat are computed from, all constant along the row:
//   xhat = (x - mean) * rstd + shift
//   dx   = g * rstd + (xhat * slope + constant)
template <class Acc>
struct RowFactors {
  Acc mean, rstd, shift, slope, constant;
};

template <class T, class W, bool kRms, bool kWeight>
inline RowFactors<AccOf<T>> row_factors(const NormBwdParams& p, int64_t row) {
  using Acc = AccOf<T>;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
  const W* weight = static_cast<const W*>(p.weight);
  const Acc rstd = static_cast<const Acc*>(p.rstd)[row];
  const Acc mean = kRms ? Acc{0} : static_cast<const Acc*>(p.mean)[row];
  const Vec<Acc> vmean = splat(mean), weight_offset = splat(static_cast<Acc>(p.weight_offset));
  // sums: a of g * (x - mean), b of g, c of x - mean. The last one is zero but for the rounding of the saved mean,
  // which matters when the mean is far larger than the spread.
  const auto sums = sum_row<Acc>(p.cols, [&](int64_t j, auto part, Vec<Acc>& a, Vec<Acc>& b, Vec<Acc>& c) {
    Vec<Acc> g = part.load(dy + j);
    if constexpr (kWeight) {
      Vec<Acc> w = part.load(weight + j);
      if constexpr (kRms) w += weight_offset;
      g *= w;
    }
    const Vec<Acc> v = kRms ? part.load(x + j) : part.template keep<Acc>(part.load(x + j) - vmean);
    a += g * v;
    if constexpr (!kRms) {
      b += g;
      c += v;
    }
  });
  const double cols = static_cast<double>(p.cols);
  const double correction = sums.c / cols;
  const double g_xhat = (sums.a - correction * sums.b) / cols * static_cast<double>(rstd);
  return {mean, rstd, static_cast<Acc>(-correction * static_cast<double>(rstd)),
          static_cast<Acc>(-g_xhat * static_cast<double>(rstd)),
          static_cast<Acc>(-sums.b / cols * static_cast<double>(rstd))};
}

// dx of one row, and its terms of dweight and dbias added to the sums of the block. Two rows at a time, so that the sums
// are read and written half as often, gained 5 % in the second-level cache and took 1.5 times as long from memory (Zen 5,
// 4096 x 1024): the prefetcher follows one stream of stores, not two.
template <class T, class W, bool kRms, bool kWeight>
inline void bwd_row(const NormBwdParams& p, int64_t row, bool another, AccOf<T>* dweight, AccOf<T>* dbias) {
  using Acc = AccOf<T>;
  const W* weight = static_cast<const W*>(p.weight);
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
  const T* dresidual =
      p.dresidual != nullptr ? static_cast<const T*>(p.dresidual) + row * p.dresidual_row_stride : nullptr;
  T* dx = p.dx != nullptr ? static_cast<T*>(p.dx) + row * p.cols : nullptr;
  const RowFactors<Acc> f = row_factors<T, W, kRms, kWeight>(p, row);
  const Vec<Acc> weight_offset = splat(static_cast<Acc>(p.weight_offset));
  T* dropped = p.dx_dropped != nullptr ? static_cast<T*>(p.dx_dropped) + row * p.cols : nullptr;
  const Dropout<Acc> dropout(p, row);
  const NextRow<T> next_x(x, p.x_row_stride, p.cols, another), next_dy(dy, p.dy_row_stride, p.cols, another);
  const auto gradients = [&](int64_t j, auto part, auto drops) {
    next_x.fetch(j);
    next_dy.fetch(j);
    const Vec<Acc> v = part.load(x + j), grad = part.load(dy + j);
    const Vec<Acc> xhat = kRms ? v * f.rstd : (v - f.mean) * f.rstd + f.shift;
    if (dx != nullptr) {
      Vec<Acc> g = grad;
      if constexpr (kWeight) {
        Vec<Acc> w = part.load(weight + j);
        if constexpr (kRms) w += weight_offset;
        g *= w;
      }
      Vec<Acc> d = g * f.rstd + (kRms ? xhat * f.slope : xhat * f.slope + f.constant);
      if (dresidual != nullptr) d += part.load(dresidual + j);
      part.store(dx + j, d);
      if constexpr (drops) part.store(dropped + j, dropout(d, j));
    }
    if (dweight != nullptr) part.store(dweight + j, part.load(dweight + j) + grad * xhat);
    if (dbias != nullptr) part.store(dbias + j, part.load(dbias + j) + grad);
  };
  // Apart, so that a row without dropout pays nothing for it.
  if (dropped == nullptr) {
    for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) { gradients(j, part, std::false_type{}); });
  } else {
    for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) { gradients(j, part, std::true_type{}); });
  }
}

template <class T, class W, bool kRms, bool kWeight>
void bwd_block(const NormBwdParams& p, int64_t block, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  Acc* partial = static_cast<Acc*>(p.partial);
  Acc* dweight = p.dweight != nullptr ? partial + block * p.cols : nullptr;
  if (p.dweight != nullptr) partial += p.partial_blocks * p.cols;
  Acc* dbias = p.dbias != nullptr ? partial + block * p.cols : nullptr;
  for (Acc* sums : {dweight, dbias}) {
    for (int64_t j = 0; sums != nullptr && j < p.cols; ++j) sums[j] = 0;
  }
  // Asking for the next row takes 0.9 times as long at 2048 x 4096 and 1.07 times at 4096 x 1024 (bf16, Zen 5).
  const bool ahead = !is_short<T>(p.cols);
  for (int64_t row = begin; row < end; ++row) {
    bwd_row<T, W, kRms, kWeight>(p, row, ahead && row + 1 < end, dweight, dbias);
  }
}

template <class W, class Acc>
void reduce_columns(const NormBwdParams& p, int64_t begin, int64_t end) {
  const Acc* partial = static_cast<const Acc*>(p.partial);
  for (void* out : {p.dweight, p.dbias}) {
    if (out == nullptr) continue;
    for_each_vector<Acc>(begin, end, [&](int64_t j, auto part) {
      Vec<Acc> total{};
      for (int64_t block = 0; block < p.partial_blocks; ++block) total += part.load(partial + block * p.cols + j);
      part.store(static_cast<W*>(out) + j, total);
    });
    partial += p.partial_blocks * p.cols;
  }
}

}  // namespace

void norm_bwd(const NormBwdParams& p, int64_t block, int64_t begin, int64_t end) {
  with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    with_flags(p.kind, p.weight != nullptr, [&](auto rms, auto weight) {
      bwd_block<decltype(t), decltype(w), rms.value, weight.value>(p, block, begin, end);
    });
  });
}

void norm_bwd_reduce(const NormBwdParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) { reduce_columns<decltype(w), AccOf<decltype(t)>>(p, begin, end); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
