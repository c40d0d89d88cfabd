#include "compiler.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <set>

#include "allocate.h"
#include "compiler_impl.h"
#include "machine.h"

namespace ptxsim {

uint64_t function_address(const Function* function) { return reinterpret_cast<uint64_t>(function); }

namespace {

struct SpecialName {
  std::string_view name;
  Special special;
};
constexpr SpecialName kSpecials[] = {
    {"%tid.x", Special::kTidX}, {"%tid.y", Special::kTidY}, {"%tid.z", Special::kTidZ},
    {"%ntid.x", Special::kNtidX}, {"%ntid.y", Special::kNtidY}, {"%ntid.z", Special::kNtidZ},
    {"%ctaid.x", Special::kCtaidX}, {"%ctaid.y", Special::kCtaidY}, {"%ctaid.z", Special::kCtaidZ},
    {"%nctaid.x", Special::kNctaidX}, {"%nctaid.y", Special::kNctaidY}, {"%nctaid.z", Special::kNctaidZ},
    {"%laneid", Special::kLaneId}, {"%warpid", Special::kWarpId}, {"%nwarpid", Special::kNwarpId},
    {"%smid", Special::kSmId}, {"%nsmid", Special::kNsmId}, {"%gridid", Special::kGridId},
    {"%clock", Special::kClock}, {"%clock64", Special::kClock64}, {"%clock_hi", Special::kClockHi},
    {"%globaltimer", Special::kGlobalTimer}, {"%globaltimer_lo", Special::kGlobalTimerLo},
    {"%globaltimer_hi", Special::kGlobalTimerHi},
    {"%lanemask_eq", Special::kLanemaskEq}, {"%lanemask_le", Special::kLanemaskLe},
    {"%lanemask_lt", Special::kLanemaskLt}, {"%lanemask_ge", Special::kLanemaskGe},
    {"%lanemask_gt", Special::kLanemaskGt},
    {"%clusterid.x", Special::kClusterIdX}, {"%clusterid.y", Special::kClusterIdY},
    {"%clusterid.z", Special::kClusterIdZ}, {"%nclusterid.x", Special::kNclusterIdX},
    {"%nclusterid.y", Special::kNclusterIdY}, {"%nclusterid.z", Special::kNclusterIdZ},
    {"%cluster_ctaid.x", Special::kClusterCtaidX}, {"%cluster_ctaid.y", Special::kClusterCtaidY},
    {"%cluster_ctaid.z", Special::kClusterCtaidZ}, {"%cluster_nctaid.x", Special::kClusterNctaidX},
    {"%cluster_nctaid.y", Special::kClusterNctaidY}, {"%cluster_nctaid.z", Special::kClusterNctaidZ},
    {"%cluster_ctarank", Special::kClusterCtarank}, {"%cluster_nctarank", Special::kClusterNctarank},
    {"%is_explicit_cluster", Special::kIsExplicitCluster}, {"%dynamic_smem_size", Special::kDynamicSmem},
    {"%total_smem_size", Special::kTotalSmem}, {"%aggr_smem_size", Special::kAggrSmem},
};

Special special_of(std::string_view name) {
  for (const SpecialName& entry : kSpecials)
    if (entry.name == name) return entry.special;
  if (name.starts_with("%envreg")) {
    int number = 0;
    for (const char c : name.substr(7)) number = number * 10 + (c - '0');
    if (number < 32) return static_cast<Special>(static_cast<int>(Special::kEnvreg0) + number);
  }
  return Special::kCount;
}

}  // namespace

Offset Compiler::shared_constant(const Symbol& symbol, uint64_t offset, bool wide) {
  if (symbol.bytes > 0 && !symbol.external) return constant(shared_address(symbol) + offset, wide);
  dynamic_align_ = std::max(dynamic_align_, symbol.align);
  return constant(offset, wide, true);
}

Offset Compiler::constant(uint64_t bits, bool wide, bool dynamic) {
  if (!wide) bits &= 0xffffffffu;
  const auto [it, fresh] = constants_.try_emplace({bits, wide, dynamic}, 0);
  if (fresh) {
    it->second = static_cast<Offset>(constant_rows_.size()) | 1;
    constant_rows_.resize(constant_rows_.size() + (wide ? 256 : 128));
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(&constant_rows_[(it->second & ~1u) + static_cast<size_t>(lane) * (wide ? 8 : 4)], &bits, wide ? 8 : 4);
  }
  return it->second;
}

Offset Compiler::special(Special special) {
  for (const auto& row : program->specials)
    if (row.special == special) return row.row;
  const bool wide = special_is_wide(special);
  const Offset row = new_register(wide ? RowClass::k64 : RowClass::k32) << 1;
  registers[row >> 1].pinned = true;
  program->specials.push_back({special, row, wide});
  return row;
}

Offset Compiler::carry_flag() {
  if (carry_flag_ == kNoOffset) {
    carry_flag_ = new_register(RowClass::kPred) << 1;
    registers.back().pinned = true;
  }
  return carry_flag_;
}

uint32_t Compiler::new_register(RowClass c) {
  registers.push_back({c, current_callee_, false});
  return static_cast<uint32_t>(registers.size() - 1);
}

// Shared variables get their place when a kernel first names them.
uint64_t Compiler::shared_address(const Symbol& symbol) {
  const auto known = shared_.find(&symbol);
  if (known != shared_.end()) return known->second;
  const uint32_t align = std::max<uint32_t>(1, symbol.align);
  shared_end_ = (shared_end_ + align - 1) / align * align;
  const uint64_t address = kSharedBase + shared_end_;
  shared_end_ += static_cast<uint32_t>(symbol.bytes);
  shared_[&symbol] = address;
  Symbol named = symbol;
  named.offset = static_cast<int64_t>(address);
  program->shared.push_back(named);
  return address;
}

// First what is static, then extern: a kernel may name its extern array first.
void Compiler::place_static_shared(const Function& function) {
  for (Lexer lexer(function.body); !lexer.done();) {
    const char c = lexer.peek();
    if (!Lexer::is_word(c)) {
      if (c == '"') lexer.string();
      else lexer.accept(c);
      continue;
    }
    const auto it = module_.symbols.find(lexer.word());
    if (it != module_.symbols.end() && it->second->space == Space::kShared) {
      if (it->second->bytes > 0 && !it->second->external) shared_address(*it->second);
      else dynamic_align_ = std::max(dynamic_align_, it->second->align);
    }
  }
}

const Symbol* Compiler::find_symbol(std::string_view name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto it = (*scope)->symbols.find(name);
    if (it != (*scope)->symbols.end()) return it->second;
  }
  const auto it = module_.symbols.find(name);
  return it == module_.symbols.end() ? nullptr : it->second;
}

