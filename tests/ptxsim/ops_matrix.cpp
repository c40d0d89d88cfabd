// ldmatrix, stmatrix, movmatrix: 8 x 8 matrices of 16-bit elements whose rows lie where eight lanes point. A lane holds
// columns 2 (lane % 4) + {0, 1} of row lane / 4, so a row of 16 bytes is the registers of four neighbours.
#include <cstring>

#include "access.h"
#include "lanes.h"
#include "opcodes.h"

namespace ptxsim {
namespace {

void transpose(uint32_t* words) {
  uint16_t in[8][8], out[8][8];
  std::memcpy(in, words, sizeof in);
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < 8; ++j) out[j][i] = in[i][j];
  std::memcpy(words, out, sizeof out);
}

// o: destinations, base. vec: matrices; kind: transposed.
void ldmatrix(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, in.vec, addresses);
  const uint32_t lanes = in.vec == 4 ? kFull : (1u << (8 * in.vec)) - 1;
  resolve(w, in, static_cast<Space>(in.space), addresses, lanes, 16, Access::kRead, p, nullptr);
  for (int q = 0; q < in.vec; ++q) {
    auto* d = w.row<uint32_t>(in.operands()[q]);
    for (int row = 0; row < 8; ++row) std::memcpy(d + 4 * row, p[8 * q + row], 16);
    if (in.kind) transpose(d);
  }
}

// o: base, sources.
void stmatrix(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  alignas(64) uint64_t addresses[kLanes];
  unsigned char* p[kLanes];
  gather_addresses(w, in, 0, addresses);
  alignas(64) uint32_t stage[4][kLanes];
  for (int q = 0; q < in.vec; ++q) {
    std::memcpy(stage[q], w.row<uint32_t>(in.operands()[1 + q]), 128);
    if (in.kind) transpose(stage[q]);
  }
  const uint32_t lanes = in.vec == 4 ? kFull : (1u << (8 * in.vec)) - 1;
  resolve(w, in, static_cast<Space>(in.space), addresses, lanes, 16, Access::kWrite, p,
          reinterpret_cast<const unsigned char*>(stage));
  for (int i = 0; i < 8 * in.vec; ++i) std::memcpy(p[i], stage[i / 8] + 4 * (i % 8), 16);
}

void movmatrix(Warp& w, const Inst& in) {
  if (!aligned_here(w, in, true)) return;
  alignas(64) uint32_t t[kLanes];
  std::memcpy(t, w.row<uint32_t>(in.o[1]), sizeof t);
  transpose(t);
  std::memcpy(w.row<uint32_t>(in.o[0]), t, sizeof t);
}

void common(Build& b) {
  if (!b.take("sync") || !b.take("aligned")) b.fail("it is not .sync.aligned");
  if (!b.take("m8n8")) b.fail("only .m8n8 is implemented");
  b.in.vec = static_cast<uint8_t>(b.take("x4") ? 4 : b.take("x2") ? 2 : (b.take("x1"), 1));
  b.in.kind = b.take("trans");
  b.in.aligned = true;
  b.in.space = b.take_space();
  if (b.need_type() != Type::kB16) b.fail("only .b16 is implemented");
}

template <class F>
void each(const Operand& operand, size_t count, Build& b, F f) {
  if (operand.kind != Operand::Kind::kVector) return f(operand);
  if (operand.parts.size() != count) b.fail("its vector does not fit");
  for (const Operand& part : operand.parts) f(part);
}

void ldmatrix_resolver(Build& b) {
  common(b);
  b.operands(2, 2);
  each(b.ops[0], b.in.vec, b, [&](const Operand& part) { b.dst(part, Type::kB32); });
  b.address(b.ops[1]);
  b.in.fn = ldmatrix;
}

void stmatrix_resolver(Build& b) {
  common(b);
  b.operands(2, 2);
  b.address(b.ops[0]);
  each(b.ops[1], b.in.vec, b, [&](const Operand& part) { b.src(part, Type::kB32); });
  b.in.fn = stmatrix;
}

void movmatrix_resolver(Build& b) {
  b.take("sync"), b.take("aligned"), b.take("m8n8"), b.take("trans");
  b.need_type();
  b.operands(2, 2);
  b.dst(0, Type::kB32), b.src(1, Type::kB32);
  b.in.fn = movmatrix;
}

}  // namespace

void add_matrix(OpcodeTable& table) {
  table["ldmatrix"] = ldmatrix_resolver;
  table["stmatrix"] = stmatrix_resolver;
  table["movmatrix"] = movmatrix_resolver;
}

}  // namespace ptxsim
