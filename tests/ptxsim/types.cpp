#include "types.h"

namespace ptxsim {
namespace {

struct Entry {
  std::string_view name;
  Type type;
  int bits;
};

constexpr Entry kTypes[] = {
    {"pred", Type::kPred, 1},       {"b8", Type::kB8, 8},           {"u8", Type::kU8, 8},
    {"s8", Type::kS8, 8},           {"b16", Type::kB16, 16},        {"u16", Type::kU16, 16},
    {"s16", Type::kS16, 16},        {"b32", Type::kB32, 32},        {"u32", Type::kU32, 32},
    {"s32", Type::kS32, 32},        {"b64", Type::kB64, 64},        {"u64", Type::kU64, 64},
    {"s64", Type::kS64, 64},        {"b128", Type::kB128, 128},     {"f16", Type::kF16, 16},
    {"bf16", Type::kBF16, 16},      {"f16x2", Type::kF16x2, 32},    {"bf16x2", Type::kBF16x2, 32},
    {"u16x2", Type::kU16x2, 32},    {"s16x2", Type::kS16x2, 32},    {"f32", Type::kF32, 32},
    {"f64", Type::kF64, 64},        {"tf32", Type::kTF32, 32},      {"e4m3", Type::kE4M3, 8},
    {"e5m2", Type::kE5M2, 8},       {"e4m3x2", Type::kE4M3x2, 16},  {"e5m2x2", Type::kE5M2x2, 16},
    {"e2m3x2", Type::kE2M3x2, 16},  {"e3m2x2", Type::kE3M2x2, 16},  {"e2m1x2", Type::kE2M1x2, 8},
    {"ue8m0x2", Type::kUE8M0x2, 16}, {"s4", Type::kS4, 4},          {"u4", Type::kU4, 4},
    {"b1", Type::kB1, 1},           {"f32x2", Type::kF32x2, 64},
};

}  // namespace

Type type_of(std::string_view name) {
  for (const Entry& entry : kTypes)
    if (entry.name == name) return entry.type;
  return Type::kNone;
}

int bits_of(Type type) {
  for (const Entry& entry : kTypes)
    if (entry.type == type) return entry.bits;
  return 0;
}

const char* name_of(Type type) {
  for (const Entry& entry : kTypes)
    if (entry.type == type) return entry.name.data();
  return "none";
}

bool is_float(Type type) { return type >= Type::kF16 && type != Type::kU16x2 && type != Type::kS16x2 && type < Type::kS4; }

bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

}  // namespace ptxsim