int Compiler::find_register(std::string_view name) const {
  size_t digits = name.size();
  while (digits > 0 && name[digits - 1] >= '0' && name[digits - 1] <= '9') --digits;
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto& symbols = (*scope)->symbols;
    if (const auto it = symbols.find(name); it != symbols.end() && it->second->space == Space::kReg && it->second->regs == 0)
      return it->second->reg;
    if (digits == name.size() || name.size() - digits > 9) continue;
    const auto range = (*scope)->ranges.find(name.substr(0, digits));
    if (range == (*scope)->ranges.end()) continue;
    int number = 0;
    for (const char c : name.substr(digits)) number = number * 10 + (c - '0');
    if (number < range->second->regs) return range->second->reg + number;
  }
  return -1;
}

Operand Compiler::parse_operand(Lexer& lexer) {
  Operand operand;
  const char c = lexer.peek();
  if (c == '{' || c == '(') {
    lexer.accept(c);
    operand.kind = c == '{' ? Operand::Kind::kVector : Operand::Kind::kGroup;
    while (!lexer.accept(c == '{' ? '}' : ')')) {
      operand.parts.push_back(parse_operand(lexer));
      lexer.accept(',');
    }
    return operand;
  }
  if (c == '[') {
    lexer.accept(c);
    operand = parse_operand(lexer);
    if (operand.kind == Operand::Kind::kNumber) {
      operand.offset = static_cast<int64_t>(operand.number.bits);
    } else if (operand.kind != Operand::Kind::kReg && operand.kind != Operand::Kind::kSymbol) {
      lexer.fail("an address expected");
    }
    operand.kind = Operand::Kind::kAddress;
    while (lexer.accept(',')) operand.parts.push_back(parse_operand(lexer));
    lexer.expect(']');
    return operand;
  }
  if (c == '!') {
    lexer.accept(c);
    operand = parse_operand(lexer);
    operand.negated = true;
    return operand;
  }
  if (c == '-' || c == '+') {
    lexer.accept(c);
    operand.kind = Operand::Kind::kNumber;
    if (!parse_number(lexer.word(), operand.number)) lexer.fail("a number expected");
    if (c == '-') {
      Number& n = operand.number;
      n.bits = n.is_float ? n.bits ^ (n.single ? 0x80000000ull : 0x8000000000000000ull) : -n.bits;
    }
    return operand;
  }
  const std::string_view word = lexer.word();
  operand.name = word;
  if (parse_number(word, operand.number)) {
    operand.kind = Operand::Kind::kNumber;
  } else if (word == "_") {
    operand.kind = Operand::Kind::kSink;
  } else if (word == "WARP_SZ") {
    operand.kind = Operand::Kind::kNumber;
    operand.number.bits = 32;
  } else if (operand.reg = find_register(word); operand.reg >= 0) {
    operand.kind = Operand::Kind::kReg;
  } else if (operand.special = word[0] == '%' ? special_of(word) : Special::kCount; operand.special != Special::kCount) {
    operand.kind = Operand::Kind::kSpecial;
  } else if (operand.symbol = find_symbol(word); operand.symbol != nullptr) {
    operand.kind = Operand::Kind::kSymbol;
  } else if (const auto it = module_.functions.find(word); it != module_.functions.end()) {
    operand.kind = Operand::Kind::kSymbol;
    operand.function = it->second;
  } else {
    operand.kind = Operand::Kind::kLabel;
  }
  if (lexer.peek() == '|') {  // d|p
    lexer.accept('|');
    Operand pair;
    pair.kind = Operand::Kind::kGroup;
    pair.parts.push_back(operand);
    pair.parts.push_back(parse_operand(lexer));
    return pair;
  }
  if (operand.kind != Operand::Kind::kNumber) {
    while (lexer.peek() == '+' || lexer.peek() == '-') {
      const bool minus = lexer.peek() == '-';
      lexer.accept(lexer.peek());
      const bool again = lexer.accept('-');
      Number number;
      if (!parse_number(lexer.word(), number)) lexer.fail("a constant offset expected");
      operand.offset += (minus != again ? -1 : 1) * static_cast<int64_t>(number.bits);
    }
  }
  return operand;
}

