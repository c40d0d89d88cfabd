// softmax and log_softmax on the CPU, compiled once per instruction set. The maths is in softmax.h.
#include "ops/softmax/softmax_cpu.h"

#include "common/cpu/ahead.h"
#include "common/cpu/math.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Columns whose largest element is taken before they are summed: small enough to be read again from the first-level
// cache. Sums run in vectors over a chunk and from there in double.
constexpr int64_t kChunk = 2048;

template <class T>
constexpr bool kCoarse = sizeof(T) == 2;  // 16-bit results have no digits to show the difference

template <class Acc>
constexpr Acc kInfinity = static_cast<Acc>(__builtin_inf());

// The larger one; a NaN on either side stays.
template <class Acc>
inline Vec<Acc> larger(Vec<Acc> a, Vec<Acc> b) {
  return (a > b) | (a != a) ? a : b;
}

typedef uint8_t FloatBytes __attribute__((vector_size(kVectorBytes / 4)));  // as many lanes as FloatVector
typedef uint8_t DoubleBytes __attribute__((vector_size(kVectorBytes / 8)));

// `s` where a byte of `keep` is not zero, else -inf. Not an addition: what takes no part may be Inf or NaN.
template <class Acc>
inline Vec<Acc> kept(Vec<Acc> s, const uint8_t* keep, int count) {
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  using Bytes = std::conditional_t<sizeof(Acc) == 8, DoubleBytes, FloatBytes>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Bytes bytes{};
  if (count == kLanes<Acc>) {
    __builtin_memcpy(&bytes, keep, sizeof(bytes));
  } else {
    for (int i = 0; i < count; ++i) bytes[i] = keep[i];
  }
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(Acc) == 4) {
    const __m128i as_bytes = bit_cast<__m128i>(bytes);
    const __mmask16 on = _mm_test_epi8_mask(as_bytes, as_bytes);
    return bit_cast<FloatVector>(_mm512_mask_blend_ps(on, bit_cast<__m512>(splat(-kInfinity<Acc>)), bit_cast<__m512>(s)));
  }
#endif
  return __builtin_convertvector(bytes, Indices) != 0 ? s : splat(-kInfinity<Acc>);
}

inline int lanes_of(Whole, int whole) { return whole; }
inline int lanes_of(Tail tail, int) { return tail.count; }

// s of one row, a vector at a time.
template <class T, MaskKind kMask>
struct Scores {
  using Acc = AccOf<T>;
  const T* x;
  const void* mask;
  Acc scale;

  template <class Part>
  Vec<Acc> operator()(int64_t j, Part part) const {
    Vec<Acc> s = part.load(x + j) * scale;
    if constexpr (kMask == MaskKind::kBool) {
      s = kept<Acc>(s, static_cast<const uint8_t*>(mask) + j, lanes_of(part, kLanes<Acc>));
    } else if constexpr (kMask == MaskKind::kOwn) {
      s += part.load(static_cast<const T*>(mask) + j);
    } else if constexpr (kMask == MaskKind::kAcc) {
      s += part.load(static_cast<const Acc*>(mask) + j);
    }
    return s;
  }
};

// The largest of a row and sum(exp(s - largest)).
template <class Acc>
struct RowSum {
  Acc top;
  double total;
};

template <class T, class S, class Acc = AccOf<T>>
inline Acc largest_of(const S& scores, int64_t begin, int64_t end) {
  constexpr int64_t kStep = 4 * kLanes<Acc>;
  Vec<Acc> a = splat(-kInfinity<Acc>), b = a, c = a, d = a;
  int64_t j = begin;
  for (; j + kStep <= end; j += kStep) {
    a = larger<Acc>(a, scores(j, Whole{}));
    b = larger<Acc>(b, scores(j + kLanes<Acc>, Whole{}));
    c = larger<Acc>(c, scores(j + 2 * kLanes<Acc>, Whole{}));
    d = larger<Acc>(d, scores(j + 3 * kLanes<Acc>, Whole{}));
  }
  for (; j + kLanes<Acc> <= end; j += kLanes<Acc>) a = larger<Acc>(a, scores(j, Whole{}));
  Acc most = fold<Acc>(larger<Acc>(larger<Acc>(a, b), larger<Acc>(c, d)), larger<Acc>);
  if (j < end) {
    const Vec<Acc> rest = scores(j, Tail{static_cast<int>(end - j)});
    for (int i = 0; i < end - j; ++i) most = rest[i] > most || rest[i] != rest[i] ? rest[i] : most;
  }
  return most;
}

