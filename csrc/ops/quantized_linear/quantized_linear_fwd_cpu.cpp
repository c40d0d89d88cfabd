// y = x @ weight^T + bias: a block of rows of the weight at a time, for all rows of x or some hundreds of them.
//
// Few rows of x: the weight is expanded in registers (quantized_linear_cpu_direct.h). Many: into the cache, a part of
// its columns after the other, and multiplied from there (quantized_linear_cpu_product.h). Sums are of floats or
// integers; the scale of a row, zero points that bytes leave to the end, the scale of a row of x and the bias are last.
#include "ops/quantized_linear/quantized_linear_cpu_product.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int64_t kBlockRows = 64;      // of the weight: a task
constexpr int64_t kTaskRows = 512;      // of x
constexpr int64_t kMostDirect = 8;      // rows of x for which the weight is expanded in registers
constexpr int64_t kPartBytes = 4096;    // of the columns of a row, expanded: kBlockRows of them fit the second cache
constexpr int64_t kLeastTurned = 64;    // rows of x that pay for the turning of a block (from 51 on with AVX512-BF16)

// Whether the words of expanded rows may be multiplied column by column, as product.h does: not with AVX2, where that
// took 3 % longer at 128 rows.
template <class Operand>
constexpr bool kCanTurn = (kIsFloat<Operand> && kVectorBytes == 64) ||
                          (kOnAmx<int8_t> && std::is_same_v<Operand, IntegerOperand>);

// How a call is made: what all its tasks agree on.
struct Way {
  bool direct;
  bool grouped;     // sums are scaled group by group
  bool turned;      // the words of an expanded block are multiplied column by column; on AMX they always are
  int32_t lane_sums;  // the factor of the sums of x's lanes; 0: none are needed
  int64_t n_blocks, m_blocks;
};

inline Way way_of(const QuantizedLinearFwdParams& p) {
  const bool codes = four_bits(p.weight.format), integers = p.activations == Activations::kInt8;
  Way way;
  way.direct = p.M <= kMostDirect;
  // Floats that are expanded into the cache have the scales of their groups there.
  way.grouped = p.weight.group_size != 0 && (way.direct || integers);
  // Thousands of products one after the other lose digits that a result of fp32 would show.
  way.turned = !way.direct && p.M >= kLeastTurned && p.dtype != DType::kFloat32;
  const bool lane_sums = integers && codes && kBytes && way.direct && way.grouped;
  way.lane_sums = !lane_sums ? 0 : p.weight.zeros != nullptr ? 1 : -kInt4Middle;
  way.n_blocks = div_up(p.weight.N, kBlockRows);
  way.m_blocks = div_up(p.M, kTaskRows);
  return way;
}

// f(operand type) for the operands of a call.
template <class F>
inline auto with_operand(const QuantizedLinearFwdParams& p, const Way& way, F&& f) {
  if (p.activations == Activations::kInt8) {
    return way.grouped && !way.direct ? f(CachedCodes{}) : f(IntegerOperand{});
  }
#if defined(CPU_CAPABILITY_AVX512_BF16)
  const bool exact = p.activations == Activations::kFp8 && p.weight.group_size == 0;
  if (exact || p.dtype == DType::kBFloat16) return f(PairOperand{});
#endif
  return f(FloatOperand{});
}

// The memory of a task.
struct Scratch {
  float* sums;           // [rows of x][kBlockRows]; of integers: their bits
  float* scales;         // [kBlockRows][groups_stride]
  int32_t* minus_zeros;  // the same
  char* expanded;        // [kBlockRows], `expanded_stride` bytes apart
  int64_t expanded_stride;
  Word* turned;          // [kPartBytes / 4][kBlockRows]: the same, column by column
  int64_t bytes;