void Compiler::declare_registers(Lexer& lexer) {
  const std::string_view type_word = lexer.word();
  const Type type = type_of(type_word.substr(1));
  if (type == Type::kNone) lexer.fail("a register type expected");
  do {
    auto symbol = std::make_unique<Symbol>();
    const std::string_view name = lexer.word();
    symbol->name = name;
    symbol->type = type;
    symbol->space = Space::kReg;
    int count = 0;
    if (lexer.accept('<')) {
      Number number;
      if (!parse_number(lexer.word(), number)) lexer.fail("a count expected");
      count = static_cast<int>(number.bits);
      lexer.expect('>');
      if (count > (1 << 22)) lexer.fail("too many registers");
    }
    symbol->reg = static_cast<int>(registers.size());
    symbol->regs = count;
    for (int i = 0; i < std::max(1, count); ++i) new_register(row_class(type));
    if (count > 0) scopes_.back()->ranges[name] = symbol.get();
    else scopes_.back()->symbols[name] = symbol.get();
    store_.push_back(std::move(symbol));
  } while (lexer.accept(','));
  lexer.expect(';');
}

Symbol* Compiler::add_frame_variable(Symbol symbol) {
  symbol.space = Space::kLocal;
  const uint32_t align = std::max<uint32_t>(4, symbol.align);
  frame_ = (frame_ + align - 1) / align * align;
  symbol.offset = static_cast<int64_t>(frame_);
  frame_ += static_cast<uint32_t>(symbol.bytes);
  store_.push_back(std::make_unique<Symbol>(std::move(symbol)));
  return store_.back().get();
}

