// The tiles of csrc/common/cpu/amx.h and the products of product.h on them, for test_amx.py, which compiles this with
// the emulated instructions and, where the processor has them, with the real ones.
//
//   amx_tiles products    compares with plain sums, exactly: prints what is wrong, and how many products there were
//   amx_tiles random      prints a number made of the bits of many results of random values
//   amx_tiles illegal N   does something that the emulation refuses; without N prints how many there are
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/cpu/product.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

int failures = 0, products = 0;
uint64_t state = 1;

uint32_t random_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 33);
}

float random_integer() { return static_cast<float>(static_cast<int>(random_bits() % 17) - 8); }

uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Memory of exactly this size, so that AddressSanitizer sees what is beyond.
template <class T>
T* exactly(int64_t count) {
  return static_cast<T*>(malloc(count > 0 ? count * sizeof(T) : 1));
}

void expect(bool right, const char* what, int m, int n, int k) {
  ++products;
  if (right) return;
  if (++failures < 10) printf("wrong: %s with m %d, n %d, k %d\n", what, m, n, k);
}

AmxShapes shapes_of(int m, int n, int k) {
  AmxShapes shapes;
  shapes.set(0, m, n * 4), shapes.set(4, m, k * 4), shapes.set(6, k, n * 4);
  return shapes;
}

// c [m, n] += a [m, k] b [k, n] in words of two bf16 or four bytes, cut into tiles whose shapes are what is left.
template <bool kBf16 = true>
void tiled(const uint32_t* a, const uint32_t* b, void* sums, int m, int n, int k) {
  uint32_t* const c = static_cast<uint32_t*>(sums);
  for (int i = 0; i < m; i += 16) {
    for (int j = 0; j < n; j += 16) {
      for (int w = 0; w < k; w += 16) {
        const int rows = m - i < 16 ? m - i : 16, cols = n - j < 16 ? n - j : 16, words = k - w < 16 ? k - w : 16;
        amx_configure(shapes_of(rows, cols, words));
        amx_load<0>(c + i * n + j, n * 4);
        amx_load<4>(a + i * k + w, k * 4);
        amx_load<6>(b + w * n + j, n * 4);
        if constexpr (kBf16) {
          amx_dot_bf16<0, 4, 6>();
        } else {
          amx_dot_bytes<0, 4, 6>();
        }
        amx_store<0>(c + i * n + j, n * 4);
        amx_release();
      }
    }
  }
}

// Small integers, whose sums are exact in any order.
void check_tiles(int m, int n, int k) {
  uint32_t *a = exactly<uint32_t>(m * k), *b = exactly<uint32_t>(k * n);
  float* c = exactly<float>(m * n);
  uint16_t *a16 = reinterpret_cast<uint16_t*>(a), *b16 = reinterpret_cast<uint16_t*>(b);
  for (int i = 0; i < 2 * m * k; ++i) a16[i] = to_bf16(random_integer());
  for (int i = 0; i < 2 * k * n; ++i) b16[i] = to_bf16(random_integer());
  for (int i = 0; i < m * n; ++i) c[i] = static_cast<float>(i % 7);
  tiled(a, b, c, m, n, k);
  bool right = true;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      float sum = static_cast<float>((i * n + j) % 7);
      for (int x = 0; x < 2 * k; ++x) {
        sum += from_bf16(a16[i * 2 * k + x]) * from_bf16(b16[(x / 2 * n + j) * 2 + x % 2]);
      }
      right &= sum == c[i * n + j];
    }
  }
  expect(right, "tiles", m, n, k);
  free(a), free(b), free(c);
}

