// dx = dy @ weight: a strip of columns of the weight at a time, for some hundreds of rows of dy.
//
// Rows of the weight are expanded into the cache, some after the others, scaled and in the order of their columns, as
// common/cpu/product.h multiplies them: dy element by element, the weight vector by vector.
#include "ops/quantized_linear/quantized_linear_cpu_weight.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kStrip = 512;     // columns of a task
constexpr int64_t kTaskRows = 256;  // of dy
constexpr int64_t kPartRows = 128;  // of the weight, expanded: 128 or 256 KB

// bf16 words have two rows of the weight, one after the other.
template <class F>
inline auto with_operand(const QuantizedLinearBwdParams& p, F&& f) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  if (p.dtype == DType::kBFloat16) return f(PairOperand{});
#endif
  return f(FloatOperand{});
}

// The memory of a task.
struct Scratch {
  static constexpr int64_t kStride = kStrip + 16;  // of a row of words or sums: not a multiple of 4096 bytes

  float* sums;       // [rows of dy][kStride]
  Word* expanded;    // [words of kPartRows][kStride]
  float* rows;       // [2][kStrip]: two rows of the weight
  float* part;       // [kTileRows][kStride]: of a tile of rows and of a part of the weight
  float* scales;     // of the groups of a row
  int32_t* minus_zeros;
  int64_t bytes;

  Scratch(const QuantizedLinearBwdParams& p, char* memory) {
    int64_t at = 0;
    const auto take = [&](int64_t words) {
      char* const here = memory + at;
      at += round_up(words * 4, 64);
      return here;
    };
    sums = reinterpret_cast<float*>(take((p.M < kTaskRows ? p.M : kTaskRows) * kStride));
    expanded = reinterpret_cast<Word*>(take(kPartRows * kStride));
    rows = reinterpret_cast<float*>(take(2 * kStrip));
    part = reinterpret_cast<float*>(take(32 * kStride));
    scales = reinterpret_cast<float*>(take(groups_stride(p.weight)));
    minus_zeros = reinterpret_cast<int32_t*>(take(groups_stride(p.weight)));
    bytes = at;
  }
};

template <class Operand>
inline void expand_row(const QuantizedWeight& weight, int64_t n, int64_t first, int64_t end, const Scratch& scratch,
                       typename Operand::Element* to) {
  if (n >= weight.N) {
    __builtin_memset(to, 0, static_cast<uint64_t>(end - first) * sizeof(*to));
    return;
  }
  int32_t* const minus_zeros = weight.zeros != nullptr ? scratch.minus_zeros : nullptr;
  read_groups(weight, n, scratch.scales, minus_zeros);
  expand<Operand>(weight, {row_of(weight, n), scratch.scales, minus_zeros}, true, first, end, to);
}

// The rows [begin, stop) of the weight as words, the columns [first, end) of whole blocks.
template <class Operand>
inline void expand_words(const QuantizedWeight& weight, int64_t begin, int64_t stop, int64_t first, int64_t end,
                         const Scratch& scratch) {
  Word* to = scratch.expanded;
  if constexpr (std::is_same_v<Operand, FloatOperand>) {
    for (int64_t n = begin; n < stop; ++n, to += Scratch::kStride) {
      expand_row<Operand>(weight, n, first, end, scratch, reinterpret_cast<float*>(to));
    }
  } else {
#if defined(CPU_CAPABILITY_AVX512_BF16)
    uint16_t* const even = reinterpret_cast<uint16_t*>(scratch.rows);
    uint16_t* const odd = even + kStrip;
    UInt16Vector low, high;
    for (int i = 0; i < 2 * kWords; ++i) {
      low[i] = static_cast<uint16_t>(i / 2 + i % 2 * 2 * kWords);
      high[i] = static_cast<uint16_t>(kWords + i / 2 + i % 2 * 2 * kWords);
    }
    // Behind the last row zeros, for whole tiles.
    for (int64_t n = begin; n < begin + 2 * words_of<BFloat16>(stop - begin); n += 2, to += Scratch::kStride) {
      expand_row<Operand>(weight, n, first, end, scratch, even);
      expand_row<Operand>(weight, n + 1, first, end, scratch, odd);
      for (int64_t k = 0; k < end - first; k += 2 * kWords) {
        const UInt16Vector a = bit_cast<UInt16Vector>(load_bits(even + k));
        const UInt16Vector b = bit_cast<UInt16Vector>(load_bits(odd + k));
        const UInt16Vector words[2] = {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high)};
        __builtin_memcpy(to + k, words, sizeof(words));
      }
    }
#endif
  }
}

