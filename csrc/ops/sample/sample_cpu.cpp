// sample on the CPU, compiled once per instruction set. The maths is in sample.h.
//
// Nothing is sorted: thresholds are found by counting how many logits, and how much of the sum, fall into each of 4,096
// intervals, and then into parts of the one interval in which the threshold lies.
#include "ops/sample/sample_cpu.h"

#include "common/cpu/math.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr float kInfinity = __builtin_inff();
constexpr int64_t kChunk = 1024;  // columns whose sum is one float vector's

// Unsigned numbers in the order of the floats, and back.
inline uint32_t key_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
}
inline float of_key(uint32_t key) {
  const uint32_t bits = (key >> 31) != 0 ? key & 0x7fffffffu : ~key;
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

// How many logits and how much of the sum have a key in each interval of 2^shift.
constexpr int kIntervals = 4096;
struct Histogram {
  int64_t count[kIntervals];
  double mass[kIntervals];
};

// The keys of one level: the intervals of 2^shift within the interval `prefix` of the level before.
struct Level {
  int shift, bits;
};
constexpr Level kLevels[] = {{20, 12}, {10, 10}, {0, 10}};

struct Row {
  const float* x;
  const float* e;
  int64_t cols;
};

inline void fill(const Row& row, Level level, uint32_t prefix, Histogram& h) {
  const uint32_t last = (1u << level.bits) - 1u;
  for (uint32_t i = 0; i <= last; ++i) {
    h.count[i] = 0;
    h.mass[i] = 0.0;
  }
  const int above = level.shift + level.bits;
  for (int64_t j = 0; j < row.cols; ++j) {
    const uint32_t key = key_of(row.x[j]);
    if (above < 32 && key >> above != prefix) continue;
    const uint32_t interval = (key >> level.shift) & last;
    ++h.count[interval];
    h.mass[interval] += static_cast<double>(row.e[j]);
  }
}

// The smallest key that is taken: keys are taken from the largest on until `enough(count, mass)` of what is taken.
// `first` is the histogram of the first level.
template <class Enough>
inline uint32_t threshold(const Row& row, const Histogram& first, Histogram& rest, Enough&& enough) {
  int64_t count = 0;
  double mass = 0.0;
  uint32_t prefix = 0;
  const Histogram* h = &first;
  for (int i = 0; i < 3; ++i) {
    const Level level = kLevels[i];
    if (i > 0) {
      fill(row, level, prefix, rest);
      h = &rest;
    }
    int64_t at = (int64_t{1} << level.bits) - 1, lowest = at;
    for (; at >= 0; --at) {
      if (h->count[at] == 0) continue;
      lowest = at;
      if (enough(count + h->count[at], mass + h->mass[at])) break;
      count += h->count[at];
      mass += h->mass[at];
    }
    // By rounding everything together may not be enough: then everything is taken.
    prefix = prefix << level.bits | static_cast<uint32_t>(at < 0 ? lowest : at);
    if (at < 0) return prefix << level.shift;
  }
  return prefix;
}

// e of the columns from j on that are taken, others zero.
struct Taken {
  const Row row;
  float least_x, least_e;

  template <class Part>
  FloatVector operator()(int64_t j, Part part) const {
    const FloatVector x = part.load(row.x + j), e = part.load(row.e + j);
    const FloatVector high = x >= least_x ? e : FloatVector{};
    return part.template keep<float>(high >= least_e ? high : FloatVector{});
  }
  double sum_of_chunk(int64_t begin, int64_t end) const {
    FloatVector total{};
    for_each_vector<float>(begin, end, [&](int64_t j, auto part) { total += (*this)(j, part); });
    return static_cast<double>(sum<float>(total));
  }
  bool has(int64_t j) const { return row.x[j] >= least_x && row.e[j] >= least_e && row.e[j] > 0.0f; }
};

inline int64_t chunk_end(int64_t begin, int64_t cols) { return begin + kChunk < cols ? begin + kChunk : cols; }

inline int64_t draw(const Taken& taken, double u) {
  const int64_t cols = taken.row.cols;
  double total = 0.0;
  int64_t last_chunk = 0;
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const double mass = taken.sum_of_chunk(begin, chunk_end(begin, cols));
    total += mass;
    if (mass > 0.0) last_chunk = begin;
  }
  const double target = u * total;
  double sum = 0.0;
  for (int64_t begin = 0; begin <= last_chunk; begin += kChunk) {
    const double mass = taken.sum_of_chunk(begin, chunk_end(begin, cols));
    if (begin < last_chunk && !(sum + mass > target)) {
      sum += mass;
      continue;
    }
    int64_t last = begin;  // by rounding no sum may exceed the target: then the last one that is taken
    for (int64_t j = begin; j < chunk_end(begin, cols); ++j) {
      if (!taken.has(j)) continue;
      last = j;
      sum += static_cast<double>(taken.row.e[j]);
      if (sum > target) break;
    }
    return last;
  }
  return 0;
}

