// layer_norm and rms_norm on the CPU, compiled once per instruction set. The maths is in norm.h.
#include <initializer_list>

#include "ops/norm/norm_cpu.h"

#include "common/cpu/vec.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Sums run in vectors over a chunk and from there in double: an fp32 sum over 262,144 columns would lose digits.
constexpr int64_t kChunk = 2048;

// Three sums over the values that `terms(j, part, a, b, c)` adds for each vector of a row. Two sets of
// accumulators hide the latency of an addition.
template <class Acc>
struct Sums {
  double a = 0, b = 0, c = 0;
};

template <class Acc, class Terms>
inline Sums<Acc> sum_row(int64_t cols, Terms&& terms) {
  constexpr int64_t kStep = 2 * kLanes<Acc>;
  Sums<Acc> total;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t end = begin + kChunk < cols ? begin + kChunk : cols;
    Vec<Acc> a0{}, a1{}, b0{}, b1{}, c0{}, c1{};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep) {
      terms(j, Whole{}, a0, b0, c0);
      terms(j + kLanes<Acc>, Whole{}, a1, b1, c1);
    }
    for_each_vector<Acc>(j, end, [&](int64_t i, auto part) { terms(i, part, a0, b0, c0); });
    total.a += static_cast<double>(sum<Acc>(a0 + a1));
    total.b += static_cast<double>(sum<Acc>(b0 + b1));
    total.c += static_cast<double>(sum<Acc>(c0 + c1));
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

// One row: y and the statistics of s, which is x or the sum just written to new_residual. The row is read twice, the
// second time from cache.
template <class T, class W, bool kRms, bool kWeight>
inline void fwd_row(const NormFwdParams& p, int64_t row, const T* s) {
  using Acc = AccOf<T>;
  const W* weight = static_cast<const W*>(p.weight);
  const W* bias = static_cast<const W*>(p.bias);
  T* y = static_cast<T*>(p.y) + row * p.cols;
  Acc rstd, shift = 0, offset = 0;
  if constexpr (kRms) {
    const auto sums = sum_row<Acc>(p.cols, [&](int64_t j, auto part, Vec<Acc>& square, Vec<Acc>&, Vec<Acc>&) {
      const Vec<Acc> v = part.load(s + j);
      square += v * v;
    });
    rstd = reciprocal_sqrt<Acc>(sums.a / static_cast<double>(p.cols) + p.eps);
  } else {
    const Centre<Acc> centre = centre_of<T, Acc>(s, p.cols);
    rstd = reciprocal_sqrt<Acc>(centre.variance + p.eps);
    shift = centre.shift;
    offset = -centre.correction * rstd;
    static_cast<Acc*>(p.mean)[row] = centre.shift + centre.correction;
  }
  static_cast<Acc*>(p.rstd)[row] = rstd;
  const Vec<Acc> vshift = splat(shift), vrstd = splat(rstd), voffset = splat(offset);
  const Vec<Acc> weight_offset = splat(static_cast<Acc>(p.weight_offset));
  const auto output = [&](auto has_bias) {
    for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
      Vec<Acc> v = part.load(s + j);
      v = kRms ? v * vrstd : (v - vshift) * vrstd + voffset;
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

template <class T, class W, bool kRms, bool kWeight>
void fwd_rows(const NormFwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
    if (p.residual == nullptr) {
      fwd_row<T, W, kRms, kWeight>(p, row, x);
      continue;
    }
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_row_stride;
    T* s = static_cast<T*>(p.new_residual) + row * p.cols;
    for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
      part.store(s + j, part.load(x + j) + part.load(residual + j));
    });
    fwd_row<T, W, kRms, kWeight>(p, row, s);
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

// As many rows at a time as the registers hold the factors of: the partial sums are then read and written once for
// all of them.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kRowsAtOnce = 4;
#else
constexpr int kRowsAtOnce = 2;
#endif

template <class T, class W, bool kRms, bool kWeight, int kRows>
inline void bwd_rows(const NormBwdParams& p, int64_t row, AccOf<T>* dweight, AccOf<T>* dbias) {
  using Acc = AccOf<T>;
  const W* weight = static_cast<const W*>(p.weight);
  const Vec<Acc> weight_offset = splat(static_cast<Acc>(p.weight_offset));
  const T *x[kRows], *dy[kRows], *dresidual[kRows];
  T* dx[kRows];
  RowFactors<Acc> factors[kRows];
  for (int r = 0; r < kRows; ++r) {
    factors[r] = row_factors<T, W, kRms, kWeight>(p, row + r);
    x[r] = static_cast<const T*>(p.x) + (row + r) * p.x_row_stride;
    dy[r] = static_cast<const T*>(p.dy) + (row + r) * p.dy_row_stride;
    dresidual[r] = static_cast<const T*>(p.dresidual) + (p.dresidual ? (row + r) * p.dresidual_row_stride : 0);
    dx[r] = static_cast<T*>(p.dx) + (p.dx ? (row + r) * p.cols : 0);
  }
  for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
    Vec<Acc> w{}, dw{}, db{};
    if constexpr (kWeight) w = part.load(weight + j);
    if constexpr (kWeight && kRms) w += weight_offset;
    if (dweight != nullptr) dw = part.load(dweight + j);
    if (dbias != nullptr) db = part.load(dbias + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const RowFactors<Acc>& f = factors[r];
      const Vec<Acc> v = part.load(x[r] + j), grad = part.load(dy[r] + j);
      const Vec<Acc> xhat = kRms ? v * f.rstd : (v - f.mean) * f.rstd + f.shift;
      if (p.dx != nullptr) {
        const Vec<Acc> g = kWeight ? grad * w : grad;
        Vec<Acc> d = g * f.rstd + (kRms ? xhat * f.slope : xhat * f.slope + f.constant);
        if (p.dresidual != nullptr) d += part.load(dresidual[r] + j);
        part.store(dx[r] + j, d);
      }
      dw += grad * xhat;
      db += grad;
    }
    if (dweight != nullptr) part.store(dweight + j, dw);
    if (dbias != nullptr) part.store(dbias + j, db);
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
  int64_t row = begin;
  for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) {
    bwd_rows<T, W, kRms, kWeight, kRowsAtOnce>(p, row, dweight, dbias);
  }
  for (; row < end; ++row) bwd_rows<T, W, kRms, kWeight, 1>(p, row, dweight, dbias);
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
