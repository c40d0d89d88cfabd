// The forward of layer_norm and rms_norm on the CPU, compiled once per instruction set. The maths is in norm.h.
#include "common/cpu/ahead.h"
#include "ops/norm/norm_cpu_rows.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class Acc>
inline Acc reciprocal_sqrt(double value) {
  return static_cast<Acc>(1.0 / __builtin_sqrt(value));
}

// Where a row is centred: mean = shift + correction, each in Acc, so that (x - shift) - correction keeps its digits
// when the mean is far larger than the spread.
template <class Acc>
struct Centre {
  Acc shift;
  Acc correction;
  double variance;
};

// One pass over the row: sums of x - shift and of its square, with a shift that is near the mean. Only when the shift
// turns out to be far from it (an outlier stands at the start) does the difference of the two sums lose digits, and
// then a second pass starts from the mean of the first.
template <class T, class Acc>
inline Centre<Acc> centre_of(const T* x, int64_t cols) {
  const int first = cols < kLanes<Acc> ? static_cast<int>(cols) : kLanes<Acc>;
  const Vec<Acc> head = first < kLanes<Acc> ? load_tail(x, first) : load(x);
  Acc shift = sum<Acc>(head) / static_cast<Acc>(first);
  for (int pass = 0;; ++pass) {
    const Vec<Acc> center = splat(shift);
    const auto sums = sum_row<Acc>(cols, [&](int64_t j, auto part, Vec<Acc>& s, Vec<Acc>& s2, Vec<Acc>&) {
      const Vec<Acc> v = part.template keep<Acc>(part.load(x + j) - center);
      s += v;
      s2 += v * v;
    });
    const double correction = sums.a / static_cast<double>(cols);
    const double square = sums.b / static_cast<double>(cols);
    const double variance = square - correction * correction;
    if (pass == 1 || !(correction * correction > 0.25 * variance)) {
      return {shift, static_cast<Acc>(correction), variance > 0 || variance != variance ? variance : 0.0};
    }
    shift += static_cast<Acc>(correction);
  }
}

// What a row's y is computed from: xhat = (s - shift) * rstd + offset.
template <class Acc>
struct RowScale {
  Acc shift, rstd, offset;
};

template <class T, bool kRms>
inline RowScale<AccOf<T>> row_scale(const NormFwdParams& p, int64_t row, const T* s) {
  using Acc = AccOf<T>;
  RowScale<Acc> scale{};
  if constexpr (kRms) {
    const auto sums = sum_row<Acc>(p.cols, [&](int64_t j, auto part, Vec<Acc>& square, Vec<Acc>&, Vec<Acc>&) {
      const Vec<Acc> v = part.load(s + j);
      square += v * v;
    });
    scale.rstd = reciprocal_sqrt<Acc>(sums.a / static_cast<double>(p.cols) + p.eps);
  } else {
    const Centre<Acc> centre = centre_of<T, Acc>(s, p.cols);
    scale.rstd = reciprocal_sqrt<Acc>(centre.variance + p.eps);
    scale.shift = centre.shift;
    scale.offset = -centre.correction * scale.rstd;
    static_cast<Acc*>(p.mean)[row] = centre.shift + centre.correction;
  }
  static_cast<Acc*>(p.rstd)[row] = scale.rstd;
  return scale;
}

template <class T, class W, bool kRms, bool kWeight>
inline void output_row(const NormFwdParams& p, int64_t row, const T* s, const RowScale<AccOf<T>>& scale,
                       NextRow<T> next) {
  using Acc = AccOf<T>;
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  T* y = static_cast<T*>(p.y) + row * p.cols;
  const Vec<Acc> shift = splat(scale.shift), rstd = splat(scale.rstd), offset = splat(scale.offset);
  const Vec<Acc> weight_offset = splat(static_cast<Acc>(p.weight_offset));
  const auto output = [&](auto has_bias) {
    for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
      next.fetch(j);
      Vec<Acc> v = part.load(s + j);
      v = kRms ? v * rstd : (v - shift) * rstd + offset;
      if constexpr (kWeight) {
        Vec<Acc> w = part.load(weight + j);
        if constexpr (kRms) w += weight_offset;
        v = has_bias ? v * w + part.load(bias + j) : v * w;
      }
      part.store(y + j, v);
    });
  };
  if (kWeight && bias != nullptr) {
    output(std::true_type{});
  } else {
    output(std::false_type{});
  }
}

// The row to be normed: x, or x + residual, x after dropout if there is one, once the sum has been written.
template <class T>
inline const T* normed_row(const NormFwdParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  if (p.residual == nullptr) return x;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_row_stride;
  T* sum = static_cast<T*>(p.new_residual) + row * p.cols;
  if (p.seed == nullptr) {
    for_each_vector<AccOf<T>>(0, p.cols, [&](int64_t j, auto part) {
      part.store(sum + j, part.load(x + j) + part.load(residual + j));
    });
    return sum;
  }
  const Dropout<AccOf<T>> dropout(p, row);
  for_each_vector<AccOf<T>>(0, p.cols, [&](int64_t j, auto part) {
    part.store(sum + j, dropout.template rounded<T>(part.load(x + j), j) + part.load(residual + j));
  });
  return sum;
}

// Rows are read once from memory and once from cache, then written. The statistics of a short row are taken before the
// row in front of it is written, so that the long chain of its sums, division and root runs beside that work: 256
// columns of 16 bits took 0.7 times as long on a Zen 5. A long row has no use for it and would leave the first cache.
// Taking the statistics of several rows ahead was 1.5 times slower on a Zen 4 when the data is larger than the
// second-level cache: the prefetcher does better with one long stream each way.
template <class T, class W, bool kRms, bool kWeight>
void fwd_rows(const NormFwdParams& p, int64_t begin, int64_t end) {
  const int64_t ahead = is_short<T>(p.cols) ? 1 : 0;
  const T* s[2];
  RowScale<AccOf<T>> scale[2];
  for (int64_t row = begin; row < end + ahead; ++row) {
    if (row < end) {
      s[row & 1] = normed_row<T>(p, row);
      scale[row & 1] = row_scale<T, kRms>(p, row, s[row & 1]);
    }
    const int64_t ready = row - ahead;
    if (ready < begin) continue;
    // The sum with a residual is in the cache as it is.
    const NextRow<T> next(s[ready & 1], p.x_row_stride, p.cols, row + 1 < end && ahead == 0 && p.residual == nullptr);
    output_row<T, W, kRms, kWeight>(p, ready, s[ready & 1], scale[ready & 1], next);
  }
}

}  // namespace

void norm_fwd(const NormFwdParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, p.weight_dtype, [&](auto t, auto w) {
    with_flags(p.kind, p.weight != nullptr, [&](auto rms, auto weight) {
      fwd_rows<decltype(t), decltype(w), rms.value, weight.value>(p, begin, end);
    });
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
