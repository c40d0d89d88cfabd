// rope on the CPU, compiled once per instruction set. The maths is in rope.h.
#include "ops/rope/rope_cpu.h"

#include "common/cpu/map.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Whether load_pair gives the even and the odd elements instead of one vector after the other.
#if defined(CPU_CAPABILITY_AVX512)
template <class T>
constexpr bool kPairsApart = std::is_same_v<T, BFloat16>;
#else
template <class T>
constexpr bool kPairsApart = false;
#endif

template <class Acc>
struct EvenOdd {
  Vec<Acc> even, odd;
};

// The even and the odd elements of 2 * kLanes in a row, and back.
template <class Acc>
inline EvenOdd<Acc> apart(Vec<Acc> a, Vec<Acc> b) {
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices even{};
  for (int i = 0; i < kLanes<Acc>; ++i) even[i] = 2 * i;
  return {__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, even + 1)};
}
template <class Acc>
inline EvenOdd<Acc> together(Vec<Acc> even, Vec<Acc> odd) {
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  typedef Index Indices __attribute__((vector_size(kVectorBytes)));
  Indices low{};
  for (int i = 0; i < kLanes<Acc>; ++i) low[i] = i / 2 + i % 2 * kLanes<Acc>;
  return {__builtin_shuffle(even, odd, low), __builtin_shuffle(even, odd, low + kLanes<Acc> / 2)};
}

// As store_pair, past the caches if kStream, which asks for an aligned address.
template <bool kStream, class T>
inline void put_pair(T* to, Vec<AccOf<T>> a, Vec<AccOf<T>> b) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (kStream) {
    if constexpr (std::is_same_v<T, Float16>) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(narrow(a, T{})));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, bit_cast<__m256i>(narrow(b, T{})));
    } else if constexpr (std::is_same_v<T, BFloat16>) {
      __m512i bits;
      store_pair(reinterpret_cast<T*>(&bits), a, b);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
    } else {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bit_cast<__m512i>(a));
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to) + 1, bit_cast<__m512i>(b));
    }
    return;
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (kStream) {
    if constexpr (sizeof(T) == 2) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to), bit_cast<__m128i>(narrow(a, T{})));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to) + 1, bit_cast<__m128i>(narrow(b, T{})));
    } else {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bit_cast<__m256i>(a));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + 1, bit_cast<__m256i>(b));
    }
    return;
  }
#endif
  store_pair(to, a, b);
}

// One row of cos and sin as the heads read it: widened, turned back if `inverse`, and where load_pair takes pairs apart,
// those of whole pairs of vectors in that order.
template <class T, class W>
inline void stage_row(const W* cos, const W* sin, int64_t count, bool inverse, bool pairs, AccOf<T>* c, AccOf<T>* s) {
  using Acc = AccOf<T>;
  const Acc sign = inverse ? Acc{-1} : Acc{1};
  int64_t j = 0;
  if (kPairsApart<T> && pairs) {
    for (; j + 2 * kLanes<Acc> <= count; j += 2 * kLanes<Acc>) {
      const EvenOdd<Acc> of_cos = apart<Acc>(load(cos + j), load(cos + j + kLanes<Acc>));
      const EvenOdd<Acc> of_sin = apart<Acc>(load(sin + j), load(sin + j + kLanes<Acc>));
      store(c + j, of_cos.even);
      store(c + j + kLanes<Acc>, of_cos.odd);
      store(s + j, of_sin.even * sign);
      store(s + j + kLanes<Acc>, of_sin.odd * sign);
    }
  }
  for_each_vector<Acc>(j, count, [&](int64_t i, auto part) {
    part.store(c + i, part.load(cos + i));
    part.store(s + i, part.load(sin + i) * sign);
  });
}

