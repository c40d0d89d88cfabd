// What a resolver asks of one instruction: its modifiers and operands, turned into rows.
#include <algorithm>
#include <bit>

#include "compiler.h"
#include "compiler_impl.h"
#include "machine.h"

namespace ptxsim {

bool special_is_wide(Special s) {
  return s == Special::kClock64 || s == Special::kGlobalTimer || s == Special::kGridId;
}

RowClass row_class(Type type) {
  const int bits = bits_of(type);
  return type == Type::kPred ? RowClass::kPred : bits <= 32 ? RowClass::k32 : bits <= 64 ? RowClass::k64 : RowClass::k128;
}

bool Build::has(std::string_view mod) const { return std::find(mods.begin(), mods.end(), mod) != mods.end(); }

bool Build::take(std::string_view mod) {
  const auto it = std::find(mods.begin(), mods.end(), mod);
  if (it == mods.end()) return false;
  mods.erase(it);
  return true;
}

int Build::take_one(std::initializer_list<std::string_view> names, int otherwise) {
  int index = 0;
  for (const std::string_view name : names) {
    if (take(name)) return index;
    ++index;
  }
  return otherwise;
}

Type Build::take_type() {
  for (auto it = mods.begin(); it != mods.end(); ++it) {
    const Type type = type_of(*it);
    if (type == Type::kNone) continue;
    mods.erase(it);
    return type;
  }
  return Type::kNone;
}

Type Build::need_type() {
  const Type type = take_type();
  if (type == Type::kNone) fail("it has no type");
  return type;
}

void Build::fail(const std::string& why) const {
  throw UnknownInstruction("`" + std::string(in.opcode) + "` (PTX line " + std::to_string(in.line) + "): " + why);
}

void Build::operands(size_t at_least, size_t at_most) const {
  if (ops.size() < at_least || ops.size() > at_most)
    fail("it has " + std::to_string(ops.size()) + " operands, not " + std::to_string(at_least));
}

void Build::append(Offset offset) { compiler_.operand_list.push_back(offset); }

size_t Build::compiler_operands() const { return compiler_.operand_list.size(); }

RowClass Build::class_of(const Operand& operand) const {
  return operand.kind == Operand::Kind::kReg ? compiler_.registers[static_cast<size_t>(operand.reg)].row_class
                                              : RowClass::k32;
}

bool Build::is_wide(const Operand& operand) const { return class_of(operand) == RowClass::k64; }

Offset Build::temporary(RowClass wanted) { return compiler_.new_register(wanted) << 1; }

void Build::dst(const Operand& operand, Type type) {
  if (in.defs != compiler_.operand_list.size()) fail("(interpreter) destinations must come first");
  ++in.defs;
  if (operand.kind == Operand::Kind::kSink) return append(temporary(row_class(type)));
  if (operand.kind != Operand::Kind::kReg) fail("its destination is not a register");
  if (class_of(operand) != row_class(type)) fail(std::string("its destination is not as wide as .") + name_of(type));
  append(static_cast<Offset>(operand.reg) << 1);
}

void Build::dst_pred(const Operand& operand) { dst(operand, Type::kPred); }

void Build::src_pred(const Operand& operand) {
  if (operand.kind == Operand::Kind::kNumber) return append(pred_constant(operand.number.bits != 0));
  if (operand.kind != Operand::Kind::kReg || class_of(operand) != RowClass::kPred) fail("a predicate expected");
  append(static_cast<Offset>(operand.reg) << 1);
}

Offset Build::constant(uint64_t bits, bool wide) { return compiler_.constant(bits, wide); }
Offset Build::pred_constant(bool value) { return compiler_.constant(value ? 0xffffffffu : 0u, false); }

void Build::src(const Operand& operand, Type type) {
  const RowClass wanted = row_class(type);
  switch (operand.kind) {
    case Operand::Kind::kReg:
      if (class_of(operand) != wanted) fail(std::string("a source is not as wide as .") + name_of(type));
      return append(static_cast<Offset>(operand.reg) << 1);
    case Operand::Kind::kNumber: {
      uint64_t bits = operand.number.bits;
      if (operand.number.is_float) {
        if (operand.number.single && type == Type::kF64)
          bits = std::bit_cast<uint64_t>(static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits))));
        else if (!operand.number.single && bits_of(type) == 32)
          bits = std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(bits)));
      } else if (type == Type::kF32) {
        // An integer as a float operand only comes from b32-like uses: it is the bits.
      }
      if (wanted == RowClass::kPred) return append(pred_constant(bits != 0));
      if (wanted == RowClass::k128) fail("a 128-bit immediate");
      return append(constant(bits, wanted == RowClass::k64));
    }
    case Operand::Kind::kSymbol: {
      if (operand.function != nullptr) return append(constant(function_address(operand.function), true));
      const Symbol& symbol = *operand.symbol;
      const auto offset = static_cast<uint64_t>(operand.offset);
      if (symbol.space == Space::kGlobal || symbol.space == Space::kConst)
        return append(constant(reinterpret_cast<uint64_t>(symbol.data) + offset, wanted == RowClass::k64));
      if (symbol.space == Space::kShared)
        return append(compiler_.shared_constant(symbol, offset, wanted == RowClass::k64));
      fail("the address of `" + symbol.name + "` cannot be used here");
    }
    case Operand::Kind::kSpecial: {
      const Offset row = compiler_.special(operand.special);
      if (special_is_wide(operand.special) != (wanted == RowClass::k64)) fail("a special register of another width");
      return append(row);
    }
    default: fail("an operand that is not understood");
  }
}