void Compiler::directive(Lexer& lexer, std::string_view word) {
  if (word == ".reg") {
    declare_registers(lexer);
  } else if (word == ".param" || word == ".local") {
    do {
      Symbol* symbol = add_frame_variable(parse_variable(lexer, Space::kLocal));
      scopes_.back()->symbols[symbol->name] = symbol;
    } while (lexer.accept(','));
    lexer.expect(';');
  } else if (word == ".shared" || word == ".extern") {
    bool external = false;
    if (word == ".extern") external = true, lexer.word();
    auto symbol = std::make_unique<Symbol>(parse_variable(lexer, Space::kShared));
    symbol->external = external;
    lexer.expect(';');
    if (!external && symbol->bytes > 0) shared_address(*symbol);
    scopes_.back()->symbols[symbol->name] = symbol.get();
    store_.push_back(std::move(symbol));
  } else if (word == ".loc") {
    location(lexer);
  } else if (word == ".pragma") {
    lexer.string();
    lexer.expect(';');
  } else if (word == ".file") {
    while (lexer.peek() != '"') lexer.word();
    lexer.string();
  } else {
    lexer.fail("`" + std::string(word) + "` is not known in a function");
  }
}

void Compiler::location(Lexer& lexer) {
  const auto number = [&] {
    Number n;
    if (!parse_number(lexer.word(), n)) lexer.fail("a number expected");
    return static_cast<uint32_t>(n.bits);
  };
  Loc loc;
  loc.file = number(), loc.line = number(), loc.column = number();
  if (lexer.accept(',')) {
    if (lexer.word() != "function_name") lexer.fail("function_name expected");
    lexer.word();
    if (lexer.accept('+')) lexer.word();
    lexer.expect(',');
    if (lexer.word() != "inlined_at") lexer.fail("inlined_at expected");
    const uint32_t file = number(), line = number(), column = number();
    const auto outer = locs_.find({file, line, column});
    if (outer != locs_.end()) {
      loc.inlined_at = outer->second;
    } else {
      program->locs.push_back({file, line, column, 0});
      loc.inlined_at = static_cast<uint32_t>(program->locs.size() - 1);
    }
  }
  if (loc.line == 0) return;  // of the compiler's making: the line before it is as good as any
  program->locs.push_back(loc);
  loc_ = static_cast<uint32_t>(program->locs.size() - 1);
  locs_[{loc.file, loc.line, loc.column}] = loc_;
}

void Compiler::statement(Lexer& lexer) {
  if (lexer.accept('{')) {
    scope_store_.push_back(std::make_unique<Scope>());
    scope_store_.back()->parent = scopes_.back();
    scopes_.push_back(scope_store_.back().get());
    return;
  }
  if (lexer.accept('}')) {
    if (scopes_.size() <= 1) lexer.fail("an unmatched '}'");
    scopes_.pop_back();
    return;
  }
  if (lexer.accept(';')) return;
  bool guarded = false, guard_not = false;
  std::string_view guard;
  if (lexer.accept('@')) {
    guarded = true;
    guard_not = lexer.accept('!');
    guard = lexer.word();
  }
  const uint32_t line = lexer.line();
  const std::string_view word = lexer.word();
  if (!guarded && word[0] == '.') return directive(lexer, word);
  if (!guarded && lexer.peek() == ':') {
    lexer.accept(':');
    if (lexer.peek() == '.') {
      const std::string_view kind = lexer.word();
      if (kind == ".branchtargets") {
        std::vector<std::string_view> labels;
        do labels.push_back(lexer.word());
        while (lexer.accept(','));
        lexer.expect(';');
        scopes_.back()->tables[word] = std::move(labels);
        return;
      }
      if (kind == ".callprototype" || kind == ".calltargets") {
        while (!lexer.accept(';')) {
          if (Lexer::is_word(lexer.peek())) lexer.word();
          else lexer.accept(lexer.peek());
        }
        return;
      }
      directive(lexer, kind);  // a label in front of a directive
    }
    scopes_.back()->labels[word] = static_cast<uint32_t>(program->code.size());
    return;
  }

  Inst inst;
  inst.line = line;
  inst.loc = loc_;
  inst.opcode = word;
  operand_list.clear();
  Build build(*this, inst);
  size_t dot = word.find('.');
  build.base = word.substr(0, dot);
  while (dot != std::string_view::npos) {
    const size_t next = word.find('.', dot + 1);
    build.mods.push_back(word.substr(dot + 1, next == std::string_view::npos ? next : next - dot - 1));
    dot = next;
  }
  while (!lexer.accept(';')) {
    build.ops.push_back(parse_operand(lexer));
    if (!lexer.accept(',') && lexer.peek() != ';') {
      if (lexer.peek() == ')') lexer.accept(')');
      else lexer.fail("',' or ';' expected");
    }
  }
  if (guarded) {
    const int reg = find_register(guard);
    if (reg < 0 || registers[static_cast<size_t>(reg)].row_class != RowClass::kPred)
      lexer.fail("`" + std::string(guard) + "` is no predicate");
    inst.guard = static_cast<Offset>(reg) << 1;
    inst.guard_not = guard_not;
  }
  const Resolver resolver = find_resolver(build.base);
  if (resolver == nullptr) build.fail("this opcode is not implemented");
  scope_now_ = scopes_.back();
  resolver(build);
  if (inst.fn == nullptr) build.fail("this form is not implemented");
  if (!build.mods.empty()) build.fail("modifier ." + std::string(build.mods.front()) + " is not implemented");
  emit(inst);
}

