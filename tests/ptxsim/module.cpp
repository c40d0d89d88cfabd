// Module scope: entries, functions, variables, files. Bodies are compiled when their kernel is first launched.
#include <algorithm>
#include <bit>
#include <charconv>
#include <cstdlib>
#include <cstring>

#include "compiler.h"
#include "lexer.h"
#include "program.h"

namespace ptxsim {

bool parse_number(std::string_view word, Number& number) {
  number = {};
  if (word.empty() || word[0] < '0' || word[0] > '9') return false;
  const auto hex = [&](std::string_view digits, int base) {
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
    number.bits = value;
    return error == std::errc() && end == digits.data() + digits.size();
  };
  if (word.size() > 2 && word[0] == '0' && (word[1] == 'f' || word[1] == 'F') && word.size() == 10) {
    number.is_float = number.single = true;
    return hex(word.substr(2), 16);
  }
  if (word.size() > 2 && word[0] == '0' && (word[1] == 'd' || word[1] == 'D') && word.size() == 18) {
    number.is_float = true;
    return hex(word.substr(2), 16);
  }
  if (word.back() == 'U' || word.back() == 'u') word.remove_suffix(1);
  if (word.size() > 2 && word[0] == '0' && (word[1] == 'x' || word[1] == 'X')) return hex(word.substr(2), 16);
  if (word.size() > 2 && word[0] == '0' && (word[1] == 'b' || word[1] == 'B')) return hex(word.substr(2), 2);
  if (word.find_first_of(".eE") != std::string_view::npos) {
    number.is_float = true;
    const std::string copy(word);
    char* end = nullptr;
    number.bits = std::bit_cast<uint64_t>(std::strtod(copy.c_str(), &end));
    return end == copy.c_str() + copy.size();
  }
  if (word.size() > 1 && word[0] == '0') return hex(word, 8);
  return hex(word, 10);
}

namespace {

Space space_of(std::string_view directive) {
  if (directive == ".global") return Space::kGlobal;
  if (directive == ".const") return Space::kConst;
  if (directive == ".shared") return Space::kShared;
  if (directive == ".local") return Space::kLocal;
  if (directive == ".param") return Space::kParam;
  return Space::kGeneric;
}

int64_t parse_integer(Lexer& lexer) {
  const bool minus = lexer.accept('-');
  Number number;
  if (!parse_number(lexer.word(), number) || number.is_float) lexer.fail("an integer expected");
  return minus ? -static_cast<int64_t>(number.bits) : static_cast<int64_t>(number.bits);
}

}  // namespace

// `.align 8 .b8 name[16]`, `.u64 .ptr .global .align 1 name`, `.b32 name`: what follows the state space.
Symbol parse_variable(Lexer& lexer, Space space) {
  Symbol symbol;
  symbol.space = space;
  uint32_t align = 0, vector = 1;
  bool pointer = false;
  std::string_view word;
  for (;;) {
    word = lexer.word();
    if (word[0] != '.') break;
    if (word == ".align") {
      const auto value = static_cast<uint32_t>(parse_integer(lexer));
      if (!pointer) align = value;  // of a pointer: what it points to
    } else if (word == ".ptr") {
      pointer = true;
    } else if (word == ".v2" || word == ".v4" || word == ".v8") {
      vector = static_cast<uint32_t>(word[2] - '0');
    } else if (const Type type = type_of(word.substr(1)); type != Type::kNone) {
      symbol.type = type;
    } else if (word != ".texref" && word != ".samplerref" && word != ".surfref" && !pointer && word != ".managed" &&
               !word.starts_with(".attribute")) {
      lexer.fail("`" + std::string(word) + "` is not known here");
    }
    if (word == ".attribute") {
      lexer.expect('(');
      while (!lexer.accept(')')) lexer.word(), lexer.accept(',');
    }
  }
  symbol.name = word;
  const uint64_t element = std::max(1, bits_of(symbol.type) / 8) * uint64_t{vector};
  symbol.bytes = element;
  symbol.align = align ? align : static_cast<uint32_t>(element);
  uint64_t count = 1;
  while (lexer.accept('[')) {
    if (lexer.accept(']')) {
      count = 0;
    } else {
      count *= static_cast<uint64_t>(parse_integer(lexer));
      lexer.expect(']');
    }
  }
  symbol.bytes = element * count;
  return symbol;
}

class ModuleParser {
 public:
  ModuleParser(ModuleImpl& module) : m_(module), lexer_(module.text_) {}

  void parse() {
    while (!lexer_.done()) statement();
    for (const auto& fix : fixes_) {  // initialisers that hold addresses
      const auto it = m_.symbols.find(fix.symbol);
      uint64_t value = 0;
      if (it != m_.symbols.end()) {
        value = reinterpret_cast<uint64_t>(it->second->data);
      } else if (const auto f = m_.functions.find(fix.symbol); f != m_.functions.end()) {
        value = function_address(f->second);
      }
      value += static_cast<uint64_t>(fix.offset);
      std::memcpy(fix.place, &value, std::min<size_t>(8, fix.bytes));
    }
  }