// Bytes of any value: a with a sign, b without.
void check_byte_tiles(int m, int n, int k) {
  uint32_t *a = exactly<uint32_t>(m * k), *b = exactly<uint32_t>(k * n), *c = exactly<uint32_t>(m * n);
  const int8_t* a8 = reinterpret_cast<int8_t*>(a);
  const uint8_t* b8 = reinterpret_cast<uint8_t*>(b);
  for (int i = 0; i < m * k; ++i) a[i] = i % 5 ? random_bits() * 2 : 0x80808080u;
  for (int i = 0; i < k * n; ++i) b[i] = i % 3 ? random_bits() * 2 : 0xffffffffu;
  for (int i = 0; i < m * n; ++i) c[i] = 0x7ffffff0u + static_cast<uint32_t>(i);  // sums beyond 32 bits wrap
  tiled<false>(a, b, c, m, n, k);
  bool right = true;
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      uint32_t sum = 0x7ffffff0u + static_cast<uint32_t>(i * n + j);
      for (int x = 0; x < 4 * k; ++x) {
        sum += static_cast<uint32_t>(a8[i * 4 * k + x] * b8[(x / 4 * n + j) * 4 + x % 4]);
      }
      right &= sum == c[i * n + j];
    }
  }
  expect(right, "tiles of bytes", m, n, k);
  free(a), free(b), free(c);
}

// product_rows as quantized_linear calls it for bytes.
void check_byte_product(int rows, int cols, int words, bool add) {
  const ProductScope<int8_t> scope;
  const int padded = static_cast<int>(round_up(rows, 16)), a_row = words + 16, b_row = cols + 16, c_row = cols + 1;
  uint32_t *a = exactly<uint32_t>((padded - 1) * a_row + words), *b = exactly<uint32_t>((words - 1) * b_row + cols);
  int32_t *c = exactly<int32_t>((padded - 1) * c_row + cols), *before = exactly<int32_t>(rows * cols);
  float ones[32];
  for (float& one : ones) one = 1.0f;
  for (int i = 0; i < (padded - 1) * a_row + words; ++i) a[i] = random_bits() * 2;
  for (int i = 0; i < (words - 1) * b_row + cols; ++i) b[i] = random_bits() * 2;
  for (int i = 0; i < rows * cols; ++i) c[i / cols * c_row + i % cols] = before[i] = static_cast<int>(random_bits());
  product_rows<int8_t>({a, a_row, 1, b, b_row, words, reinterpret_cast<float*>(c), c_row, add ? ones : nullptr}, rows,
                       cols);
  bool right = true;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      uint32_t sum = add ? static_cast<uint32_t>(before[i * cols + j]) : 0;
      for (int x = 0; x < 4 * words; ++x) {
        const int value = reinterpret_cast<int8_t*>(a + i * a_row)[x];
        sum += static_cast<uint32_t>(value * reinterpret_cast<uint8_t*>(b + x / 4 * b_row + j)[x % 4]);
      }
      right &= sum == static_cast<uint32_t>(c[i * c_row + j]);
    }
  }
  expect(right, "product of bytes", rows, cols, words);
  free(a), free(b), free(c), free(before);
}

// product_rows as attention calls it: rows to a multiple of 16 have memory, and garbage in it.
void check_product(int rows, int cols, int words, bool transposed, int factors_kind) {
  using C = BFloat16;
  const ProductScope<C> scope;
  const int padded = static_cast<int>(round_up(rows, 16)), b_row = cols + 16;
  const int64_t a_row = transposed ? 1 : words + 3, a_k = transposed ? padded + 5 : 1;
  const int64_t a_size = (padded - 1) * a_row + (words - 1) * a_k + 1, c_row = cols + 1;
  uint32_t *a = exactly<uint32_t>(a_size), *b = exactly<uint32_t>((words - 1) * b_row + cols);
  float *c = exactly<float>((padded - 1) * c_row + cols), *before = exactly<float>(rows * cols);
  float factors[32];
  memset(a, 0xff, a_size * 4);  // NaN where no row is
  const auto a_at = [&](int i, int x) {
    return reinterpret_cast<uint16_t*>(a + i * a_row + x / 2 * a_k) + x % 2;
  };
  const auto b_at = [&](int x, int j) { return reinterpret_cast<uint16_t*>(b + x / 2 * b_row + j) + x % 2; };
  for (int i = 0; i < rows; ++i) {
    for (int x = 0; x < 2 * words; ++x) *a_at(i, x) = to_bf16(random_integer());
  }
  for (int x = 0; x < 2 * words; ++x) {
    for (int j = 0; j < cols; ++j) *b_at(x, j) = to_bf16(random_integer());
  }
  for (int i = 0; i < rows; ++i) {
    factors[i] = factors_kind == 1 ? 1.0f : 0.5f * static_cast<float>(i % 4);
    for (int j = 0; j < cols; ++j) c[i * c_row + j] = before[i * cols + j] = random_integer();
  }
  product_rows<C>({a, a_row, a_k, b, b_row, words, c, c_row, factors_kind == 0 ? nullptr : factors}, rows, cols);
  bool right = true;
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < cols; ++j) {
      float sum = factors_kind == 0 ? 0.0f : before[i * cols + j] * factors[i];
      for (int x = 0; x < 2 * words; ++x) sum += from_bf16(*a_at(i, x)) * from_bf16(*b_at(x, j));
      right &= sum == c[i * c_row + j];
    }
  }
  expect(right, transposed ? "product of a transposed a" : "product", rows, cols, words);
  free(a), free(b), free(c), free(before);
}

