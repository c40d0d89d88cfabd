// From the text of a kernel to a Program: statements, operands, and what an opcode needs to choose its handler.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "lexer.h"
#include "program.h"

namespace ptxsim {

struct Operand {
  enum class Kind : uint8_t { kReg, kNumber, kSymbol, kVector, kGroup, kAddress, kSink, kSpecial, kLabel };
  Kind kind = Kind::kSink;
  bool negated = false;  // !p
  int reg = -1;
  Number number;
  int64_t offset = 0;    // of an address or a symbol
  const Symbol* symbol = nullptr;
  const Function* function = nullptr;
  Special special = Special::kCount;
  std::string_view name;
  std::vector<Operand> parts;  // of {a, b}, (a, b), a|b, or what follows the first part of [a, b]
};

enum class RowClass : uint8_t { kPred, k32, k64, k128 };

class Compiler;

// One instruction on its way to a handler. The functions throw UnknownInstruction for what does not fit, so a resolver
// is a straight list of what it wants; modifiers that nobody took are an error too.
class Build {
 public:
  Build(Compiler& compiler, Inst& inst) : compiler_(compiler), in(inst) {}

  std::string_view base;
  std::vector<std::string_view> mods;
  std::vector<Operand> ops;

  bool has(std::string_view mod) const;
  bool take(std::string_view mod);                       // true and removed, or false
  int take_one(std::initializer_list<std::string_view> mods, int otherwise);  // index of the one present
  Type take_type();                                      // the first type among the modifiers; kNone if there is none
  Type need_type();
  [[noreturn]] void fail(const std::string& why) const;
  void operands(size_t at_least, size_t at_most) const;

  // Each appends to the operands of the instruction. Destinations come first.
  void dst(const Operand& operand, Type type);
  void dst(size_t i, Type type) { dst(ops.at(i), type); }
  void dst_pred(const Operand& operand);
  void src(const Operand& operand, Type type);
  void src(size_t i, Type type) { src(ops.at(i), type); }
  void src_pred(const Operand& operand);                 // `!p` is not allowed here
  void append(Offset offset);
  size_t compiler_operands() const;                      // how many there are by now
  Offset constant(uint64_t bits, bool wide);
  Offset pred_constant(bool value);
  // The base row of an address; its constant part, width and frame flag go into the instruction (the first address) or
  // into `constant_part` (further ones, whose base must then be as wide as `wide` says).
  void address(const Operand& operand);
  void address(const Operand& operand, int64_t& constant_part, bool& wide);
  Offset temporary(RowClass row_class);
  Offset compiler_flag();                                // the carry of add.cc and its like
  RowClass class_of(const Operand& operand) const;       // of a register
  bool is_wide(const Operand& operand) const;            // a 64-bit register

  uint8_t take_space();                                  // .global, .shared::cta ...; generic if absent
  Program& program() const;
  Compiler& compiler() const { return compiler_; }

 private:
  Compiler& compiler_;

 public:
  Inst& in;
};

constexpr uint8_t kFrameAddress = 0x80;  // in Inst::flags: the address is relative to the frame of the thread

// An opcode by its first word; it sets in.fn and the operands.
using Resolver = void (*)(Build&);
Resolver find_resolver(std::string_view base);

std::shared_ptr<const Program> compile(const ModuleImpl& module, const Function& entry);
uint64_t function_address(const Function* function);
Symbol parse_variable(Lexer& lexer, Space space);

}  // namespace ptxsim