template <class Operand>
inline void run_tasks(const QuantizedLinearBwdParams& p, const char* memory, int64_t begin, int64_t end,
                      char* task_memory) {
  using C = ProductElement<Operand>;
  const QuantizedWeight& weight = p.weight;
  const Scratch scratch(p, task_memory);
  const PreparedRows rows = prepared_rows<Operand>(const_cast<char*>(memory), p.M, weight.N, false);
  const int64_t strips = div_up(weight.K, kStrip), row_words = rows.stride / static_cast<int64_t>(sizeof(Word));
  const ProductScope<C> scope;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t first = task % strips * kStrip, m = task / strips * kTaskRows;
    const int64_t last = first + kStrip < weight.K ? first + kStrip : weight.K;
    const int64_t columns = round_up(last - first, kBlockColumns);
    const int64_t m_count = p.M - m < kTaskRows ? p.M - m : kTaskRows;
    __builtin_memset(scratch.sums, 0, static_cast<uint64_t>(m_count * Scratch::kStride) * sizeof(float));
    for (int64_t n = 0; n < weight.N; n += kPartRows) {
      const int64_t stop = n + kPartRows < weight.N ? n + kPartRows : weight.N;
      expand_words<Operand>(weight, n, stop, first, first + columns, scratch);
      for (int64_t r = 0; r < m_count; r += kTileRows<C>) {
        const int count = static_cast<int>(m_count - r < kTileRows<C> ? m_count - r : kTileRows<C>);
        const Word* const dy = reinterpret_cast<const Word*>(rows.row<Operand>(m + r)) + n / kPerWord<C>;
        product_rows<C>({dy, row_words, 1, scratch.expanded, Scratch::kStride, words_of<C>(stop - n),
                         scratch.part, Scratch::kStride, nullptr},
                        count, columns);
        // Each part is summed by itself: thousands of rows one after the other would lose digits.
        for (int64_t i = 0; i < count; ++i) {
          float* const sums = scratch.sums + (r + i) * Scratch::kStride;
          const float* const part = scratch.part + i * Scratch::kStride;
          for (int64_t k = 0; k < columns; k += kWords) store(sums + k, load(sums + k) + load(part + k));
        }
      }
    }
    with_narrow_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t r = 0; r < m_count; ++r) {
        T* const to = static_cast<T*>(p.dx) + (m + r) * weight.K + first;
        const float* const sums = scratch.sums + r * Scratch::kStride;
        for_each_vector<float>(0, last - first, [&](int64_t k, auto part) { part.store(to + k, part.load(sums + k)); });
      }
    });
  }
}

}  // namespace

QuantizedLinearWork quantized_linear_bwd_work(const QuantizedLinearBwdParams& p) {
  const int64_t strips = div_up(p.weight.K, kStrip);
  QuantizedLinearWork work;
  work.rows_bytes = with_operand(p, [&](auto operand) {
    return prepared_rows<decltype(operand)>(nullptr, p.M, p.weight.N, false).bytes;
  });
  work.tasks = strips * div_up(p.M, kTaskRows);
  work.task_flops = 2 * kStrip * (p.M < kTaskRows ? p.M : kTaskRows) * p.weight.N;
  work.scratch_bytes = Scratch(p, nullptr).bytes;
  return work;
}

void quantized_linear_bwd_prepare(const QuantizedLinearBwdParams& p, char* memory, int64_t begin, int64_t end) {
  with_operand(p, [&](auto operand) {
    using Operand = decltype(operand);
    const PreparedRows rows = prepared_rows<Operand>(memory, p.M, p.weight.N, false);
    with_narrow_type(p.dtype, [&](auto type) {
      const auto* dy = static_cast<const decltype(type)*>(p.dy);
      for (int64_t m = begin; m < end; ++m) {
        prepare_row<Operand, false>(dy + m * p.dy_row_stride, p.weight.N, Activations::kPlain, rows, m, 0);
      }
    });
  });
}

void quantized_linear_bwd(const QuantizedLinearBwdParams& p, const char* rows, int64_t begin, int64_t end,
                          char* scratch) {
  with_operand(p, [&](auto operand) { run_tasks<decltype(operand)>(p, rows, begin, end, scratch); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