// One product of 1 x 1 x 1: c + a0 b0 + a1 b1.
float one(float c, float a0, float b0, float a1, float b1) {
  const uint32_t a = to_bf16(a0) | static_cast<uint32_t>(to_bf16(a1)) << 16;
  const uint32_t b = to_bf16(b0) | static_cast<uint32_t>(to_bf16(b1)) << 16;
  tiled(&a, &b, &c, 1, 1, 1);
  return c;
}

void check_special() {
  const float tiny = from_bf16(0x0040), least = from_bf16(0x0080), huge = from_bf16(0x7f7f);
  expect(one(0.0f, tiny, huge, 0.0f, 0.0f) == 0.0f, "a denormal", 1, 1, 1);
  expect(one(0.0f, least, 0.5f, 0.0f, 0.0f) == 0.0f, "a product that is denormal", 1, 1, 1);
  expect(one(tiny, 0.0f, 0.0f, 0.0f, 0.0f) == 0.0f, "a denormal sum", 1, 1, 1);
  expect(one(1.0f, least, 1.0f, 2.0f, 3.0f) == 7.0f, "the smallest number", 1, 1, 1);
  expect(isnan(one(0.0f, NAN, 1.0f, 1.0f, 1.0f)), "a NaN", 1, 1, 1);
  expect(isnan(one(0.0f, INFINITY, 0.0f, 1.0f, 1.0f)), "infinity times zero", 1, 1, 1);
  expect(one(1.0f, huge, huge, 1.0f, 1.0f) == INFINITY, "an overflow", 1, 1, 1);
  // Even and odd products have sums of their own: 2^24 + 1 would lose the 1 in one sum.
  expect(one(-16777216.0f, 4096.0f, 4096.0f, 1.0f, 1.0f) == 0.0f, "the order of sums", 1, 1, 1);
}

void check_shapes_are_kept() {
  float from[16][16], to[16][16];
  for (int i = 0; i < 256; ++i) from[i / 16][i % 16] = static_cast<float>(i + 1), to[i / 16][i % 16] = -1.0f;
  for (int rows = 1; rows <= 16; ++rows) {
    for (int cols = 1; cols <= 16; ++cols) {
      amx_configure(shapes_of(rows, cols, 1));
      amx_load<0>(from, sizeof(from[0]));
      amx_store<0>(to, sizeof(to[0]));
      bool right = true;
      for (int i = 0; i < 256; ++i) {
        const bool inside = i / 16 < rows && i % 16 < cols;
        right &= to[i / 16][i % 16] == (inside ? static_cast<float>(i + 1) : -1.0f);
        to[i / 16][i % 16] = -1.0f;
      }
      expect(right, "what is stored", rows, cols, 1);
      amx_zero<0>();
      amx_store<0>(to, sizeof(to[0]));
      expect(to[rows - 1][cols - 1] == 0.0f, "a tile of zeros", rows, cols, 1);
      to[rows - 1][cols - 1] = -1.0f;
      for (int i = 0; i < 256; ++i) to[i / 16][i % 16] = -1.0f;
      amx_release();
    }
  }
}

void check_products() {
  for (int m = 1; m <= 40; ++m) {
    for (int n = 1; n <= 40; ++n) {
      for (int k = 1; k <= 40; ++k) check_tiles(m, n, k), check_byte_tiles(m, n, k);
    }
  }
  for (int rows = 1; rows <= 32; ++rows) {
    for (int cols = 16; cols <= 80; cols += 16) {
      for (int words = 16; words <= 48; words += 16) {
        for (int kind = 0; kind < 6; ++kind) check_product(rows, cols, words, kind % 2, kind / 2);
        check_byte_product(rows, cols, words, false), check_byte_product(rows, cols, words, true);
      }
    }
  }
  check_special();
  check_shapes_are_kept();
}

