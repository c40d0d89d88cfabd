// Cross entropy on the CPU, compiled once per instruction set. The maths is in cross_entropy.h.
#include "ops/cross_entropy/cross_entropy_cpu.h"

#include "common/cpu/map.h"
#include "common/cpu/math.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 1024;  // columns whose maximum is found before they are read again, from the first cache

template <class T>
constexpr bool kCoarse = sizeof(T) == 2;  // 16-bit results have no digits to show the difference

// softcap * tanh(x / softcap), and its slope.
template <class Acc>
struct Capped {
  Vec<Acc> value, slope;
};

// tanh(y) = (1 - e) / (1 + e) with e = exp(-2 y) for y > 0. Below 1/2 the difference cancels; there a Pade approximant
// of tanh is within 2e-9.
inline Capped<float> capped(FloatVector x, float cap) {
  const FloatVector y = x * (1.0f / cap);
  const FloatVector size = bit_cast<FloatVector>(bit_cast<UInt32Vector>(y) & 0x7fffffffu);
  const FloatVector e = exp<float>(-2.0f * size), y2 = y * y;
  const auto small = size < 0.5f;
  const FloatVector inverse = 1.0f / (small ? 945.0f + y2 * (420.0f + 15.0f * y2) : 1.0f + e);
  const FloatVector t = (small ? size * (945.0f + y2 * (105.0f + y2)) : 1.0f - e) * inverse;
  const FloatVector slope = small ? 1.0f - t * t : 4.0f * e * inverse * inverse;
  const UInt32Vector sign = bit_cast<UInt32Vector>(y) & 0x80000000u;
  return {cap * bit_cast<FloatVector>(bit_cast<UInt32Vector>(t) | sign), slope};
}

// Through the C library, lane by lane: as many digits as double has would take a far longer approximant.
inline Capped<double> capped(DoubleVector x, double cap) {
  DoubleVector t;
  for (int i = 0; i < kLanes<double>; ++i) t[i] = __builtin_tanh(x[i] / cap);
  return {cap * t, (1.0 - t) * (1.0 + t)};
}

inline float log_of(float x) { return __builtin_logf(x); }
inline double log_of(double x) { return __builtin_log(x); }

template <class Acc>
constexpr Acc kInfinity = static_cast<Acc>(__builtin_inf());

template <class Acc>
inline Vec<Acc> keep_or(Whole, Vec<Acc> value, Acc) {
  return value;
}
template <class Acc>
inline Vec<Acc> keep_or(Tail part, Vec<Acc> value, Acc other) {
  Vec<Acc> lane;
  for (int i = 0; i < kLanes<Acc>; ++i) lane[i] = static_cast<Acc>(i);
  return lane < static_cast<Acc>(part.count) ? value : splat(other);
}

// The larger of two; where `a` is a NaN, `b`.
template <class Acc>
inline Vec<Acc> larger(Vec<Acc> a, Vec<Acc> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(Acc) == 4) {
    return bit_cast<FloatVector>(_mm512_maskz_max_ps(0xffff, bit_cast<__m512>(a), bit_cast<__m512>(b)));
  }
#endif
  return a > b ? a : b;
}

// One row: what is read of it and, in turn, what is known of it. P is the type of probabilities.
template <class T, class P, TargetKind kKind, bool kCap, class Acc = AccOf<T>>
struct Row {
  const CrossEntropyInputs& p;
  const T* x;
  const P* probabilities = nullptr;
  int64_t index = -1;
  Acc max = -kInfinity<Acc>, log_sum = 0, mass = 0;

  Row(const CrossEntropyInputs& params, int64_t row)
      : p(params), x(static_cast<const T*>(params.input) + row * params.input_row_stride) {
    if constexpr (kKind == TargetKind::kProbabilities) {
      probabilities = static_cast<const P*>(p.target) + row * p.target_row_stride;
    } else {
      index = static_cast<const int64_t*>(p.target)[row];
    }
  }