 private:
  struct Fix {
    unsigned char* place;
    size_t bytes;
    std::string symbol;
    int64_t offset;
  };

  void statement() {
    const std::string_view word = lexer_.word();
    if (word == ".version") {
      const std::string version(lexer_.word());
      m_.version_ = static_cast<int>(std::strtod(version.c_str(), nullptr) * 10 + 0.5);
    } else if (word == ".target") {
      do lexer_.word();
      while (lexer_.accept(','));
    } else if (word == ".address_size") {
      lexer_.word();
    } else if (word == ".file") {
      const auto number = static_cast<uint32_t>(parse_integer(lexer_));
      m_.files_[number] = lexer_.string();
      while (lexer_.accept(',')) lexer_.word();
    } else if (word == ".section") {
      lexer_.word();
      lexer_.expect('{');
      lexer_.body();
    } else if (word == ".pragma") {
      lexer_.string();
      lexer_.expect(';');
    } else if (word == ".loc") {
      throw std::runtime_error("PTX line " + std::to_string(lexer_.line()) + ": .loc outside of a function");
    } else if (word == ".alias") {
      const std::string_view alias = lexer_.word();
      lexer_.expect(',');
      aliases_.emplace_back(alias, lexer_.word());
      lexer_.expect(';');
      const auto it = m_.functions.find(aliases_.back().second);
      if (it != m_.functions.end()) m_.functions[std::string(aliases_.back().first)] = it->second;
    } else if (word == ".visible" || word == ".weak" || word == ".common") {
    } else if (word == ".extern") {
      external_ = true;
      return;
    } else if (word == ".entry" || word == ".func") {
      function(word == ".entry");
    } else if (space_of(word) != Space::kGeneric) {
      variable(space_of(word));
    } else {
      lexer_.fail("`" + std::string(word) + "` is not known at module scope");
    }
    if (word != ".visible" && word != ".weak" && word != ".common") external_ = false;
  }

  void parameters(std::vector<Symbol>& list) {
    lexer_.expect('(');
    while (!lexer_.accept(')')) {
      const std::string_view word = lexer_.word();
      if (word != ".param" && word != ".reg") lexer_.fail(".param expected");
      list.push_back(parse_variable(lexer_, Space::kParam));
      lexer_.accept(',');
    }
  }

  void function(bool entry) {
    auto made = std::make_unique<Function>();
    Function& f = *made;
    f.entry = entry;
    if (lexer_.peek() == '(') parameters(f.returns);
    f.name = lexer_.word();
    if (lexer_.peek() == '(') parameters(f.params);
    size_t offset = 0;
    for (Symbol& p : f.params) {
      const size_t align = std::max<uint32_t>(1, p.align);
      offset = (offset + align - 1) / align * align;
      p.offset = static_cast<int64_t>(offset);
      offset += p.bytes;
    }
    f.param_bytes = offset;
    for (;;) {
      if (lexer_.accept(';')) break;
      if (lexer_.accept('{')) {
        f.body_line = lexer_.line();
        f.body = lexer_.body();
        f.defined = true;
        break;
      }
      const std::string_view word = lexer_.word();
      const auto three = [&](uint32_t (&value)[3]) {
        value[0] = value[1] = value[2] = 1;
        for (int i = 0; i < 3; ++i) {
          value[i] = static_cast<uint32_t>(parse_integer(lexer_));
          if (!lexer_.accept(',')) break;
        }
      };
      if (word == ".maxntid") {
        uint32_t value[3];
        three(value);
        f.max_threads = value[0] * value[1] * value[2];
      } else if (word == ".reqntid") {
        three(f.required);
      } else if (word == ".reqnctapercluster") {
        three(f.cluster);
      } else if (word == ".explicitcluster") {
        f.explicit_cluster = true;
      } else if (word == ".minnctapersm" || word == ".maxnreg" || word == ".maxclusterrank" || word == ".maxnctapersm") {
        parse_integer(lexer_);
      } else if (word == ".pragma") {
        lexer_.string();
        lexer_.accept(';');
      } else if (word != ".noreturn" && word != ".unified" && word != ".attribute" && word != ".blocksareclusters") {
        lexer_.fail("`" + std::string(word) + "` is not known as a directive of a function");
      }
    }
    const auto known = m_.functions.find(f.name);
    if (known != m_.functions.end()) {
      if (f.defined) *known->second = std::move(f);  // its prototype came before; the key is still the same name
      return;
    }
    if (entry) m_.entries_.push_back(f.name);
    m_.functions[f.name] = made.get();
    m_.function_store_.push_back(std::move(made));
  }