  Scratch(const QuantizedLinearFwdParams& p, const Way& way, char* memory) {
    const int64_t m_count = p.M < kTaskRows ? p.M : kTaskRows;
    const int64_t groups = kBlockRows * groups_stride(p.weight) * 4;
    int64_t at = 0;
    const auto take = [&](int64_t size) {
      char* const here = memory + at;
      at += round_up(size, 64);
      return here;
    };
    sums = reinterpret_cast<float*>(take(round_up(m_count, kTileRows<BFloat16>) * kBlockRows * 4));
    scales = reinterpret_cast<float*>(take(groups));
    minus_zeros = reinterpret_cast<int32_t*>(take(groups));
    expanded_stride = kPartBytes + 64;
    expanded = take(way.direct ? 0 : kBlockRows * expanded_stride);
    const bool is_turned = way.turned || (kOnAmx<BFloat16> && !way.direct);
    turned = reinterpret_cast<Word*>(take(is_turned ? kPartBytes * kBlockRows : 0));
    bytes = at;
  }
};

template <class Operand>
inline void direct_block(const QuantizedLinearFwdParams& p, const Way& way, const PreparedRows& rows,
                         const WeightRow* w_rows, int64_t n_count, float* sums) {
  const QuantizedWeight& weight = p.weight;
  const GroupLanes lanes(weight.group_size);
  for (int64_t n = 0; n < n_count; n += kTileWeights) {
    const int count = static_cast<int>(n_count - n < kTileWeights ? n_count - n : kTileWeights);
    const auto call = [&](auto codes, auto scales) {
      direct_rows<Operand, decltype(codes)::value, decltype(scales)::value>(weight, w_rows + n, count, lanes, rows, p.M,
                                                                            sums + n, kBlockRows);
    };
    const auto with_groups = [&](auto codes) {
      if (!way.grouped) return call(codes, std::integral_constant<Scales, Scales::kRow>{});
      if (in_four_bits(decltype(codes)::value) && lanes.per_block > 1) {
        return call(codes, std::integral_constant<Scales, Scales::kGroups>{});
      }
      call(codes, std::integral_constant<Scales, Scales::kGroup>{});
    };
    if (weight.format == WeightFormat::kInt8) {
      call(std::integral_constant<Codes, Codes::kInt8>{}, std::integral_constant<Scales, Scales::kRow>{});
    } else if (four_bits(weight.format)) {
      if (weight.zeros != nullptr) {
        with_groups(std::integral_constant<Codes, Codes::kZeros>{});
      } else {
        with_groups(std::integral_constant<Codes, Codes::kLevels>{});
      }
    } else if constexpr (kIsFloat<Operand>) {
      with_groups(std::integral_constant<Codes, Codes::kFp8>{});
    }
  }
}

// Integers of a block of rows of the weight, the columns [first, end) of whole blocks, as operands.
template <class Operand>
inline void expand_integers(const QuantizedWeight& weight, const WeightRow& row, int64_t first, int64_t end,
                            typename Operand::Element* to) {
  const GroupLanes lanes(weight.group_size);
  const bool codes = four_bits(weight.format);
  for (int64_t k = first; k < end; k += kBlockColumns, to += kBlockColumns) {
    const uint8_t* from = row.bytes + bytes_of(weight, k);
    fetch_ahead(weight, from);
    uint8_t rest[kBlockColumns] = {};
    if (weight.K - k < kBlockColumns) {
      __builtin_memcpy(rest, from, static_cast<uint64_t>(row_bytes(weight) - bytes_of(weight, k)));
      from = rest;
    }
    Bits w[Operand::kPlanes];
    if (codes && weight.zeros != nullptr) {
      Expander<Operand, Codes::kZeros>(weight.format)(from, lanes.of(row.minus_zeros, k / kBlockColumns), w);
    } else if (codes) {
      Expander<Operand, Codes::kLevels>(weight.format)(from, Int32Vector{}, w);
    } else {
      Expander<Operand, Codes::kInt8>(weight.format)(from, Int32Vector{}, w);
    }
    __builtin_memcpy(to, w, sizeof(w));
  }
}

// The columns [first, end) of a row of the weight as operands.
template <class Operand>
inline void expand_row(const QuantizedWeight& weight, const WeightRow& row, int64_t first, int64_t end,
                       typename Operand::Element* to) {
  if constexpr (kIsFloat<Operand>) {
    expand<Operand>(weight, row, weight.group_size != 0, first, end, to);
  } else {
    expand_integers<Operand>(weight, row, first, end, to);
  }
}

