// What the parser makes of PTX: a module with its symbols, and per kernel a program of decoded instructions.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "ptxsim.h"
#include "types.h"

namespace ptxsim {

struct Warp;
struct Inst;
using Handler = void (*)(Warp&, const Inst&);

// Where a row is: byte offset into the registers of the warp or, with bit 0 set, into the constants of the program.
using Offset = uint32_t;
constexpr Offset kNoOffset = 0xfffffffe;

constexpr int kInlineOperands = 6;

struct Inst {
  Handler fn = nullptr;
  Handler inner = nullptr;  // what a decorating fn (rounding, saturation) calls
  Offset guard = kNoOffset;
  bool guard_not = false;
  bool aligned = false;     // every live lane of the warp must execute it together
  uint8_t defs = 0;         // how many leading operands are written ...
  bool inout = false;       // ... and also read
  Offset o[kInlineOperands] = {};
  const Offset* list = nullptr;  // all operands, if there are more than fit inline
  uint16_t count = 0;
  // Meaning by opcode:
  uint8_t space = 0, size = 0, vec = 1, kind = 0, sem = 0, scope = 0, width = 0, flags = 0;
  int64_t imm = 0;
  int64_t imm2 = 0;
  void (*product)(const unsigned char*, const unsigned char*, int, float*) = nullptr;  // of wgmma
  uint32_t target = 0;      // of a branch or call: an instruction
  uint32_t line = 0;        // of the PTX
  uint32_t loc = 0;         // index into Program::locs
  std::string_view opcode;

  const Offset* operands() const { return list ? list : o; }
};

struct Loc {
  uint32_t file = 0, line = 0, column = 0;
  uint32_t inlined_at = 0;  // index of another Loc, 0: none
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kSharedCluster, kLocal, kConst, kParam, kReg };

struct Symbol {
  std::string name;
  Space space = Space::kReg;
  Type type = Type::kNone;
  uint64_t bytes = 0;
  uint32_t align = 1;
  int64_t offset = 0;   // in the shared window, the frame, or the parameter list
  bool external = false;
  unsigned char* data = nullptr;  // of .global and .const
  int reg = -1;         // first register
  int regs = 0;         // number of a range `%r<n>`; 0: a single one
};

struct Function {
  std::string name;
  bool entry = false;
  bool defined = false;
  std::vector<Symbol> params, returns;
  size_t param_bytes = 0;
  uint32_t max_threads = 0;      // .maxntid
  uint32_t required[3] = {};     // .reqntid
  uint32_t cluster[3] = {};      // .reqnctapercluster
  bool explicit_cluster = false;
  std::string_view body;         // between the braces
  uint32_t body_line = 0;
};

enum class Special : uint8_t {
  kTidX, kTidY, kTidZ, kNtidX, kNtidY, kNtidZ, kCtaidX, kCtaidY, kCtaidZ, kNctaidX, kNctaidY, kNctaidZ,
  kLaneId, kWarpId, kNwarpId, kSmId, kNsmId, kGridId, kClock, kClock64, kClockHi, kGlobalTimer, kGlobalTimerLo,
  kGlobalTimerHi, kLanemaskEq, kLanemaskLe, kLanemaskLt, kLanemaskGe, kLanemaskGt,
  kClusterIdX, kClusterIdY, kClusterIdZ, kNclusterIdX, kNclusterIdY, kNclusterIdZ,
  kClusterCtaidX, kClusterCtaidY, kClusterCtaidZ, kClusterNctaidX, kClusterNctaidY, kClusterNctaidZ,
  kClusterCtarank, kClusterNctarank, kIsExplicitCluster, kDynamicSmem, kTotalSmem, kAggrSmem,
  kEnvreg0, kEnvreg31 = kEnvreg0 + 31, kCount,
};

struct Program {
  std::string name;
  std::vector<Inst> code;
  std::vector<std::unique_ptr<Offset[]>> lists;
  std::vector<Loc> locs;
  std::vector<unsigned char> constant_bytes;  // over-allocated: `constants` is aligned
  unsigned char* constants = nullptr;
  uint32_t register_bytes = 0;
  struct SpecialRow {
    Special special;
    Offset row;
    bool wide;
  };
  std::vector<SpecialRow> specials;
  uint32_t static_shared = 0;    // bytes from kSharedBase
  uint32_t dynamic_offset = 0;   // where extern shared memory starts, from kSharedBase
  std::vector<Symbol> shared;    // for messages
  uint32_t frame_bytes = 0;      // local memory of the entry's frame
  const Function* entry = nullptr;
  struct Callee {
    const Function* function;
    uint32_t pc = 0, frame_bytes = 0;
    bool recursive = false;
    std::vector<std::pair<Offset, uint8_t>> rows;  // its registers, saved around recursive calls; lanes' bytes (0: pred)
  };
  std::vector<Callee> callees;
  std::vector<std::vector<uint32_t>> jump_tables;
  struct CallSite {
    int callee = -1;  // index; -1: through a register
    int builtin = 0;  // 1 vprintf, 2 __assertfail, 3 malloc, 4 free
    std::vector<int64_t> arguments, results;  // frame offsets in the caller
    std::vector<uint32_t> argument_bytes, result_bytes;
  };
  std::vector<CallSite> calls;
  bool hopper = false;
};

// An instruction that cannot be executed; launching its kernel reports it.
struct UnknownInstruction : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class ModuleImpl : public Module {
 public:
  ModuleImpl(std::string_view ptx, std::string_view name);
  ~ModuleImpl() override;
  std::vector<std::string> kernels() const override;
  size_t param_bytes(const std::string& kernel) const override;
  std::vector<std::array<size_t, 2>> params(const std::string& kernel) const override;
  uint32_t static_shared(const std::string& kernel) const override;
  void* symbol(const std::string& name, size_t* bytes) const override;

  const Function& entry(const std::string& kernel) const;  // throws std::runtime_error
  // Compiled on first use. Throws UnknownInstruction or std::runtime_error.
  std::shared_ptr<const Program> program(const std::string& kernel) const;
  std::string file(uint32_t number) const;
  const std::string& name() const { return name_; }
  int version() const { return version_; }  // of the PTX, times ten
  bool uses_wgmma() const { return text_.find("wgmma.mma_async") != std::string::npos; }

  std::map<std::string, Symbol*, std::less<>> symbols;       // of module scope
  std::map<std::string, Function*, std::less<>> functions;

 private:
  friend class ModuleParser;
  std::string text_, name_;
  int version_ = 0;
  std::vector<std::unique_ptr<Symbol>> symbol_store_;
  std::vector<std::unique_ptr<Function>> function_store_;
  std::vector<std::string> entries_;
  std::vector<std::unique_ptr<unsigned char[]>> data_;
  std::map<uint32_t, std::string> files_;
  mutable std::mutex mutex_;
  mutable std::map<std::string, std::shared_ptr<const Program>> programs_;
};

// "file:line < file:line" of an instruction, innermost first; the line of the PTX if there is no -lineinfo.
std::string describe_location(const ModuleImpl& module, const Program& program, const Inst& inst);

}  // namespace ptxsim