  bool ignored() const { return kKind != TargetKind::kProbabilities && index == p.ignore_index; }
  bool known() const { return kKind == TargetKind::kProbabilities || (index >= 0 && index < p.cols); }
  // Elements in an order of their own are cheaper to load; that of memory is needed beside another type.
  static constexpr bool kAnyOrder = kKind == TargetKind::kIndex;

  const Acc* weight() const { return static_cast<const Acc*>(p.weight); }
  Acc confidence() const { return static_cast<Acc>(1.0 - p.label_smoothing); }
  Acc spread() const { return static_cast<Acc>(p.label_smoothing / static_cast<double>(p.cols)); }
  // What the index itself adds to q.
  Acc index_mass() const { return p.weight != nullptr ? confidence() * weight()[index] : confidence(); }

  // q, but for what the index itself adds.
  template <class Part>
  Vec<Acc> q(int64_t j, Part part) const {
    Vec<Acc> value = splat(spread());
    if constexpr (kKind == TargetKind::kProbabilities) value += confidence() * part.load(probabilities + j);
    if (p.weight != nullptr) value *= part.load(weight() + j);
    return value;
  }

  Vec<Acc> u(Vec<Acc> value) const {
    if constexpr (kCap) return capped(value, static_cast<Acc>(p.softcap)).value;
    return value;
  }
  Acc u_of_index() const {
    Vec<Acc> value{};
    value[0] = load_tail(x + index, 1)[0];
    return u(value)[0];
  }

  // Calls f(column, u, part) for the columns [begin, end).
  template <class F>
  void each(int64_t begin, int64_t end, F&& f) const {
    int64_t j = begin;
    if constexpr (kAnyOrder) {
      for (; j + 2 * kLanes<Acc> <= end; j += 2 * kLanes<Acc>) {
        Vec<Acc> a, b;
        load_pair(x + j, a, b);
        f(j, u(a), Whole{});
        f(j, u(b), Whole{});
      }
    }
    for_each_vector<Acc>(j, end, [&](int64_t k, auto part) { f(k, u(part.load(x + k)), part); });
  }

  // Fills max, log_sum and mass. Returns sum_c q_c (lse - u_c).
  Acc measure() {
    // Relative to `max` as far as it is known: the sum of exp(u - max), and of q (u - max).
    Acc total = 0, dot = 0;
    Vec<Acc> values[kCap ? kBlock / kLanes<Acc> + 1 : 1];  // u of the block: tanh is not done twice
    for (int64_t begin = 0; begin < p.cols; begin += kBlock) {
      const int64_t end = begin + kBlock < p.cols ? begin + kBlock : p.cols;
      Vec<Acc> highest[2] = {splat(-kInfinity<Acc>), splat(-kInfinity<Acc>)};
      int count = 0;
      each(begin, end, [&](int64_t, Vec<Acc> value, auto part) {
        value = keep_or(part, value, -kInfinity<Acc>);
        highest[count % 2] = larger<Acc>(value, highest[count % 2]);
        if constexpr (kCap) values[count] = value;
        ++count;
      });
      const Acc before = max, here = fold<Acc>(larger<Acc>(highest[0], highest[1]), larger<Acc>);
      if (here > max) max = here;
      const Acc shift = max == -kInfinity<Acc> ? 0 : max;  // of nothing but -Inf so far: exp(-Inf) = 0, and no NaN
      if (before != max && before != -kInfinity<Acc>) {
        const Vec<Acc> factor = exp<Acc>(splat(before - max));
        total *= factor[0];
        dot += mass * (before - max);
      }
      Vec<Acc> sums{}, dots{}, masses{};
      count = 0;
      const auto add = [&](int64_t j, Vec<Acc> value, auto part) {
        sums += part.template keep<Acc>(exp<Acc, kCoarse<T>>(value - shift));
        if constexpr (!kAnyOrder) {
          const Vec<Acc> q = this->q(j, part);
          dots += part.template keep<Acc>(q * (value - shift));
          masses += part.template keep<Acc>(q);
        }
      };
      if constexpr (kCap) {
        // The vectors are those of the first walk, in its order.
        walk(begin, end, [&](int64_t j, auto part) { add(j, values[count++], part); });
      } else {
        each(begin, end, add);
      }
      total += sum<Acc>(sums);
      if constexpr (!kAnyOrder) {
        dot += sum<Acc>(dots);
        mass += sum<Acc>(masses);
      }
    }
    // exp(u - max) is 1 for the largest u; a row of nothing but -Inf has no softmax.
    log_sum = log_of(total);
    if (max == -kInfinity<Acc>) log_sum = max - max;
    if constexpr (kKind != TargetKind::kProbabilities) {
      const Acc own = index_mass();
      dot += own * (u_of_index() - max);
      mass += own;
    }
    return mass * log_sum - dot;
  }