template <class Operand>
inline void product_block(const QuantizedLinearFwdParams& p, const Way& way, const PreparedRows& rows, int64_t m,
                          int64_t m_count, const WeightRow* w_rows, int64_t n_count, const Scratch& scratch) {
  using Element = typename Operand::Element;
  const QuantizedWeight& weight = p.weight;
  constexpr int64_t kPart = kPartBytes / static_cast<int64_t>(sizeof(Element));
  const GroupLanes lanes(weight.group_size);
  const int64_t stride = scratch.expanded_stride / static_cast<int64_t>(sizeof(Element));
  auto* const expanded = reinterpret_cast<Element*>(scratch.expanded);
  const int64_t columns = round_up(weight.K, kBlockColumns);
  for (int64_t first = 0; first == 0 || first < columns; first += kPart) {
    const int64_t end = first + kPart < columns ? first + kPart : columns;
    if constexpr (kCanTurn<Operand>) {
      if (way.turned || kOnAmx<ProductElement<Operand>>) {
        const int64_t words = (end - first) / kPerWord<ProductElement<Operand>>;
        for (int64_t n = 0; n < n_count; n += kWords) {
          const int64_t count = n_count - n < kWords ? n_count - n : kWords;
          for (int64_t i = 0; i < count; ++i) {
            expand_row<Operand>(weight, w_rows[n + i], first, end, expanded + i * stride);
          }
          turn_rows<Operand>(expanded, stride, count, words, scratch.turned + n, kBlockRows);
        }
        turned_rows<Operand>(rows, m, m_count, first, words, scratch.turned, round_up(n_count, kWords), first != 0,
                             scratch.sums, kBlockRows);
        continue;
      }
    }
    for (int64_t n = 0; n < n_count; ++n) expand_row<Operand>(weight, w_rows[n], first, end, expanded + n * stride);
    const Expanded<Operand> w{expanded, stride, w_rows};
    const auto call = [&](auto grouped) {
      expanded_rows<Operand, decltype(grouped)::value>(rows, m, m_count, w, n_count, lanes, first / kBlockColumns,
                                                       end / kBlockColumns, first != 0, scratch.sums, kBlockRows);
    };
    if constexpr (!kIsFloat<Operand>) {
      if (way.grouped) call(std::true_type{});
    }
    if (!way.grouped) call(std::false_type{});
  }
}

// Sums of a block to y, a row of x after the other.
template <class Operand, class T>
inline void finish(const QuantizedLinearFwdParams& p, const Way& way, const PreparedRows& rows, int64_t m,
                   int64_t m_count, int64_t n, int64_t n_count, const WeightRow* w_rows, const float* sums) {
  const bool row_scaled = p.weight.group_size == 0, rounded_x = p.activations != Activations::kPlain;
  const bool integers = !kIsFloat<Operand> && !way.grouped;
  const T* const bias = static_cast<const T*>(p.bias);
  float scales[kBlockRows] = {}, shifts[kBlockRows] = {};
  int32_t offsets[kBlockRows] = {};  // what bytes without a sign have too much, times the sum of a row of x
  for (int64_t j = 0; j < n_count; ++j) {
    scales[j] = row_scaled ? w_rows[j].scales[0] : 1.0f;
    if (integers && kBytes) {
      const int32_t zero = p.weight.zeros != nullptr ? -w_rows[j].minus_zeros[0] : kInt4Middle;
      offsets[j] = p.weight.format == WeightFormat::kInt8 ? 128 : zero;
    }
  }
  if (bias != nullptr) {
    for_each_vector<float>(0, n_count, [&](int64_t j, auto part) { part.store(shifts + j, part.load(bias + n + j)); });
  }
  for (int64_t r = 0; r < m_count; ++r) {
    T* const to = static_cast<T*>(p.y) + (m + r) * p.weight.N + n;
    const float x_scale = rounded_x ? rows.scales[m + r] : 1.0f;
    const int32_t x_sum = integers ? rows.sums[m + r] : 0;
    for_each_vector<float>(0, n_count, [&](int64_t j, auto part) {
      const float* const from = sums + r * kBlockRows + j;
      FloatVector value = load(from);
      if (integers) {
        value = as_float(bit_cast<Int32Vector>(value) - bit_cast<Int32Vector>(load_bits(offsets + j)) * x_sum);
      }
      value = rounded(value * rounded(load(scales + j) * x_scale));
      part.store(to + j, bias != nullptr ? value + load(shifts + j) : value);
    });
  }
}