// The sum of exp(s - top), which `put(j, part, exp)` is shown.
template <class T, class S, class Put, class Acc = AccOf<T>>
inline double sum_of(const S& scores, int64_t begin, int64_t end, Acc top, Put&& put) {
  constexpr int64_t kStep = 4 * kLanes<Acc>;
  Vec<Acc> a{}, b{}, c{}, d{};
  const auto add = [&](int64_t j, auto part, Vec<Acc>& total) {
    const Vec<Acc> e = exp<Acc, kCoarse<T>>(scores(j, part) - top);
    put(j, part, e);
    total += part.template keep<Acc>(e);
  };
  int64_t j = begin;
  for (; j + kStep <= end; j += kStep) {
    add(j, Whole{}, a);
    add(j + kLanes<Acc>, Whole{}, b);
    add(j + 2 * kLanes<Acc>, Whole{}, c);
    add(j + 3 * kLanes<Acc>, Whole{}, d);
  }
  for_each_vector<Acc>(j, end, [&](int64_t i, auto part) { add(i, part, a); });
  return static_cast<double>(sum<Acc>((a + b) + (c + d)));
}

template <class T, class S, class Acc = AccOf<T>>
inline RowSum<Acc> row_sum(const S& scores, int64_t cols) {
  RowSum<Acc> row{-kInfinity<Acc>, 0.0};
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t end = begin + kChunk < cols ? begin + kChunk : cols;
    const Acc most = largest_of<T>(scores, begin, end);
    if (most > row.top || most != most) {
      const double before = static_cast<double>(row.top) - static_cast<double>(most);
      row.total = row.total > 0.0 ? row.total * __builtin_exp(before) : row.total;
      row.top = most;
    }
    if (row.top == -kInfinity<Acc>) continue;  // nothing takes part yet
    row.total += sum_of<T>(scores, begin, end, row.top, [](int64_t, auto, Vec<Acc>) {});
  }
  return row;
}

// A row of one chunk: its exponentials are taken once and kept.
template <class T, class S, class Acc = AccOf<T>>
inline void softmax_short_row(const S& scores, int64_t cols, T* y) {
  alignas(kVectorBytes) Acc kept[kChunk];
  const Acc most = largest_of<T>(scores, 0, cols);
  const bool dead = most == -kInfinity<Acc>;
  const double total = sum_of<T>(scores, 0, cols, dead ? Acc{0} : most,
                                 [&](int64_t j, auto part, Vec<Acc> e) { part.store(kept + j, e); });
  const Acc factor = dead ? Acc{0} : static_cast<Acc>(1.0 / total);
  for_each_vector<Acc>(0, cols, [&](int64_t j, auto part) { part.store(y + j, part.load(kept + j) * factor); });
}

template <class T, MaskKind kMask>
void fwd_rows(const SoftmaxFwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const int64_t mask_bytes = kMask == MaskKind::kBool ? 1 : kMask == MaskKind::kOwn ? sizeof(T) : sizeof(Acc);
  const int64_t cols = p.cols;
  for (int64_t row = begin; row < end; ++row) {
    T* y = static_cast<T*>(p.y) + row * cols;
    Scores<T, kMask> scores{static_cast<const T*>(p.x) + row * p.x_row_stride, nullptr, static_cast<Acc>(p.scale)};
    if (kMask != MaskKind::kNone) {
      scores.mask = static_cast<const char*>(p.mask.data) + mask_offset(p.mask, row) * mask_bytes;
    }
    if (!p.log && cols <= kChunk) {
      softmax_short_row<T>(scores, cols, y);
      continue;
    }
    const RowSum<Acc> sums = row_sum<T>(scores, cols);
    const bool dead = sums.top == -kInfinity<Acc>;
    if (p.log) {
      // In two parts: their sum would lose the digits of the logarithm where the top is large.
      const Acc top = dead ? Acc{0} : sums.top, log_total = dead ? Acc{0} : static_cast<Acc>(__builtin_log(sums.total));
      for_each_vector<Acc>(0, cols, [&](int64_t j, auto part) { part.store(y + j, (scores(j, part) - top) - log_total); });
    } else {
      const Acc top = dead ? Acc{0} : sums.top, factor = dead ? Acc{0} : static_cast<Acc>(1.0 / sums.total);
      for_each_vector<Acc>(0, cols, [&](int64_t j, auto part) {
        part.store(y + j, exp<Acc, kCoarse<T>>(scores(j, part) - top) * factor);
      });
    }
  }
}