  // Calls f(column, part) for the vectors of `each`.
  template <class F>
  void walk(int64_t begin, int64_t end, F&& f) const {
    int64_t j = begin;
    if constexpr (kAnyOrder) {
      for (; j + 2 * kLanes<Acc> <= end; j += 2 * kLanes<Acc>) {
        f(j, Whole{});
        f(j, Whole{});
      }
    }
    for_each_vector<Acc>(j, end, f);
  }

  // Writes the gradient of the row whose max, log_sum and mass are known.
  void pull_back(T* dx, Acc dloss) const {
    const Acc lse = max + log_sum, cap = static_cast<Acc>(p.softcap);
    const Acc of_p = dloss * (mass + static_cast<Acc>(2.0 * p.z_loss) * lse);
    const auto of_softmax = [&](Vec<Acc> u) { return of_p * exp<Acc, kCoarse<T>>((u - max) - log_sum); };
    if constexpr (kAnyOrder) {
      map<T, 1, 1>(0, p.cols, {x}, {dx}, [&](const Vec<Acc>(&in)[1], Vec<Acc>(&out)[1]) {
        if constexpr (kCap) {
          const Capped<Acc> u = capped(in[0], cap);
          out[0] = of_softmax(u.value) * u.slope;
        } else {
          out[0] = of_softmax(in[0]);
        }
      });
    } else {
      for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
        Vec<Acc> u = part.load(x + j), slope{};
        if constexpr (kCap) {
          const Capped<Acc> both = capped(u, cap);
          u = both.value;
          slope = both.slope;
        }
        Vec<Acc> value = of_softmax(u) - dloss * q(j, part);
        if constexpr (kCap) value *= slope;
        part.store(dx + j, value);
      });
    }
    if constexpr (kKind != TargetKind::kProbabilities) {
      Vec<Acc> u{}, slope = splat(Acc{1});
      u[0] = load_tail(x + index, 1)[0];
      if constexpr (kCap) {
        const Capped<Acc> both = capped(u, cap);
        u = both.value;
        slope = both.slope;
      }
      Acc own = index_mass();
      if constexpr (kKind == TargetKind::kSmoothedIndex) own += q(index, Tail{1})[0];
      store_tail(dx + index, (of_softmax(u) - dloss * own) * slope, 1);
    }
  }
};

template <class T>
inline void fill(T* dx, int64_t cols, AccOf<T> value) {
  for_each_vector<AccOf<T>>(0, cols, [&](int64_t j, auto part) { part.store(dx + j, splat(value)); });
}

// The gradient of a row that has none, or no class: zeros or NaN. Whether it was such a row.
template <class T, class AnyRow>
inline bool fill_unusual(const AnyRow& row, T* dx) {
  if (row.ignored()) {
    fill<T>(dx, row.p.cols, 0);
  } else if (!row.known()) {
    fill<T>(dx, row.p.cols, static_cast<AccOf<T>>(__builtin_nan("")));
  } else {
    return false;
  }
  return true;
}

