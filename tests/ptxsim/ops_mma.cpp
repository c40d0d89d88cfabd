// mma.sync. With g = lane / 4, t = lane % 4 and E elements in a 32-bit register, register r of A holds row g + 8 (r & 1),
// columns E t + j + 4 E (r / 2); register r of B holds k = E t + j + 4 E r of column g; accumulators c0, c1 are columns
// 2t, 2t + 1 of row g, c2, c3 of row g + 8. So 8 rows by 4 E columns of A are the 32 lanes of one register, in order.
#include <cstring>

#include "lanes.h"
#include "opcodes.h"

namespace ptxsim::PTXSIM_ISA {
namespace {

typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));

// How elements are read: `Store` is what lies in the register, `V` what is computed with.
struct ElementF16 {
  using Store = uint16_t;
  using V = float;
  static V get(Store s) { return half_to_float(s); }
};
struct ElementBF16 {
  using Store = uint16_t;
  using V = float;
  static V get(Store s) { return bf16_to_float(s); }
};
struct ElementTF32 {  // the low 13 bits do not take part
  using Store = uint32_t;
  using V = float;
  static V get(Store s) { return as_float(s & 0xffffe000u); }
};
struct ElementF64 {
  using Store = double;
  using V = double;
  static V get(Store s) { return s; }
};
// Sums of products of 8-bit integers are exact in float for the k of one instruction.
struct ElementS8 {
  using Store = int8_t;
  using V = float;
  static V get(Store s) { return static_cast<float>(s); }
};
struct ElementU8 {
  using Store = uint8_t;
  using V = float;
  static V get(Store s) { return static_cast<float>(s); }
};
struct ElementE4M3 {
  using Store = uint8_t;
  using V = float;
  static V get(Store s) { return e4m3_to_float(s); }
};
struct ElementE5M2 {
  using Store = uint8_t;
  using V = float;
  static V get(Store s) { return e5m2_to_float(s); }
};

template <class Store>
constexpr int kPerLane = sizeof(Store) >= 4 ? 1 : 4 / static_cast<int>(sizeof(Store));

template <class Store>
const Store* elements(const Warp& w, Offset row) {
  return reinterpret_cast<const Store*>(w.row<unsigned char>(row));
}

template <int M, int K, class E>
void read_a(const Warp& w, const Offset* o, typename E::V (&a)[M][K]) {
  constexpr int kCols = 4 * kPerLane<typename E::Store>, kRegs = M * K / 8 / kCols;
  for (int r = 0; r < kRegs; ++r) {
    const auto* s = elements<typename E::Store>(w, o[r]);
    const int row = M == 16 ? 8 * (r & 1) : 0, col = kCols * (M == 16 ? r >> 1 : r);
    for (int g = 0; g < 8; ++g)
      for (int c = 0; c < kCols; ++c) a[row + g][col + c] = E::get(s[g * kCols + c]);
  }
}

template <int K, class E>
void read_b(const Warp& w, const Offset* o, typename E::V (&b)[K][8]) {
  constexpr int kCols = 4 * kPerLane<typename E::Store>, kRegs = K / kCols;
  for (int r = 0; r < kRegs; ++r) {
    const auto* s = elements<typename E::Store>(w, o[r]);
    for (int g = 0; g < 8; ++g)
      for (int c = 0; c < kCols; ++c) b[kCols * r + c][g] = E::get(s[g * kCols + c]);
  }
}

template <int M, int K>
void multiply(const float (&a)[M][K], const float (&b)[K][8], float (&d)[M][8]) {
  for (int i = 0; i < M; i += 4) {
    Float8 s0, s1, s2, s3;
    std::memcpy(&s0, d[i], 32), std::memcpy(&s1, d[i + 1], 32), std::memcpy(&s2, d[i + 2], 32), std::memcpy(&s3, d[i + 3], 32);
    for (int k = 0; k < K; ++k) {
      Float8 v;
      std::memcpy(&v, b[k], 32);
      s0 += a[i][k] * v, s1 += a[i + 1][k] * v, s2 += a[i + 2][k] * v, s3 += a[i + 3][k] * v;
    }
    std::memcpy(d[i], &s0, 32), std::memcpy(d[i + 1], &s1, 32), std::memcpy(d[i + 2], &s2, 32), std::memcpy(d[i + 3], &s3, 32);
  }
}