// Pairs (a[j], b[j]) for j in [0, count).
template <bool kStream, class T>
inline void turn_halves(const T* a, const T* b, T* ya, T* yb, int64_t count, const AccOf<T>* c, const AccOf<T>* s) {
  using Acc = AccOf<T>;
  constexpr int kStep = kLanes<Acc>;
  int64_t j = 0;
  for (; j + 2 * kStep <= count; j += 2 * kStep) {
    Vec<Acc> a0, a1, b0, b1;
    load_pair(a + j, a0, a1);
    load_pair(b + j, b0, b1);
    const Vec<Acc> c0 = load(c + j), c1 = load(c + j + kStep), s0 = load(s + j), s1 = load(s + j + kStep);
    put_pair<kStream>(ya + j, a0 * c0 - b0 * s0, a1 * c1 - b1 * s1);
    put_pair<kStream>(yb + j, b0 * c0 + a0 * s0, b1 * c1 + a1 * s1);
  }
  for_each_vector<Acc>(j, count, [&](int64_t i, auto part) {
    const Vec<Acc> va = part.load(a + i), vb = part.load(b + i), vc = part.load(c + i), vs = part.load(s + i);
    part.store(ya + i, va * vc - vb * vs);
    part.store(yb + i, vb * vc + va * vs);
  });
}

// As many pairs as one vector has lanes, (x[2j], x[2j + 1]).
template <bool kStream, class T>
inline void turn_interleaved(const T* x, T* y, Vec<AccOf<T>> c, Vec<AccOf<T>> s) {
  using Acc = AccOf<T>;
  Vec<Acc> a, b;
  load_pair(x, a, b);
  if constexpr (!kPairsApart<T>) {
    const EvenOdd<Acc> pairs = apart<Acc>(a, b);
    a = pairs.even;
    b = pairs.odd;
  }
  Vec<Acc> ya = a * c - b * s, yb = b * c + a * s;
  if constexpr (!kPairsApart<T>) {
    const EvenOdd<Acc> pairs = together<Acc>(ya, yb);
    ya = pairs.even;
    yb = pairs.odd;
  }
  put_pair<kStream>(y, ya, yb);
}

template <bool kStream, class T>
inline void turn_interleaved(const T* x, T* y, int64_t count, const AccOf<T>* c, const AccOf<T>* s) {
  using Acc = AccOf<T>;
  constexpr int kStep = kLanes<Acc>;
  int64_t j = 0;
  for (; j + kStep <= count; j += kStep) turn_interleaved<kStream, T>(x + 2 * j, y + 2 * j, load(c + j), load(s + j));
  if (j == count) return;
  T rest[2 * kStep] = {};
  const int left = static_cast<int>(count - j);
  for (int i = 0; i < 2 * left; ++i) rest[i] = x[2 * j + i];
  turn_interleaved<false, T>(rest, rest, load_tail(c + j, left), load_tail(s + j, left));
  for (int i = 0; i < 2 * left; ++i) y[2 * j + i] = rest[i];
}

// Which places of which sequence a block holds, and which pairs of a head: all of them unless a head is very long.
struct Block {
  int64_t batch, first, rows, column, columns;
};

// cos and sin of a block: row i begins at i * columns.
template <class Acc>
struct Staged {
  alignas(kVectorBytes) Acc cos[kRopeStaged];
  alignas(kVectorBytes) Acc sin[kRopeStaged];
};

inline int64_t position_of(const RopeParams& p, int64_t batch, int64_t place) {
  const int64_t at = batch * p.position_batch_stride + place * p.position_seq_stride;
  return p.narrow_positions ? static_cast<const int32_t*>(p.positions)[at] : static_cast<const int64_t*>(p.positions)[at];
}

template <class T, class W>
inline void stage(const RopeParams& p, const Block& block, Staged<AccOf<T>>& staged) {
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t place = block.first + i;
    const int64_t row = p.positions != nullptr ? position_of(p, block.batch, place) : place;
    const W* cos = static_cast<const W*>(p.cos) + block.batch * p.cos_batch_stride + row * p.cos_row_stride;
    const W* sin = static_cast<const W*>(p.sin) + block.batch * p.sin_batch_stride + row * p.sin_row_stride;
    stage_row<T, W>(cos + block.column, sin + block.column, block.columns, p.inverse, !p.interleaved,
                    staged.cos + i * block.columns, staged.sin + i * block.columns);
  }
}