  void variable(Space space) {
    do {
      Symbol parsed = parse_variable(lexer_, space);
      parsed.external = external_;
      auto symbol = std::make_unique<Symbol>(std::move(parsed));
      if (space == Space::kGlobal || space == Space::kConst) allocate(*symbol);
      if (lexer_.accept('=')) initialise(*symbol);
      m_.symbols[symbol->name] = symbol.get();
      m_.symbol_store_.push_back(std::move(symbol));
    } while (lexer_.accept(','));
    lexer_.expect(';');
  }

  void allocate(Symbol& symbol) {
    const size_t align = std::max<uint32_t>(16, symbol.align);
    m_.data_.push_back(std::make_unique<unsigned char[]>(symbol.bytes + align));
    auto address = reinterpret_cast<uintptr_t>(m_.data_.back().get());
    symbol.data = m_.data_.back().get() + ((align - address % align) % align);
  }

  void initialise(Symbol& symbol) {
    const size_t element = std::max(1, bits_of(symbol.type) / 8);
    size_t at = 0;
    int depth = 0;
    do {
      while (lexer_.accept('{')) ++depth;
      if (lexer_.peek() != '}') {
        if (at + element > symbol.bytes) lexer_.fail("more initialisers than `" + symbol.name + "` has elements");
        value(symbol, at, element);
        at += element;
      }
      while (depth > 0 && lexer_.accept('}')) --depth;
    } while (depth > 0 && lexer_.accept(','));
  }

  void value(Symbol& symbol, size_t at, size_t element) {
    const bool minus = lexer_.accept('-');
    std::string_view word = lexer_.word();
    Number number;
    uint64_t bits = 0;
    if (parse_number(word, number)) {
      bits = number.bits;
      if (number.is_float && !number.single && symbol.type == Type::kF32)
        bits = std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(bits)));
      if (minus) bits = -bits;
    } else {
      Fix fix{symbol.data + at, element, {}, 0};
      if (word == "generic" && lexer_.accept('(')) {
        word = lexer_.word();
        lexer_.expect(')');
      }
      fix.symbol = word;
      if (lexer_.accept('+')) fix.offset = parse_integer(lexer_);
      fixes_.push_back(fix);
    }
    std::memcpy(symbol.data + at, &bits, std::min<size_t>(8, element));
  }

  ModuleImpl& m_;
  Lexer lexer_;
  bool external_ = false;
  std::vector<Fix> fixes_;
  std::vector<std::pair<std::string_view, std::string_view>> aliases_;
};

ModuleImpl::ModuleImpl(std::string_view ptx, std::string_view name) : text_(ptx), name_(name) {
  ModuleParser(*this).parse();
}

ModuleImpl::~ModuleImpl() = default;

std::shared_ptr<const Module> Module::load(std::string_view ptx, std::string_view name) {
  return std::make_shared<ModuleImpl>(ptx, name);
}

std::vector<std::string> ModuleImpl::kernels() const { return entries_; }

const Function& ModuleImpl::entry(const std::string& kernel) const {
  const auto it = functions.find(kernel);
  if (it == functions.end() || !it->second->entry)
    throw std::runtime_error("no kernel `" + kernel + "` in module " + name_);
  return *it->second;
}

size_t ModuleImpl::param_bytes(const std::string& kernel) const { return entry(kernel).param_bytes; }

std::vector<std::array<size_t, 2>> ModuleImpl::params(const std::string& kernel) const {
  std::vector<std::array<size_t, 2>> list;
  for (const Symbol& p : entry(kernel).params)
    list.push_back({static_cast<size_t>(p.offset), static_cast<size_t>(p.bytes)});
  return list;
}

uint32_t ModuleImpl::static_shared(const std::string& kernel) const { return program(kernel)->static_shared; }

void* ModuleImpl::symbol(const std::string& name, size_t* bytes) const {
  const auto it = symbols.find(name);
  if (it == symbols.end() || it->second->data == nullptr) return nullptr;
  if (bytes != nullptr) *bytes = it->second->bytes;
  return it->second->data;
}

std::shared_ptr<const Program> ModuleImpl::program(const std::string& kernel) const {
  const Function& function = entry(kernel);
  std::lock_guard lock(mutex_);
  auto& known = programs_[kernel];
  if (known == nullptr) known = compile(*this, function);
  return known;
}

std::string ModuleImpl::file(uint32_t number) const {
  const auto it = files_.find(number);
  return it == files_.end() ? "file " + std::to_string(number) : it->second;
}

std::string describe_location(const ModuleImpl& module, const Program& program, const Inst& inst) {
  if (inst.loc == 0 || program.locs[inst.loc].line == 0)
    return "PTX line " + std::to_string(inst.line) + " of " + module.name();
  std::string text;
  for (uint32_t at = inst.loc, depth = 0; at != 0 && depth < 16; at = program.locs[at].inlined_at, ++depth) {
    if (depth > 0) text += " < ";
    text += module.file(program.locs[at].file) + ":" + std::to_string(program.locs[at].line);
  }
  return text;
}

}  // namespace ptxsim