template <int M, int K>
void multiply(const double (&a)[M][K], const double (&b)[K][8], double (&d)[M][8]) {
  for (int i = 0; i < M; ++i)
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) d[i][n] = __builtin_fma(a[i][k], b[k][n], d[i][n]);
}

// o: D, A, B, C.
template <int M, int K, class A, class B>
void mma_f32(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  const Offset* o = in.operands();
  constexpr int kA = M * K * static_cast<int>(sizeof(typename A::Store)) / 128, kB = K * 8 * static_cast<int>(sizeof(typename B::Store)) / 128;
  alignas(64) float a[M][K];
  alignas(64) float b[K][8];
  alignas(64) float d[M][8];
  read_a<M, K, A>(w, o + M / 4, a);
  read_b<K, B>(w, o + M / 4 + kA, b);
  const Offset* c = o + M / 4 + kA + kB;
  for (int e = 0; e < M / 4; ++e) {
    const uint32_t* s = w.row<uint32_t>(c[e]);
    for (int l = 0; l < kLanes; ++l) d[(l >> 2) + 8 * (e >> 1)][2 * (l & 3) + (e & 1)] = as_float(s[l]);
  }
  multiply<M, K>(a, b, d);
  for (int e = 0; e < M / 4; ++e) {
    uint32_t* s = w.row<uint32_t>(o[e]);
    for (int l = 0; l < kLanes; ++l) s[l] = as_bits(d[(l >> 2) + 8 * (e >> 1)][2 * (l & 3) + (e & 1)]);
  }
  w.machine->counters.mma_flops += 2 * M * 8 * K;
}

// Accumulators are pairs of halves: 2 registers of C and D. f16 with f16; fp8 with f16.
template <int M, int K, class A, class B>
void mma_f16(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  const Offset* o = in.operands();
  constexpr int kA = M * K * static_cast<int>(sizeof(typename A::Store)) / 128, kB = K * 8 * static_cast<int>(sizeof(typename B::Store)) / 128;
  alignas(64) float a[M][K];
  alignas(64) float b[K][8];
  alignas(64) float d[M][8];
  read_a<M, K, A>(w, o + 2, a);
  read_b<K, B>(w, o + 2 + kA, b);
  const Offset* c = o + 2 + kA + kB;
  for (int r = 0; r < 2; ++r) {
    const uint16_t* s = elements<uint16_t>(w, c[r]);
    for (int i = 0; i < 64; ++i) d[8 * r + i / 8][i % 8] = half_to_float(s[i]);
  }
  multiply<M, K>(a, b, d);
  for (int r = 0; r < 2; ++r) {
    uint32_t* s = w.row<uint32_t>(o[r]);
    for (int l = 0; l < kLanes; ++l) {
      const float* p = &d[8 * r + (l >> 2)][2 * (l & 3)];
      s[l] = float_to_half(p[0]) | float_to_half(p[1]) << 16;
    }
  }
  w.machine->counters.mma_flops += 2 * M * 8 * K;
}

template <int M, int K, class A, class B>
void mma_s32(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  const Offset* o = in.operands();
  constexpr int kA = M * K / 128, kB = K * 8 / 128;
  alignas(64) float a[M][K];
  alignas(64) float b[K][8];
  alignas(64) float d[M][8] = {};
  read_a<M, K, A>(w, o + M / 4, a);
  read_b<K, B>(w, o + M / 4 + kA, b);
  multiply<M, K>(a, b, d);
  const Offset* c = o + M / 4 + kA + kB;
  for (int e = 0; e < M / 4; ++e) {
    const uint32_t* s = w.row<uint32_t>(c[e]);
    uint32_t* t = w.row<uint32_t>(o[e]);
    for (int l = 0; l < kLanes; ++l) {
      const auto product = static_cast<int32_t>(d[(l >> 2) + 8 * (e >> 1)][2 * (l & 3) + (e & 1)]);
      const int64_t sum = int64_t{static_cast<int32_t>(s[l])} + product;
      const int64_t kept = sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum;
      t[l] = in.flags & 1 ? static_cast<uint32_t>(kept) : static_cast<uint32_t>(sum);
    }
  }
  w.machine->counters.mma_flops += 2 * M * 8 * K;
}