// The largest of a row, whose elements are put into `x`; a NaN if there is one.
template <class T>
inline float largest(const T* logits, int64_t cols, float* x) {
  FloatVector most = splat(-kInfinity), nothing{};
  int64_t j = 0;
  for (; j + kLanes<float> <= cols; j += kLanes<float>) {
    const FloatVector v = load(logits + j);
    store(x + j, v);
    most = v > most ? v : most;
    nothing += v != v ? v : FloatVector{};  // becomes a NaN and stays one
  }
  if (j < cols) {
    const int count = static_cast<int>(cols - j);
    store_tail(x + j, load_tail(logits + j, count), count);
  }
  float top = sum<float>(nothing);
  if (top != top) return top;
  top = most[0];
  for (int i = 1; i < kLanes<float>; ++i) top = most[i] > top ? most[i] : top;
  for (; j < cols; ++j) {
    if (x[j] != x[j]) return x[j];
    top = x[j] > top ? x[j] : top;
  }
  return top;
}

template <class T>
inline int64_t token_of(const SampleParams& p, int64_t r, float* scratch) {
  float *x = scratch, *e = scratch + p.cols;
  const float top = largest(static_cast<const T*>(p.logits) + r * p.row_stride, p.cols, x);
  if (!(top > -kInfinity && top < kInfinity)) return -1;
  if (p.temperature == 0.0) {
    for (int64_t j = 0;; ++j) {
      if (x[j] == top) return j;
    }
  }
  const double inverse = 1.0 / p.temperature;
  constexpr double kLargest = 3.4e38;  // an infinite factor would make a NaN of the largest logit
  const float factor = static_cast<float>(inverse < kLargest ? inverse : kLargest);
  for_each_vector<float>(0, p.cols, [&](int64_t j, auto part) { part.store(e + j, exp<float>((part.load(x + j) - top) * factor)); });

  const Row row{x, e, p.cols};
  float least_x = -kInfinity;
  const bool few = p.top_k > 0 && p.top_k < p.cols;
  if (few || p.top_p < 1.0) {
    Histogram first, rest;
    fill(row, kLevels[0], 0, first);
    if (few) least_x = of_key(threshold(row, first, rest, [&](int64_t count, double) { return count >= p.top_k; }));
    if (p.top_p < 1.0) {
      double mass = 0.0;
      const Taken of_top_k{row, least_x, 0.0f};
      for (int64_t begin = 0; begin < p.cols; begin += kChunk) mass += of_top_k.sum_of_chunk(begin, chunk_end(begin, p.cols));
      const double target = p.top_p * mass;
      const float of_top_p = of_key(threshold(row, first, rest, [&](int64_t, double sum) { return sum >= target; }));
      least_x = of_top_p > least_x ? of_top_p : least_x;
    }
  }
  return draw(Taken{row, least_x, static_cast<float>(p.min_p)}, p.u[r]);
}

template <class T>
void sample_rows(const SampleParams& p, float* scratch, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) p.tokens[row] = token_of<T>(p, row, scratch);
}

}  // namespace

void sample(const SampleParams& p, float* scratch, int64_t begin, int64_t end) {
  with_narrow_type(p.dtype, [&](auto t) { sample_rows<decltype(t)>(p, scratch, begin, end); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