// The sum of a row that both gradients need: of dy * y, or of dy where y is not -inf.
template <class T, bool kLog>
inline double gradient_sum(const T* dy, const T* y, int64_t cols) {
  using Acc = AccOf<T>;
  const auto term = [&](int64_t j, auto part) {
    const Vec<Acc> d = part.load(dy + j), v = part.load(y + j);
    if constexpr (kLog) return v == -kInfinity<Acc> ? Vec<Acc>{} : d;
    return d * v;
  };
  constexpr int64_t kStep = 4 * kLanes<Acc>;
  double total = 0.0;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t end = begin + kChunk < cols ? begin + kChunk : cols;
    Vec<Acc> a{}, b{}, c{}, d{};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep) {
      a += term(j, Whole{});
      b += term(j + kLanes<Acc>, Whole{});
      c += term(j + 2 * kLanes<Acc>, Whole{});
      d += term(j + 3 * kLanes<Acc>, Whole{});
    }
    for_each_vector<Acc>(j, end, [&](int64_t i, auto part) { a += term(i, part); });
    total += static_cast<double>(sum<Acc>((a + b) + (c + d)));
  }
  return total;
}

template <class T, bool kLog>
void bwd_rows(const SoftmaxBwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const int64_t cols = p.cols;
  const Acc scale = static_cast<Acc>(p.scale);
  for (int64_t row = begin; row < end; ++row) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
    const T* y = static_cast<const T*>(p.y) + row * p.y_row_stride;
    T* dx = p.dx != nullptr ? static_cast<T*>(p.dx) + row * cols : nullptr;
    Acc* ds = p.ds != nullptr ? static_cast<Acc*>(p.ds) + row * cols : nullptr;
    const Acc total = static_cast<Acc>(gradient_sum<T, kLog>(dy, y, cols));
    const NextRow<T> next_dy(dy, p.dy_row_stride, cols, row + 1 < end), next_y(y, p.y_row_stride, cols, row + 1 < end);
    for_each_vector<Acc>(0, cols, [&](int64_t j, auto part) {
      next_dy.fetch(j);
      next_y.fetch(j);
      const Vec<Acc> d = part.load(dy + j), v = part.load(y + j);
      Vec<Acc> g;
      if constexpr (kLog) {
        g = v == -kInfinity<Acc> ? Vec<Acc>{} : d - exp<Acc, kCoarse<T>>(v) * total;
      } else {
        g = v * (d - total);
      }
      if (dx != nullptr) part.store(dx + j, g * scale);
      if (ds != nullptr) part.store(ds + j, g);
    });
  }
}

template <class T>
void fwd_rows(const SoftmaxFwdParams& p, int64_t begin, int64_t end) {
  switch (p.mask.kind) {
    case MaskKind::kNone:
      return fwd_rows<T, MaskKind::kNone>(p, begin, end);
    case MaskKind::kBool:
      return fwd_rows<T, MaskKind::kBool>(p, begin, end);
    case MaskKind::kOwn:
      return fwd_rows<T, MaskKind::kOwn>(p, begin, end);
    case MaskKind::kAcc:
      return fwd_rows<T, MaskKind::kAcc>(p, begin, end);
  }
}

template <class T>
void bwd_rows(const SoftmaxBwdParams& p, int64_t begin, int64_t end) {
  p.log ? bwd_rows<T, true>(p, begin, end) : bwd_rows<T, false>(p, begin, end);
}

}  // namespace

void softmax_fwd(const SoftmaxFwdParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { fwd_rows<decltype(t)>(p, begin, end); });
}

void softmax_bwd(const SoftmaxBwdParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { bwd_rows<decltype(t)>(p, begin, end); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
