// Scalar opcode families; conformance_warp.cu has what the lanes of a warp do together.
#include "conformance.cuh"

CONFORMANCE(integer_arithmetic) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1], z = words[2], divisor = y | 1;
  PUT2("add.s32", x, y);
  PUT2("sub.s32", x, y);
  PUT2("mul.lo.s32", x, y);
  PUT2("mul.hi.s32", x, y);
  PUT2("mul.hi.u32", x, y);
  PUT3("mad.lo.s32", x, y, z);
  PUT3("mad.hi.s32", x, y, z);
  PUT3("mad.hi.u32", x, y, z);
  PUT2("mul24.lo.s32", x, y);
  PUT2("div.u32", x, divisor);
  PUT2("rem.u32", x, divisor);
  PUT2("div.s32", x & 0x7fffffffu, divisor);
  PUT2("rem.s32", x & 0x7fffffffu, divisor);
  PUT2("min.s32", x, y);
  PUT2("min.u32", x, y);
  PUT2("max.s32", x, y);
  PUT2("max.u32", x, y);
  PUT1("abs.s32", x);
  PUT1("neg.s32", x);
  PUT3("sad.s32", x, y, z);
  PUT3("sad.u32", x, y, z);
  PUT2("add.sat.s32", x, y);
  PUT2("sub.sat.s32", x, y);
  PUT_WIDE2("mul.wide.s32", "r", x, y);
  PUT_WIDE2("mul.wide.u32", "r", x, y);
  PUT_WIDE3("mad.wide.s32", "r", x, y, uint64_t{z} << 20);
  PUT_WIDE3("mad.wide.u32", "r", x, y, uint64_t{z} << 20);
  PUT3("dp4a.s32.s32", x, y, z);
  PUT3("dp4a.u32.u32", x, y, z);
  PUT3("dp4a.u32.s32", x, y, z);
  PUT3("dp2a.lo.s32.s32", x, y, z);
  PUT3("dp2a.hi.u32.u32", x, y, z);
  unsigned low, high;
  asm volatile("{\nadd.cc.u32 %0, %2, %3;\naddc.u32 %1, %4, 0;\n}" : "=r"(low), "=r"(high) : "r"(x), "r"(y), "r"(z));
  words.put(low);
  words.put(high);
  asm volatile("{\nsub.cc.u32 %0, %2, %3;\nsubc.u32 %1, %4, 0;\n}" : "=r"(low), "=r"(high) : "r"(x), "r"(y), "r"(z));
  words.put(low);
  words.put(high);
}

CONFORMANCE(integer_wide) {
  Words words(in, out);
  const uint64_t x = words.wide(0), y = words.wide(1), divisor = y | 1;
  PUT_WIDE2("add.s64", "l", x, y);
  PUT_WIDE2("sub.s64", "l", x, y);
  PUT_WIDE2("mul.lo.s64", "l", x, y);
  PUT_WIDE2("mul.hi.s64", "l", x, y);
  PUT_WIDE2("mul.hi.u64", "l", x, y);
  PUT_WIDE3("mad.lo.s64", "l", x, y, x);
  PUT_WIDE2("div.u64", "l", x, divisor);
  PUT_WIDE2("rem.u64", "l", x, divisor);
  PUT_WIDE2("min.s64", "l", x, y);
  PUT_WIDE2("max.u64", "l", x, y);
  PUT_WIDE1("abs.s64", "l", x);
  PUT_WIDE1("neg.s64", "l", x);
  PUT_WIDE1("not.b64", "l", x);
  PUT_WIDE1("brev.b64", "l", x);
  PUT_FROM_WIDE("popc.b64", x);
  PUT_FROM_WIDE("clz.b64", x);
  PUT_WIDE1("cvt.s64.s32", "r", words[2]);
  PUT_WIDE1("cvt.u64.u32", "r", words[2]);
}

CONFORMANCE(integer_bits) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1], z = words[2], shift = z % 40;
  PUT2("and.b32", x, y);
  PUT2("or.b32", x, y);
  PUT2("xor.b32", x, y);
  PUT1("not.b32", x);
  PUT1("cnot.b32", x);
  PUT2("shl.b32", x, shift);  // 32 and more: nothing is left
  PUT2("shr.u32", x, shift);
  PUT2("shr.s32", x, shift);
  PUT1("popc.b32", x);
  PUT1("clz.b32", x);
  PUT1("brev.b32", x);
  PUT1("bfind.u32", x);
  PUT1("bfind.s32", x);
  PUT1("bfind.shiftamt.u32", x);
  PUT3("bfe.u32", x, y % 40, z % 40);
  PUT3("bfe.s32", x, y % 40, z % 40);
  unsigned d;
  asm volatile("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(x), "r"(y), "r"(z % 36), "r"(y % 34));
  words.put(d);
  PUT3("prmt.b32", x, y, z);
  PUT3("prmt.b32.f4e", x, y, z);
  PUT3("prmt.b32.b4e", x, y, z);
  PUT3("prmt.b32.rc8", x, y, z);
  PUT3("prmt.b32.ecl", x, y, z);
  PUT3("prmt.b32.ecr", x, y, z);
  PUT3("prmt.b32.rc16", x, y, z);
  PUT3("shf.l.wrap.b32", x, y, z);
  PUT3("shf.l.clamp.b32", x, y, shift);
  PUT3("shf.r.wrap.b32", x, y, z);
  PUT3("shf.r.clamp.b32", x, y, shift);
  asm volatile("lop3.b32 %0, %1, %2, %3, 0xe8;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
  words.put(d);
  asm volatile("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(d) : "r"(x), "r"(y), "r"(z));
  words.put(d);
  PUT2("bmsk.clamp.b32", y % 40, z % 40);
}

CONFORMANCE(float_rounding) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1], z = words[2];
#define ROUND(mode)                \
  PUT2("add." mode ".f32", x, y);  \
  PUT2("sub." mode ".f32", x, y);  \
  PUT2("mul." mode ".f32", x, y);  \
  PUT3("fma." mode ".f32", x, y, z); \
  PUT2("div." mode ".f32", x, y);  \
  PUT1("rcp." mode ".f32", x);     \
  PUT1("sqrt." mode ".f32", x);
  ROUNDINGS(ROUND)
#undef ROUND
}