void Compiler::emit(Inst inst) {
  const size_t count = operand_list.size();
  inst.count = static_cast<uint16_t>(count);
  for (size_t i = 0; i < std::min<size_t>(count, kInlineOperands); ++i) inst.o[i] = operand_list[i];
  if (count > kInlineOperands) {
    program->lists.push_back(std::make_unique<Offset[]>(count));
    std::copy(operand_list.begin(), operand_list.end(), program->lists.back().get());
    inst.list = program->lists.back().get();
  }
  operand_list.clear();
  program->code.push_back(inst);
}

void Compiler::branch_to(Inst& inst, std::string_view label) {
  (void)inst;
  fixes_.push_back({static_cast<uint32_t>(program->code.size()), label, scope_now_});
}

uint32_t Compiler::find_label(const Scope* scope, std::string_view label) const {
  for (; scope != nullptr; scope = scope->parent) {
    const auto it = scope->labels.find(label);
    if (it != scope->labels.end()) return it->second;
  }
  throw std::runtime_error("label `" + std::string(label) + "` is not defined");
}

uint32_t Compiler::jump_table(std::string_view name, Inst&) {
  for (const Scope* scope = scope_now_; scope != nullptr; scope = scope->parent) {
    const auto it = scope->tables.find(name);
    if (it == scope->tables.end()) continue;
    program->jump_tables.emplace_back();
    table_fixes_.push_back({static_cast<uint32_t>(program->jump_tables.size() - 1), it->second, scope_now_});
    return static_cast<uint32_t>(program->jump_tables.size() - 1);
  }
  throw UnknownInstruction("no .branchtargets `" + std::string(name) + "`");
}

int Compiler::callee(const Function* function) {
  for (size_t i = 0; i < program->callees.size(); ++i)
    if (program->callees[i].function == function) return static_cast<int>(i);
  program->callees.push_back({function, 0, 0, false, {}});
  return static_cast<int>(program->callees.size() - 1);
}

void Compiler::compile_body(const Function& function, int callee_index) {
  current_callee_ = callee_index;
  frame_ = 0;
  scopes_.clear();
  scope_store_.push_back(std::make_unique<Scope>());
  scopes_.push_back(scope_store_.back().get());
  fixes_.clear();
  table_fixes_.clear();
  locs_.clear();
  for (const Symbol& p : function.params) {
    if (function.entry) scopes_.back()->symbols[p.name] = &p;
    else scopes_.back()->symbols[p.name] = add_frame_variable(p);
  }
  for (const Symbol& p : function.returns) scopes_.back()->symbols[p.name] = add_frame_variable(p);
  for (Lexer lexer(function.body, function.body_line); !lexer.done();) statement(lexer);
  if (scopes_.size() != 1) throw std::runtime_error("'}' missing in `" + function.name + "`");
  // Whoever runs off the end returns.
  Inst inst;
  inst.line = function.body_line;
  inst.loc = loc_;
  inst.opcode = "ret";
  operand_list.clear();
  Build build(*this, inst);
  build.base = "ret";
  find_resolver("ret")(build);
  emit(inst);
  for (const Fix& fix : fixes_) program->code[fix.inst].target = find_label(fix.scope, fix.label);
  for (const auto& fix : table_fixes_)
    for (const std::string_view label : fix.labels) program->jump_tables[fix.table].push_back(find_label(fix.scope, label));
}

