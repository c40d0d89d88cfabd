// The state of compiling one kernel with the functions it reaches.
#pragma once

#include <map>
#include <tuple>

#include "compiler.h"

namespace ptxsim {

class Compiler {
 public:
  explicit Compiler(const ModuleImpl& module) : module_(module) {}
  std::shared_ptr<const Program> run(const Function& entry);

  struct Register {
    RowClass row_class;
    int callee;   // -1: of the entry
    bool pinned;  // keeps a row of its own for the whole kernel
  };
  struct Scope {
    Scope* parent = nullptr;
    std::unordered_map<std::string_view, const Symbol*> symbols, ranges;
    std::unordered_map<std::string_view, uint32_t> labels;
    std::unordered_map<std::string_view, std::vector<std::string_view>> tables;
  };

  Offset constant(uint64_t bits, bool wide, bool dynamic = false);  // dynamic: relative to extern shared memory
  Offset shared_constant(const Symbol& symbol, uint64_t offset, bool wide);
  Offset special(Special special);
  Offset carry_flag();
  uint32_t new_register(RowClass c);
  uint64_t shared_address(const Symbol& symbol);
  void branch_to(Inst& inst, std::string_view label);  // for the instruction that is being built
  uint32_t jump_table(std::string_view name, Inst& inst);
  int callee(const Function* function);
  const ModuleImpl& module() const { return module_; }
  bool in_entry() const { return current_callee_ < 0; }
  // Emits an extra instruction in front of the one that is being built; its operands are in operand_list.
  void emit(Inst inst);

  std::shared_ptr<Program> program;
  std::vector<Register> registers;
  std::vector<Offset> operand_list;

 private:
  const Symbol* find_symbol(std::string_view name) const;
  int find_register(std::string_view name) const;
  Operand parse_operand(Lexer& lexer);
  void declare_registers(Lexer& lexer);
  Symbol* add_frame_variable(Symbol symbol);
  void directive(Lexer& lexer, std::string_view word);
  void location(Lexer& lexer);
  void statement(Lexer& lexer);
  uint32_t find_label(const Scope* scope, std::string_view label) const;
  void compile_body(const Function& function, int callee_index);
  void place_static_shared(const Function& function);
  void finish_constants();
  void mark_recursion();

  struct Fix {
    uint32_t inst;
    std::string_view label;
    const Scope* scope;
  };
  struct TableFix {
    uint32_t table;
    std::vector<std::string_view> labels;
    const Scope* scope;
  };

  const ModuleImpl& module_;
  std::vector<Scope*> scopes_;
  std::vector<std::unique_ptr<Scope>> scope_store_;
  std::vector<std::unique_ptr<Symbol>> store_;
  std::map<std::tuple<uint64_t, bool, bool>, Offset> constants_;  // by bits, wide, dynamic
  std::vector<unsigned char> constant_rows_;
  std::map<const Symbol*, uint64_t> shared_;
  uint32_t shared_end_ = 0, dynamic_align_ = 0;
  uint32_t frame_ = 0;
  int current_callee_ = -1;
  Offset carry_flag_ = kNoOffset;
  uint32_t loc_ = 0;
  std::map<std::tuple<uint32_t, uint32_t, uint32_t>, uint32_t> locs_;
  std::vector<Fix> fixes_;
  std::vector<TableFix> table_fixes_;
  Scope* scope_now_ = nullptr;
};

bool special_is_wide(Special special);
RowClass row_class(Type type);
bool is_call(const Inst& inst);

}  // namespace ptxsim