CONFORMANCE(float_flags) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1], z = words[2];
  PUT2("add.ftz.f32", x, y);
  PUT2("mul.ftz.f32", x, y);
  PUT3("fma.rn.ftz.f32", x, y, z);
  PUT2("add.sat.f32", x, y);
  PUT2("mul.ftz.sat.f32", x, y);
  PUT3("fma.rn.sat.f32", x, y, z);
  PUT1("abs.f32", x);
  PUT1("neg.f32", x);
  PUT1("neg.ftz.f32", x);
  PUT2("min.f32", x, y);
  PUT2("max.f32", x, y);
  PUT2("min.ftz.f32", x, y);
  PUT2("min.NaN.f32", x, y);
  PUT2("max.NaN.f32", x, y);
  PUT2("copysign.f32", x, y);
  PUT1("cvt.sat.f32.f32", x);
  PUT1("cvt.rni.f32.f32", x);
  PUT1("cvt.rzi.f32.f32", x);
  PUT1("cvt.rmi.f32.f32", x);
  PUT1("cvt.rpi.f32.f32", x);
}

CONFORMANCE(comparisons) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1];
#define COMPARE(op)                      \
  PUT_IF("setp." op ".s32", x, y);       \
  PUT_IF("setp." op ".f32", x, y);       \
  PUT_IF("setp." op ".ftz.f32", x, y);
  COMPARE("eq") COMPARE("ne") COMPARE("lt") COMPARE("le") COMPARE("gt") COMPARE("ge")
#undef COMPARE
  PUT_IF("setp.equ.f32", x, y);
  PUT_IF("setp.neu.f32", x, y);
  PUT_IF("setp.ltu.f32", x, y);
  PUT_IF("setp.leu.f32", x, y);
  PUT_IF("setp.gtu.f32", x, y);
  PUT_IF("setp.geu.f32", x, y);
  PUT_IF("setp.num.f32", x, y);
  PUT_IF("setp.nan.f32", x, y);
  PUT_IF("setp.lo.u32", x, y);
  PUT_IF("setp.hs.u32", x, y);
  PUT2("set.lt.u32.f32", x, y);
  PUT2("set.ge.f32.s32", x, y);
  PUT3("slct.f32.s32", x, y, words[2]);
}

CONFORMANCE(double_arithmetic) {
  Words words(in, out);
  const uint64_t x = words.wide(0), y = words.wide(1);
#define ROUND(mode)                          \
  PUT_WIDE2("add." mode ".f64", "l", x, y);  \
  PUT_WIDE2("mul." mode ".f64", "l", x, y);  \
  PUT_WIDE3("fma." mode ".f64", "l", x, y, x); \
  PUT_WIDE2("div." mode ".f64", "l", x, y);  \
  PUT_WIDE1("sqrt." mode ".f64", "l", x);    \
  PUT_FROM_WIDE("cvt." mode ".f32.f64", x);
  ROUNDINGS(ROUND)
#undef ROUND
  PUT_WIDE2("min.f64", "l", x, y);
  PUT_WIDE2("max.f64", "l", x, y);
  PUT_WIDE1("cvt.f64.f32", "r", words[0]);
  PUT_WIDE1("cvt.rn.f64.s64", "l", x);
  PUT_WIDE1("cvt.rzi.s64.f64", "l", x);
  PUT_FROM_WIDE("cvt.rzi.s32.f64", x);
}

CONFORMANCE(conversions) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1];
#define ROUND(mode)                       \
  PUT1("cvt." mode ".f32.s32", x);        \
  PUT1("cvt." mode ".f32.u32", x);        \
  PUT1("cvt." mode "i.s32.f32", x);       \
  PUT1("cvt." mode "i.u32.f32", x);       \
  PUT_WIDE1("cvt." mode "i.s64.f32", "r", x); \
  PUT_FROM_WIDE("cvt." mode ".f32.s64", words.wide(0));
  ROUNDINGS(ROUND)