template <class Operand>
inline void run_tasks(const QuantizedLinearFwdParams& p, const Way& way, const char* memory, int64_t begin,
                      int64_t end, char* task_memory) {
  const Scratch scratch(p, way, task_memory);
  const QuantizedWeight& weight = p.weight;
  const PreparedRows rows = prepared_rows<Operand>(const_cast<char*>(memory), p.M, weight.K, way.lane_sums != 0);
  const int64_t stride = groups_stride(weight);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t n = task % way.n_blocks * kBlockRows, m = task / way.n_blocks * kTaskRows;
    const int64_t n_count = weight.N - n < kBlockRows ? weight.N - n : kBlockRows;
    const int64_t m_count = p.M - m < kTaskRows ? p.M - m : kTaskRows;
    WeightRow w_rows[kBlockRows];
    for (int64_t i = 0; i < n_count; ++i) {
      int32_t* const minus_zeros = weight.zeros != nullptr ? scratch.minus_zeros + i * stride : nullptr;
      read_groups(weight, n + i, scratch.scales + i * stride, minus_zeros);
      w_rows[i] = {row_of(weight, n + i), scratch.scales + i * stride, minus_zeros};
    }
    if (way.direct) {
      if constexpr (!std::is_same_v<Operand, CachedCodes> || !kBytes) {
        direct_block<Operand>(p, way, rows, w_rows, n_count, scratch.sums);
      }
    } else {
      product_block<Operand>(p, way, rows, m, m_count, w_rows, n_count, scratch);
    }
    with_narrow_type(p.dtype, [&](auto type) {
      finish<Operand, decltype(type)>(p, way, rows, m, m_count, n, n_count, w_rows, scratch.sums);
    });
  }
}

}  // namespace

QuantizedLinearWork quantized_linear_fwd_work(const QuantizedLinearFwdParams& p) {
  const Way way = way_of(p);
  return with_operand(p, way, [&](auto operand) {
    QuantizedLinearWork work;
    work.rows_bytes = prepared_rows<decltype(operand)>(nullptr, p.M, p.weight.K, way.lane_sums != 0).bytes;
    work.tasks = way.n_blocks * way.m_blocks;
    work.task_flops = 2 * kBlockRows * (p.M < kTaskRows ? p.M : kTaskRows) * p.weight.K;
    work.scratch_bytes = Scratch(p, way, nullptr).bytes;
    return work;
  });
}

void quantized_linear_fwd_prepare(const QuantizedLinearFwdParams& p, char* memory, int64_t begin, int64_t end) {
  const Way way = way_of(p);
  with_operand(p, way, [&](auto operand) {
    using Operand = decltype(operand);
    const PreparedRows rows = prepared_rows<Operand>(memory, p.M, p.weight.K, way.lane_sums != 0);
    // Floats are expanded into the cache in natural order, integers as they come.
    const bool in_planes = four_bits(p.weight.format) && (way.direct || !kIsFloat<Operand>);
    with_narrow_type(p.dtype, [&](auto type) {
      using T = decltype(type);
      for (int64_t m = begin; m < end; ++m) {
        const T* x = static_cast<const T*>(p.x) + m * p.x_row_stride;
        if (in_planes) {
          prepare_row<Operand, true>(x, p.weight.K, p.activations, rows, m, way.lane_sums);
        } else {
          prepare_row<Operand, false>(x, p.weight.K, p.activations, rows, m, way.lane_sums);
        }
      }
    });
  });
}

void quantized_linear_fwd(const QuantizedLinearFwdParams& p, const char* rows, int64_t begin, int64_t end,
                          char* scratch) {
  const Way way = way_of(p);
  with_operand(p, way, [&](auto operand) { run_tasks<decltype(operand)>(p, way, rows, begin, end, scratch); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