template <int M, int K>
void mma_f64(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  const Offset* o = in.operands();
  constexpr int kA = M * K / 32, kB = K * 8 / 32;
  double a[M][K], b[K][8], d[M][8];
  read_a<M, K, ElementF64>(w, o + M / 4, a);
  read_b<K, ElementF64>(w, o + M / 4 + kA, b);
  const Offset* c = o + M / 4 + kA + kB;
  for (int e = 0; e < M / 4; ++e)
    for (int l = 0; l < kLanes; ++l)
      d[(l >> 2) + 8 * (e >> 1)][2 * (l & 3) + (e & 1)] = std::bit_cast<double>(w.row<uint64_t>(c[e])[l]);
  multiply<M, K>(a, b, d);
  for (int e = 0; e < M / 4; ++e)
    for (int l = 0; l < kLanes; ++l)
      w.row<uint64_t>(o[e])[l] = std::bit_cast<uint64_t>(d[(l >> 2) + 8 * (e >> 1)][2 * (l & 3) + (e & 1)]);
  w.machine->counters.mma_flops += 2 * M * 8 * K;
}

// ---- wgmma ----

template <class A, class B>
void product(const unsigned char* a, const unsigned char* b, int n, float* d) {
  constexpr int kK = 32 / static_cast<int>(sizeof(typename A::Store));
  alignas(64) float left[16][kK];
  alignas(64) float right[kK][256];
  for (int i = 0; i < 16; ++i) {
    typename A::Store row[kK];
    std::memcpy(row, a + 32 * i, 32);
    for (int k = 0; k < kK; ++k) left[i][k] = A::get(row[k]);
  }
  for (int j = 0; j < n; ++j) {
    typename B::Store row[kK];
    std::memcpy(row, b + 32 * j, 32);
    for (int k = 0; k < kK; ++k) right[k][j] = B::get(row[k]);
  }
  for (int i = 0; i < 16; ++i) {
    float* out = d + i * n;
    for (int j = 0; j < n; j += 8) {
      Float8 s;
      std::memcpy(&s, out + j, 32);
      for (int k = 0; k < kK; ++k) {
        Float8 v;
        std::memcpy(&v, &right[k][j], 32);
        s += left[i][k] * v;
      }
      std::memcpy(out + j, &s, 32);
    }
  }
}

template <int K>
Handler of_fp8(Type a, Type b, bool f16) {
  const bool a5 = a == Type::kE5M2, b5 = b == Type::kE5M2;
  if (f16) return a5 ? (b5 ? &mma_f16<16, K, ElementE5M2, ElementE5M2> : &mma_f16<16, K, ElementE5M2, ElementE4M3>)
                     : (b5 ? &mma_f16<16, K, ElementE4M3, ElementE5M2> : &mma_f16<16, K, ElementE4M3, ElementE4M3>);
  return a5 ? (b5 ? &mma_f32<16, K, ElementE5M2, ElementE5M2> : &mma_f32<16, K, ElementE5M2, ElementE4M3>)
            : (b5 ? &mma_f32<16, K, ElementE4M3, ElementE5M2> : &mma_f32<16, K, ElementE4M3, ElementE4M3>);
}

template <int M, int K>
Handler of_int8(Type a, Type b) {
  const bool as = a == Type::kS8, bs = b == Type::kS8;
  return as ? (bs ? &mma_s32<M, K, ElementS8, ElementS8> : &mma_s32<M, K, ElementS8, ElementU8>)
            : (bs ? &mma_s32<M, K, ElementU8, ElementS8> : &mma_s32<M, K, ElementU8, ElementU8>);
}