#undef ROUND
  PUT1("cvt.sat.u8.s32", x);
  PUT1("cvt.sat.s8.s32", x);
  PUT1("cvt.sat.u16.s32", x);
  PUT1("cvt.sat.s16.s32", x);
  PUT1("cvt.s32.s8", x);
  PUT1("cvt.u32.u8", x);
  PUT1("cvt.s32.s16", x);
  PUT1("cvt.u32.u16", x);
  PUT_HALF1("cvt.rn.f16.f32", x);
  PUT_HALF1("cvt.rz.f16.f32", x);
  PUT_HALF1("cvt.rn.bf16.f32", x);
  PUT_HALF1("cvt.rz.bf16.f32", x);
  PUT_HALF1("cvt.rn.relu.f16.f32", x);
  PUT_HALF1("cvt.rn.relu.bf16.f32", x);
  PUT_FROM_HALF("cvt.f32.f16", x);
  PUT_FROM_HALF("cvt.rzi.s32.f16", x);
  PUT2("cvt.rn.bf16x2.f32", x, y);
  PUT2("cvt.rn.f16x2.f32", x, y);
  PUT2("cvt.rz.bf16x2.f32", x, y);
  PUT2("cvt.rn.relu.f16x2.f32", x, y);
  PUT1("cvt.rna.tf32.f32", x);
  PUT3("cvt.pack.sat.s8.s32.b32", x, y, words[2]);
  PUT2("cvt.pack.sat.s16.s32", x, y);
}

CONFORMANCE(half_arithmetic) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1], z = words[2];
  PUT2("add.rn.f16x2", x, y);
  PUT2("sub.rn.f16x2", x, y);
  PUT2("mul.rn.f16x2", x, y);
  PUT3("fma.rn.f16x2", x, y, z);
  PUT3("fma.rn.relu.f16x2", x, y, z);
  PUT3("fma.rn.sat.f16x2", x, y, z);
  PUT2("min.f16x2", x, y);
  PUT2("max.NaN.f16x2", x, y);
  PUT1("neg.f16x2", x);
  PUT1("abs.f16x2", x);
  PUT3("fma.rn.bf16x2", x, y, z);
  PUT3("fma.rn.relu.bf16x2", x, y, z);
  PUT2("min.bf16x2", x, y);
  PUT2("max.bf16x2", x, y);
  PUT2("max.NaN.bf16x2", x, y);
  PUT1("neg.bf16x2", x);
  PUT1("abs.bf16x2", x);
}

// Results within the manual's error bounds, not bit for bit.
CONFORMANCE(approximations) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1];
  PUT1("ex2.approx.f32", x);
  PUT1("ex2.approx.ftz.f32", x);
  PUT1("lg2.approx.f32", x);
  PUT1("rcp.approx.ftz.f32", x);
  PUT1("sqrt.approx.f32", x);
  PUT1("rsqrt.approx.f32", x);
  PUT1("sin.approx.f32", x);
  PUT1("cos.approx.f32", x);
  PUT1("tanh.approx.f32", x);
  PUT2("div.approx.f32", x, y);
  PUT2("div.full.f32", x, y);
  PUT1("ex2.approx.f16x2", x);
  PUT1("tanh.approx.f16x2", x);
}

namespace {

__noinline__ __device__ unsigned collatz(unsigned n) {
  unsigned steps = 0;
  for (n = n % 97 + 1; n != 1; ++steps) n = n % 2 == 0 ? n / 2 : 3 * n + 1;
  return steps;
}

__constant__ unsigned kTable[8] = {3, 1, 4, 1, 5, 9, 2, 6};

}  // namespace

// Divergent loops, a call, a jump table, constant and local memory, narrow loads, special registers.
CONFORMANCE(control_and_memory) {
  Words words(in, out);
  const unsigned x = words[0], y = words[1];
  words.put(collatz(x));
  unsigned value = x;
  switch (y % 7) {
    case 0: value += 11; break;
    case 1: value ^= 0x5555; [[fallthrough]];
    case 2: value *= 3; break;
    case 3: value = __brev(value); break;
    case 4: value -= y; break;
    case 5: value = ~value; break;
    default: value >>= 3;
  }
  words.put(value);
  words.put(kTable[y % 8]);
  unsigned local[8];
  for (int i = 0; i < 8; ++i) local[(i + x) % 8] = i * y;
  words.put(local[y % 8]);
  const auto* bytes = reinterpret_cast<const unsigned char*>(words.in);
  words.put(bytes[x % 4]);
  words.put(static_cast<unsigned>(static_cast<int>(static_cast<signed char>(bytes[y % 4]))));
  words.put(reinterpret_cast<const unsigned short*>(words.in)[x % 2]);
  words.put(static_cast<unsigned>(static_cast<int>(reinterpret_cast<const short*>(words.in)[y % 2])));
  unsigned lane, below;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  asm volatile("mov.u32 %0, %%lanemask_lt;" : "=r"(below));
  words.put(lane);
  words.put(below);
  words.put(threadIdx.x + 1000 * blockIdx.x + 1000000 * gridDim.x);
}
