// The scalar types of PTX, and how the interpreter computes with them.
//
// A register is a row of 32 lanes. Everything up to 32 bits lives in a row of uint32_t (the bits above a narrower type
// are ignored when it is read), 64 bits in a row of uint64_t, and a predicate is one 32-bit mask.
#pragma once

#include <cstdint>
#include <string_view>

namespace ptxsim {

enum class Type : uint8_t {
  kNone, kPred, kB8, kU8, kS8, kB16, kU16, kS16, kB32, kU32, kS32, kB64, kU64, kS64, kB128,
  kF16, kBF16, kF16x2, kBF16x2, kU16x2, kS16x2, kF32, kF64, kTF32, kE4M3, kE5M2, kE4M3x2, kE5M2x2,
  kE2M3x2, kE3M2x2, kE2M1x2, kUE8M0x2, kS4, kU4, kB1, kF32x2,
};

Type type_of(std::string_view name);  // kNone if it is not the name of a type
int bits_of(Type type);
bool is_float(Type type);   // of any width
bool is_signed(Type type);  // kS8 ... kS64
const char* name_of(Type type);

}  // namespace ptxsim