// Any bf16 but infinities and NaN, whose bits a processor may choose: denormals, cancellation, every rounding.
uint64_t digest() {
  uint64_t hash = 14695981039346656037u;
  for (int round = 0; round < 200; ++round) {
    constexpr int m = 16, n = 16, k = 16;
    uint16_t a[2 * m * k], b[2 * k * n];
    float c[m * n];
    const auto value = [&] {
      const uint32_t bits = random_bits();
      const uint32_t exponent = round % 2 ? 120 + bits % 14 : bits % 128 + 32;
      return static_cast<uint16_t>((bits >> 8 & 0x807f) | (bits % 50 == 0 ? 0 : exponent) << 7);
    };
    for (uint16_t& x : a) x = value();
    for (uint16_t& x : b) x = value();
    for (float& x : c) x = from_bf16(value());
    tiled(reinterpret_cast<uint32_t*>(a), reinterpret_cast<uint32_t*>(b), c, m, n, k);
    for (const float& x : c) {
      uint32_t bits;
      memcpy(&bits, &x, sizeof(bits));
      hash = (hash ^ bits) * 1099511628211u;
    }
  }
  return hash;
}

#if defined(CPU_CAPABILITY_AMX_EMULATED)
float somewhere[256];

using Illegal = void (*)();
constexpr Illegal kIllegal[] = {
    [] { amx_zero<0>(); },
    [] { amx_load<3>(somewhere, 64); },
    [] { amx_store<3>(somewhere, 64); },
    [] { amx_dot_bf16<0, 4, 6>(); },
    [] { amx_dot_bytes<0, 4, 6>(); },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.set(6, 4, 20);
      amx_configure(shapes), amx_dot_bytes<0, 4, 6>();
    },
    [] { amx_configure(shapes_of(4, 4, 4)), amx_release(), amx_load<0>(somewhere, 64); },
    [] { amx_configure(shapes_of(4, 4, 4)), amx_load<1>(somewhere, 64); },
    [] { amx_configure(shapes_of(17, 4, 4)); },
    [] { amx_configure(shapes_of(4, 17, 4)); },
    [] { amx_configure(shapes_of(4, 4, 17)); },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.palette = 2;
      amx_configure(shapes);
    },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.reserved[13] = 1;
      amx_configure(shapes);
    },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.set(8, 1, 4);
      amx_configure(shapes);
    },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.set(5, 4, 0);
      amx_configure(shapes);
    },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.set(4, 5, 16);
      amx_configure(shapes), amx_dot_bf16<0, 4, 6>();
    },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.set(4, 4, 20);
      amx_configure(shapes), amx_dot_bf16<0, 4, 6>();
    },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.set(6, 4, 20);
      amx_configure(shapes), amx_dot_bf16<0, 4, 6>();
    },
    [] {
      AmxShapes shapes = shapes_of(4, 4, 4);
      shapes.set(0, 4, 14), shapes.set(6, 4, 14);
      amx_configure(shapes), amx_dot_bf16<0, 4, 6>();
    },
};
#endif

int run(int argc, char** argv) {
  const char* what = argc > 1 ? argv[1] : "";
  if (strcmp(what, "products") == 0) {
    check_products();
    printf("%d wrong of %d\n", failures, products);
    return failures > 0;
  }
  if (strcmp(what, "random") == 0) return printf("%016llx\n", static_cast<unsigned long long>(digest())) < 0;
#if defined(CPU_CAPABILITY_AMX_EMULATED)
  if (strcmp(what, "illegal") == 0) {
    constexpr int count = sizeof(kIllegal) / sizeof(kIllegal[0]);
    if (argc == 2) return printf("%d\n", count) < 0;
    kIllegal[atoi(argv[2])]();
    return 0;
  }
#endif
  return 2;
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY

int main(int argc, char** argv) {
#if !defined(CPU_CAPABILITY_AMX_EMULATED)
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 3;
#endif
  return llmkernels::cpu::CPU_CAPABILITY::run(argc, argv);
}