std::shared_ptr<const Program> Compiler::run(const Function& entry) {
  program = std::make_shared<Program>();
  program->entry = &entry;
  program->name = entry.name;
  program->locs.push_back({});
  program->hopper = module_.uses_wgmma();
  if (!entry.defined) throw std::runtime_error("kernel `" + entry.name + "` has no body");
  constant(0, false), constant(0, true);
  // Everything reachable has to be known before static shared memory can be placed.
  place_static_shared(entry);
  compile_body(entry, -1);
  program->frame_bytes = frame_;
  for (size_t i = 0; i < program->callees.size(); ++i) {  // grows on the way
    const Function& function = *program->callees[i].function;
    if (!function.defined) throw UnknownInstruction("call of `" + function.name + "`, which has no body");
    place_static_shared(function);
    program->callees[i].pc = static_cast<uint32_t>(program->code.size());
    loc_ = 0;
    compile_body(function, static_cast<int>(i));
    program->callees[i].frame_bytes = (frame_ + 15) / 16 * 16;
  }
  program->static_shared = shared_end_;
  const uint32_t align = std::max<uint32_t>(16, dynamic_align_);
  program->dynamic_offset = (shared_end_ + align - 1) / align * align;
  finish_constants();
  mark_recursion();
  allocate_rows(*this);
  return program;
}

// Extern shared memory starts behind everything static, which is known only now.
void Compiler::finish_constants() {
  program->constant_bytes.resize(constant_rows_.size() + 64);
  auto address = reinterpret_cast<uintptr_t>(program->constant_bytes.data());
  program->constants = program->constant_bytes.data() + (64 - address % 64) % 64;
  std::memcpy(program->constants, constant_rows_.data(), constant_rows_.size());
  for (const auto& [key, offset] : constants_) {
    const auto& [bits, wide, dynamic] = key;
    if (!dynamic) continue;
    const uint64_t value = kSharedBase + program->dynamic_offset + bits;
    for (int lane = 0; lane < 32; ++lane)
      std::memcpy(program->constants + (offset & ~1u) + static_cast<size_t>(lane) * (wide ? 8 : 4), &value, wide ? 8 : 4);
  }
}

// A function that can come back to itself has its registers saved around calls.
void Compiler::mark_recursion() {
  const size_t count = program->callees.size();
  std::vector<std::set<int>> reach(count);
  for (size_t i = 0; i < count; ++i) {
    const uint32_t end = i + 1 < count ? program->callees[i + 1].pc : static_cast<uint32_t>(program->code.size());
    for (uint32_t pc = program->callees[i].pc; pc < end; ++pc) {
      const Inst& inst = program->code[pc];
      if (!is_call(inst)) continue;
      const auto& call = program->calls[static_cast<size_t>(inst.imm)];
      if (call.callee >= 0) reach[i].insert(call.callee);
      else if (call.builtin == 0)
        for (size_t j = 0; j < count; ++j) reach[i].insert(static_cast<int>(j));
    }
  }
  for (size_t round = 0; round < count; ++round)
    for (size_t i = 0; i < count; ++i) {
      std::set<int> more = reach[i];
      for (const int j : reach[i]) more.insert(reach[static_cast<size_t>(j)].begin(), reach[static_cast<size_t>(j)].end());
      reach[i] = std::move(more);
    }
  for (size_t i = 0; i < count; ++i) program->callees[i].recursive = reach[i].contains(static_cast<int>(i));
}

std::shared_ptr<const Program> compile(const ModuleImpl& module, const Function& entry) {
  return Compiler(module).run(entry);
}

}  // namespace ptxsim