Handler choose(int m, int k, Type d, Type a, Type b) {
  const bool f32 = d == Type::kF32, f16 = d == Type::kF16;
  if (m == 16 && a == Type::kBF16 && b == a && f32)
    return k == 16 ? &mma_f32<16, 16, ElementBF16, ElementBF16> : k == 8 ? &mma_f32<16, 8, ElementBF16, ElementBF16> : nullptr;
  if (m == 16 && a == Type::kF16 && b == a && f32)
    return k == 16 ? &mma_f32<16, 16, ElementF16, ElementF16> : k == 8 ? &mma_f32<16, 8, ElementF16, ElementF16> : nullptr;
  if (m == 16 && a == Type::kF16 && b == a && f16)
    return k == 16 ? &mma_f16<16, 16, ElementF16, ElementF16> : k == 8 ? &mma_f16<16, 8, ElementF16, ElementF16> : nullptr;
  if (m == 16 && a == Type::kTF32 && b == a && f32)
    return k == 8 ? &mma_f32<16, 8, ElementTF32, ElementTF32> : k == 4 ? &mma_f32<16, 4, ElementTF32, ElementTF32> : nullptr;
  if ((a == Type::kS8 || a == Type::kU8) && (b == Type::kS8 || b == Type::kU8) && d == Type::kS32) {
    if (m == 16) return k == 32 ? of_int8<16, 32>(a, b) : k == 16 ? of_int8<16, 16>(a, b) : nullptr;
    return m == 8 && k == 16 ? of_int8<8, 16>(a, b) : nullptr;
  }
  if (m == 16 && (a == Type::kE4M3 || a == Type::kE5M2) && (b == Type::kE4M3 || b == Type::kE5M2) && (f32 || f16))
    return k == 32 ? of_fp8<32>(a, b, f16) : k == 16 ? of_fp8<16>(a, b, f16) : nullptr;
  if (a == Type::kF64 && b == a && d == a) {
    if (m == 8) return k == 4 ? &mma_f64<8, 4> : nullptr;
    return k == 4 ? &mma_f64<16, 4> : k == 8 ? &mma_f64<16, 8> : k == 16 ? &mma_f64<16, 16> : nullptr;
  }
  return nullptr;
}

void mma(Build& b) {
  if (!b.take("sync") || !b.take("aligned")) b.fail("it is not .sync.aligned");
  int m = 0, k = 0;
  for (size_t i = 0; i < b.mods.size(); ++i) {
    const std::string mod(b.mods[i]);
    int n = 0;
    if (std::sscanf(mod.c_str(), "m%dn%dk%d", &m, &n, &k) != 3) continue;
    if (n != 8) b.fail("only n = 8 is implemented");
    b.mods.erase(b.mods.begin() + static_cast<long>(i));
    break;
  }
  if (!b.take("row") || !b.take("col")) b.fail("only row by column exists for this shape");
  if (b.take("satfinite")) b.in.flags |= 1;
  const Type d = b.need_type(), a = b.need_type(), bt = b.need_type(), c = b.need_type();
  if (d != c) b.fail("C and D of different types are not implemented");
  b.operands(4, 4);
  const Type row = a == Type::kF64 ? Type::kF64 : Type::kB32;
  const auto list = [&](const Operand& operand, bool to) {
    const std::vector<Operand> one{operand};
    for (const Operand& part : operand.kind == Operand::Kind::kVector ? operand.parts : one) {
      if (to) b.dst(part, row);
      else b.src(part, row);
    }
  };
  list(b.ops[0], true), list(b.ops[1], false), list(b.ops[2], false), list(b.ops[3], false);
  b.in.fn = choose(m, k, d, a, bt);
  b.in.aligned = true;
  const int bits = a == Type::kTF32 ? 32 : bits_of(a), lane_bits = a == Type::kF64 ? 64 : 32;
  const int expected = m * k * bits / 32 / lane_bits + k * 8 * bits / 32 / lane_bits + 2 * (d == Type::kF16 ? 2 : m / 4);
  if (b.in.fn != nullptr && static_cast<int>(b.compiler_operands()) != expected) b.fail("it has a wrong number of registers");
}

template <class A>
auto product_by_b(Type b) {
  using F = void (*)(const unsigned char*, const unsigned char*, int, float*);
  switch (b) {
    case Type::kS8: return F{product<A, ElementS8>};
    case Type::kU8: return F{product<A, ElementU8>};
    case Type::kE4M3: return F{product<A, ElementE4M3>};
    default: return F{product<A, ElementE5M2>};
  }
}

}  // namespace

// d[16][n] += a times b; a: 16 rows, b: n rows, of 32 bytes each along k.
WgmmaProduct wgmma_product(Type a, Type b) {
  switch (a) {
    case Type::kBF16: return product<ElementBF16, ElementBF16>;
    case Type::kF16: return product<ElementF16, ElementF16>;
    case Type::kTF32: return product<ElementTF32, ElementTF32>;
    case Type::kS8: return product_by_b<ElementS8>(b);
    case Type::kU8: return product_by_b<ElementU8>(b);
    case Type::kE4M3: return product_by_b<ElementE4M3>(b);
    case Type::kE5M2: return product_by_b<ElementE5M2>(b);
    default: return nullptr;
  }
}

void add_mma(OpcodeTable& table) { table["mma"] = mma; }

}  // namespace ptxsim::PTXSIM_ISA
