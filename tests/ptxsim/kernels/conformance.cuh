// Shape of the conformance kernels: name(in, out); every thread reads words x, y, z of its own, in[0], in[T], in[2T] from
// its place on, T being the number of threads, and puts one word after the other into out, T apart. They run on the
// interpreter and, where there is one, on a GPU: whatever differs is a misreading of the PTX manual.
#pragma once

#include <cstdint>

#define CONFORMANCE(name) extern "C" __global__ void name(const unsigned* in, unsigned* out)

struct Words {
  const unsigned* in;
  unsigned* out;
  unsigned threads;
  __device__ Words(const unsigned* in, unsigned* out)
      : in(in + blockIdx.x * blockDim.x + threadIdx.x),
        out(out + blockIdx.x * blockDim.x + threadIdx.x),
        threads(gridDim.x * blockDim.x) {}
  __device__ unsigned operator[](int i) const { return in[i * threads]; }
  __device__ uint64_t wide(int i) const { return (*this)[i] | uint64_t{(*this)[i + 1]} << 32; }
  __device__ void put(unsigned value) {
    *out = value;
    out += threads;
  }
  __device__ void put_wide(uint64_t value) {
    put(static_cast<unsigned>(value));
    put(static_cast<unsigned>(value >> 32));
  }
};

// One instruction on registers of 32 bits, whatever they hold, and its result: words.put(op(..)).
#define PUT1(op, a)                                             \
  do {                                                          \
    unsigned d;                                                 \
    asm volatile(op " %0, %1;" : "=r"(d) : "r"(a));             \
    words.put(d);                                               \
  } while (false)
#define PUT2(op, a, b)                                          \
  do {                                                          \
    unsigned d;                                                 \
    asm volatile(op " %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); \
    words.put(d);                                               \
  } while (false)
#define PUT3(op, a, b, c)                                                        \
  do {                                                                           \
    unsigned d;                                                                  \
    asm volatile(op " %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));      \
    words.put(d);                                                                \
  } while (false)
// The same with a result (and operands "l") of 64 bits.
#define PUT_WIDE1(op, kind, a)                                   \
  do {                                                           \
    uint64_t d;                                                  \
    asm volatile(op " %0, %1;" : "=l"(d) : kind(a));             \
    words.put_wide(d);                                           \
  } while (false)
#define PUT_WIDE2(op, kind, a, b)                                        \
  do {                                                                   \
    uint64_t d;                                                          \
    asm volatile(op " %0, %1, %2;" : "=l"(d) : kind(a), kind(b));        \
    words.put_wide(d);                                                   \
  } while (false)
#define PUT_WIDE3(op, kind, a, b, c)                                                 \
  do {                                                                               \
    uint64_t d;                                                                      \
    asm volatile(op " %0, %1, %2, %3;" : "=l"(d) : kind(a), kind(b), "l"(c));        \
    words.put_wide(d);                                                               \
  } while (false)
// A result of 32 bits from one of 64, or one of 16 from words.
#define PUT_FROM_WIDE(op, a)                                    \
  do {                                                          \
    unsigned d;                                                 \
    asm volatile(op " %0, %1;" : "=r"(d) : "l"(a));             \
    words.put(d);                                               \
  } while (false)
#define PUT_HALF1(op, a)                                        \
  do {                                                          \
    uint16_t d;                                                 \
    asm volatile(op " %0, %1;" : "=h"(d) : "r"(a));             \
    words.put(d);                                               \
  } while (false)
#define PUT_FROM_HALF(op, a)                                                \
  do {                                                                      \
    unsigned d;                                                             \
    asm volatile(op " %0, %1;" : "=r"(d) : "h"(static_cast<uint16_t>(a)));  \
    words.put(d);                                                           \
  } while (false)
// Whether a comparison holds.
#define PUT_IF(op, a, b)                                                                                   \
  do {                                                                                                     \
    unsigned d;                                                                                            \
    asm volatile("{\n.reg .pred p;\n" op " p, %1, %2;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(d) : "r"(a), "r"(b)); \
    words.put(d);                                                                                          \
  } while (false)
// Four roundings of one operation; `text` makes the instruction from the rounding.
#define ROUNDINGS(put) put("rn") put("rz") put("rm") put("rp")