template <class T, class P, TargetKind kKind, bool kCap>
void fwd_rows(const CrossEntropyFwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  Acc* stats = static_cast<Acc*>(p.stats);
  for (int64_t r = begin; r < end; ++r) {
    Row<T, P, kKind, kCap> row(p, r);
    Acc loss = 0;
    if (row.ignored()) {
      row.max = 0;
    } else if (!row.known()) {
      loss = row.max = static_cast<Acc>(__builtin_nan(""));
    } else {
      loss = row.measure();
      const Acc lse = row.max + row.log_sum;
      if (p.z_loss != 0.0) loss += static_cast<Acc>(p.z_loss) * lse * lse;
    }
    static_cast<Acc*>(p.loss)[r] = loss;
    stats[kStatMax * p.rows + r] = row.max;
    stats[kStatLogSum * p.rows + r] = row.log_sum;
    stats[kStatMass * p.rows + r] = row.mass;
    if (p.dloss == nullptr) continue;
    T* dx = static_cast<T*>(p.dinput) + r * p.cols;
    if (!fill_unusual(row, dx)) row.pull_back(dx, static_cast<const Acc*>(p.dloss)[r * p.dloss_stride]);
  }
}

template <class T, class P, TargetKind kKind, bool kCap>
void bwd_rows(const CrossEntropyBwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const Acc* stats = static_cast<const Acc*>(p.stats);
  for (int64_t r = begin; r < end; ++r) {
    Row<T, P, kKind, kCap> row(p, r);
    T* dx = static_cast<T*>(p.dinput) + r * p.cols;
    if (fill_unusual(row, dx)) continue;
    row.max = stats[kStatMax * p.rows + r];
    row.log_sum = stats[kStatLogSum * p.rows + r];
    row.mass = stats[kStatMass * p.rows + r];
    row.pull_back(dx, static_cast<const Acc*>(p.dloss)[r * p.dloss_stride]);
  }
}

// Calls f(T{}, P{}, kind, cap) for the types and the options of a call.
template <TargetKind kKind>
struct Kind {
  static constexpr TargetKind value = kKind;
};

template <class T, class P, TargetKind kKind, class F>
inline void with_cap(const CrossEntropyInputs& p, F&& f) {
  if (p.softcap != 0.0) return f(T{}, P{}, Kind<kKind>{}, std::true_type{});
  return f(T{}, P{}, Kind<kKind>{}, std::false_type{});
}

template <class T, class F>
inline void with_target(const CrossEntropyInputs& p, F&& f) {
  switch (p.kind) {
    case TargetKind::kIndex:
      return with_cap<T, T, TargetKind::kIndex>(p, f);
    case TargetKind::kSmoothedIndex:
      return with_cap<T, T, TargetKind::kSmoothedIndex>(p, f);
    case TargetKind::kProbabilities:
      if (p.wide_target) return with_cap<T, AccOf<T>, TargetKind::kProbabilities>(p, f);
      return with_cap<T, T, TargetKind::kProbabilities>(p, f);
  }
}

template <class F>
inline void with_types(const CrossEntropyInputs& p, F&& f) {
  with_type(p.dtype, [&](auto t) { with_target<decltype(t)>(p, f); });
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyFwdParams& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto t, auto probability, auto kind, auto cap) {
    fwd_rows<decltype(t), decltype(probability), decltype(kind)::value, decltype(cap)::value>(p, begin, end);
  });
}

void cross_entropy_bwd(const CrossEntropyBwdParams& p, int64_t begin, int64_t end) {
  with_types(p, [&](auto t, auto probability, auto kind, auto cap) {
    bwd_rows<decltype(t), decltype(probability), decltype(kind)::value, decltype(cap)::value>(p, begin, end);
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