void Build::address(const Operand& operand, int64_t& constant_part, bool& wide) {
  if (operand.kind != Operand::Kind::kAddress) fail("an address in [] expected");
  constant_part = operand.offset;
  wide = true;
  if (operand.reg >= 0) {
    const RowClass c = compiler_.registers[static_cast<size_t>(operand.reg)].row_class;
    if (c != RowClass::k32 && c != RowClass::k64) fail("an address that is neither 32 nor 64 bits wide");
    wide = c == RowClass::k64;
    return append(static_cast<Offset>(operand.reg) << 1);
  }
  if (operand.symbol != nullptr) {
    const Symbol& symbol = *operand.symbol;
    switch (symbol.space) {
      case Space::kGlobal:
      case Space::kConst: return append(constant(reinterpret_cast<uint64_t>(symbol.data), true));
      case Space::kShared: return append(compiler_.shared_constant(symbol, 0, true));
      case Space::kLocal:
        in.flags |= kFrameAddress;
        constant_part += symbol.offset;
        return append(constant(kLocalBase, true));
      case Space::kParam:
        constant_part += symbol.offset;
        in.space = static_cast<uint8_t>(Space::kParam);
        return append(constant(0, true));
      default: fail("`" + symbol.name + "` is no address");
    }
  }
  append(constant(0, true));
}

void Build::address(const Operand& operand) {
  bool wide = true;
  address(operand, in.imm, wide);
  in.width = wide ? 64 : 32;
}

uint8_t Build::take_space() {
  if (take("global")) return static_cast<uint8_t>(Space::kGlobal);
  if (take("shared::cluster")) return static_cast<uint8_t>(Space::kSharedCluster);
  if (take("shared") || take("shared::cta")) return static_cast<uint8_t>(Space::kShared);
  if (take("local")) return static_cast<uint8_t>(Space::kLocal);
  if (take("const")) return static_cast<uint8_t>(Space::kConst);
  if (take("param") || take("param::entry") || take("param::func")) return static_cast<uint8_t>(Space::kParam);
  return static_cast<uint8_t>(Space::kGeneric);
}

Offset Build::compiler_flag() { return compiler_.carry_flag(); }

Program& Build::program() const { return *compiler_.program; }

}  // namespace ptxsim