// Two loops over the heads of a block, as steps between rows of x, of y and of the staged cos and sin.
struct Loop {
  int64_t count, x_step, y_step, row_step;
};

// Bytes in front of a row that are asked for while it is turned: without that the loads of a row wait for memory, since
// the prefetcher starts anew where a block goes from one head to the next.
constexpr int64_t kAhead = 4096;

// Everything is in variables of its own: behind a pointer it might be overwritten by a store, for all that the compiler
// knows, and would be loaded again for every row.
template <class T, bool kInterleaved, bool kStream>
void turn_rows(const T* x, T* y, const AccOf<T>* c, const AccOf<T>* s, int64_t half, int64_t columns, int64_t rest,
               bool far, const Loop outer, const Loop inner) {
  for (int64_t i = 0; i < outer.count; ++i) {
    const T* from = x + i * outer.x_step;
    T* to = y + i * outer.y_step;
    int64_t row = i * outer.row_step;
    for (int64_t k = 0; k < inner.count; ++k, from += inner.x_step, to += inner.y_step, row += inner.row_step) {
      if (far) {
        const char* ahead = reinterpret_cast<const char*>(from) + kAhead;
        for (int64_t at = 0; at < 2 * columns * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(ahead + at);
      }
      if constexpr (kInterleaved) {
        turn_interleaved<kStream, T>(from, to, columns, c + row, s + row);
      } else {
        turn_halves<kStream, T>(from, from + half, to, to + half, columns, c + row, s + row);
      }
      if (rest > 0) __builtin_memcpy(to + 2 * half, from + 2 * half, rest * sizeof(T));
    }
  }
}

// Heads of one place after the other, or places of one head: whichever lie next to each other.
template <class T, bool kInterleaved, bool kStream>
void turn_block(const RopeParams& p, bool far, const Block& block, const RopeTensor& t,
                const Staged<AccOf<T>>& staged) {
  const int64_t column = kInterleaved ? 2 * block.column : block.column;
  const T* x = static_cast<const T*>(t.x) + block.batch * t.x_batch_stride + block.first * t.x_seq_stride + column;
  T* y = static_cast<T*>(t.y) + block.batch * t.y_batch_stride + block.first * t.y_seq_stride + column;
  const int64_t rest = t.x != t.y && column == 0 ? p.cols - 2 * p.half : 0;
  const Loop places{block.rows, t.x_seq_stride, t.y_seq_stride, block.columns};
  const Loop heads{t.heads, t.x_head_stride, t.y_head_stride, 0};
  const bool heads_inside = t.x_seq_stride >= t.x_head_stride;
  turn_rows<T, kInterleaved, kStream>(x, y, staged.cos, staged.sin, p.half, block.columns, rest, far,
                                      heads_inside ? places : heads, heads_inside ? heads : places);
}

template <class T, bool kStream>
void turn_blocks(const RopeParams& p, bool far, int64_t begin, int64_t end) {
  const int64_t rows = rope_block_rows(p), blocks = rope_blocks_of_sequence(p);
  Staged<AccOf<T>> staged;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index % blocks * rows;
    Block block{index / blocks, first, p.seq - first < rows ? p.seq - first : rows, 0, 0};
    for (; block.column < p.half; block.column += block.columns) {
      const int64_t left = p.half - block.column;
      block.columns = left < kRopeStaged ? left : kRopeStaged;
      p.table_dtype == p.dtype ? stage<T, T>(p, block, staged) : stage<T, AccOf<T>>(p, block, staged);
      for (const RopeTensor& t : p.tensors) {
        p.interleaved ? turn_block<T, true, kStream>(p, far, block, t, staged)
                      : turn_block<T, false, kStream>(p, far, block, t, staged);
      }
    }
  }
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (kStream) _mm_sfence();  // the other stores of this thread say nothing about these
#endif
}

}  // namespace

void rope(const RopeParams& p, RopeMemory memory, int64_t begin, int64_t end) {
  const bool far = memory != RopeMemory::kNear, stream = memory == RopeMemory::kFarStream;
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    stream ? turn_blocks<T, true>(p, far, begin, end) : turn_blocks<T, false>(p, far, begin, end);
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
