// layer_norm and rms_norm on the CPU, compiled once per instruction set. The maths is in norm.h.
#include <initializer_list>

#include "ops/norm/norm_cpu.h"

#include "common/cpu/vec.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Sums run in vectors over a chunk and from there in double: an fp32 sum over 262,144 columns would lose digits.
constexpr int64_t kChunk = 2048;

// Three sums over the values that `terms(j, part, a, b, c)` adds for each vector of a row. Four sets of
// accumulators hide the latency of an addition.
template <class Acc>
struct Sums {
  double a = 0, b = 0, c = 0;
};

template <class Acc, class Terms>
inline Sums<Acc> sum_row(int64_t cols, Terms&& terms) {
  constexpr int64_t kStep = 4 * kLanes<Acc>;
  Sums<Acc> total;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t end = begin + kChunk < cols ? begin + kChunk : cols;
    Vec<Acc> a0{}, a1{}, a2{}, a3{}, b0{}, b1{}, b2{}, b3{}, c0{}, c1{}, c2{}, c3{};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep) {
      terms(j, Whole{}, a0, b0, c0);
      terms(j + kLanes<Acc>, Whole{}, a1, b1, c1);
      terms(j + 2 * kLanes<Acc>, Whole{}, a2, b2, c2);
      terms(j + 3 * kLanes<Acc>, Whole{}, a3, b3, c3);
    }
    for_each_vector<Acc>(j, end, [&](int64_t i, auto part) { terms(i, part, a0, b0, c0); });
    total.a += static_cast<double>(sum<Acc>((a0 + a1) + (a2 + a3)));
    total.b += static_cast<double>(sum<Acc>((b0 + b1) + (b2 + b3)));
    total.c += static_cast<double>(sum<Acc>((c0 + c1) + (c2 + c3)));
  }
  return total;
}

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
inline void output_row(const NormFwdParams& p, int64_t row, const T* s, const RowScale<AccOf<T>>& scale) {
  using Acc = AccOf<T>;
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  T* y = static_cast<T*>(p.y) + row * p.cols;
  const Vec<Acc> shift = splat(scale.shift), rstd = splat(scale.rstd), offset = splat(scale.offset);
  const Vec<Acc> weight_offset = splat(static_cast<Acc>(p.weight_offset));
  const auto output = [&](auto has_bias) {
    for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
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

// The row to be normed: x, or x + residual once it has been written.
template <class T>
inline const T* normed_row(const NormFwdParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  if (p.residual == nullptr) return x;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_row_stride;
  T* sum = static_cast<T*>(p.new_residual) + row * p.cols;
  for_each_vector<AccOf<T>>(0, p.cols, [&](int64_t j, auto part) {
    part.store(sum + j, part.load(x + j) + part.load(residual + j));
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
  constexpr int64_t kShortBytes = 4096;
  const int64_t ahead = p.cols * static_cast<int64_t>(sizeof(T)) <= kShortBytes ? 1 : 0;
  const T* s[2];
  RowScale<AccOf<T>> scale[2];
  for (int64_t row = begin; row < end + ahead; ++row) {
    if (row < end) {
      s[row & 1] = normed_row<T>(p, row);
      scale[row & 1] = row_scale<T, kRms>(p, row, s[row & 1]);
    }
    const int64_t ready = row - ahead;
    if (ready >= begin) output_row<T, W, kRms, kWeight>(p, ready, s[ready & 1], scale[ready & 1]);
  }
}

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
inline void bwd_row(const NormBwdParams& p, int64_t row, AccOf<T>* dweight, AccOf<T>* dbias) {
  using Acc = AccOf<T>;
  const W* weight = static_cast<const W*>(p.weight);
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
  const T* dresidual =
      p.dresidual != nullptr ? static_cast<const T*>(p.dresidual) + row * p.dresidual_row_stride : nullptr;
  T* dx = p.dx != nullptr ? static_cast<T*>(p.dx) + row * p.cols : nullptr;
  const RowFactors<Acc> f = row_factors<T, W, kRms, kWeight>(p, row);
  const Vec<Acc> weight_offset = splat(static_cast<Acc>(p.weight_offset));
  for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
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
    }
    if (dweight != nullptr) part.store(dweight + j, part.load(dweight + j) + grad * xhat);
    if (dbias != nullptr) part.store(dbias + j, part.load(dbias + j) + grad);
  });
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
  for (int64_t row = begin; row < end; ++row) bwd_row<T, W, kRms, kWeight>(p, row, dweight, dbias);
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

// Calls f(T{}, W{}) for the element types of a call.
template <class F>
inline void with_types(DType dtype, DType weight_dtype, F&& f) {
  const bool wide = weight_dtype == DType::kFloat32;
  switch (dtype) {
    case DType::kFloat64:
      return f(double{}, double{});
    case DType::kFloat32:
      return f(float{}, float{});
    case DType::kBFloat16:
      return wide ? f(BFloat16{}, float{}) : f(BFloat16{}, BFloat16{});
    case DType::kFloat16:
      return wide ? f(Float16{}, float{}) : f(Float16{}, Float16{});
  }
}

// Calls f(rms, weight) with the two flags as compile-time constants.
template <class F>
inline void with_flags(NormKind kind, bool weight, F&& f) {
  if (kind == NormKind::kRmsNorm) {
    weight ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  } else {
    weight ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
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
