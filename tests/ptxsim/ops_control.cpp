// Branches, calls, exit, trap, and what the host does for device code: vprintf, __assertfail, malloc.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "allocate.h"
#include "checker.h"
#include "compiler_impl.h"
#include "machine.h"
#include "opcodes.h"

namespace ptxsim {
namespace {

void branch(Warp& w, const Inst& in) {
  if (w.mask == w.group) {
    if (in.target < w.pc && w.group != w.live && ++w.lone > kMostLoops) w.reschedule = w.yield = true;  // only loops starve others
    w.pc = in.target;
    return;
  }
  const uint32_t taken = w.mask;
  for (uint32_t m = taken; m != 0; m &= m - 1) w.lane_pc[__builtin_ctz(m)] = in.target;
  w.group &= ~taken;
  w.reschedule = true;
}

void branch_indexed(Warp& w, const Inst& in) {
  const auto& table = w.machine->program->jump_tables[static_cast<size_t>(in.imm)];
  const uint32_t* index = w.row<uint32_t>(in.o[0]);
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    if (index[lane] >= table.size())
      fault(w, in, Fault::kOutOfBounds, "index " + std::to_string(index[lane]) + " of a table of " +
            std::to_string(table.size()) + " branch targets", m & -m);
    w.lane_pc[lane] = table[index[lane]];
  }
  w.group &= ~w.mask;
  w.reschedule = true;
}

void exit_(Warp& w, const Inst& in) { exit_lanes(w, in, w.mask); }

void trap(Warp& w, const Inst& in) { fault(w, in, Fault::kTrap, "trap", w.mask); }

void nothing(Warp&, const Inst&) {}

void nanosleep(Warp& w, const Inst&) { w.yield = true; }

// ---- calls ----

unsigned char* frame_bytes(Warp& w, int lane, int64_t offset) {
  return w.local[lane].data() + w.frame[lane] + static_cast<uint32_t>(offset);
}

// A C string in device memory.
std::string device_string(Warp& w, const Inst& in, uint64_t address, int lane) {
  std::string text;
  for (; text.size() < 65536; ++address) {
    const char c = static_cast<char>(*host_pointer(w, in, address, 1, lane));
    if (c == 0) return text;
    text += c;
  }
  return text;
}

void print(Warp& w, const Inst& in, uint64_t format_address, uint64_t arguments, int lane) {
  const std::string format = device_string(w, in, format_address, lane);
  std::string& out = w.machine->printed;
  if (out.size() > (size_t{64} << 20)) return;
  uint64_t at = arguments;
  const auto next = [&](uint32_t bytes) {
    at = (at + bytes - 1) / bytes * bytes;
    uint64_t value = 0;
    std::memcpy(&value, host_pointer(w, in, at, bytes, lane), bytes);
    at += bytes;
    return value;
  };
  for (size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    std::string spec = "%";
    int longs = 0;
    for (++i; i < format.size(); ++i) {
      const char c = format[i];
      if (c == '*') {
        spec += std::to_string(static_cast<int>(next(4)));
      } else if (c == 'l' || c == 'z' || c == 'j' || c == 't') {
        longs += c == 'l' ? 1 : 2;
      } else if (c == 'h') {
        continue;
      } else {
        spec += c;
        if (std::strchr("-+ #0123456789.", c) == nullptr) break;
      }
    }
    char text[512];
    switch (spec.back()) {
      case '%': out += '%'; continue;
      case 'd':
      case 'i':
        spec.insert(spec.size() - 1, "ll");
        std::snprintf(text, sizeof text, spec.c_str(),
                      longs ? static_cast<long long>(next(8)) : static_cast<long long>(static_cast<int32_t>(next(4))));
        break;
      case 'u':
      case 'x':
      case 'X':
      case 'o':
        spec.insert(spec.size() - 1, "ll");
        std::snprintf(text, sizeof text, spec.c_str(), static_cast<unsigned long long>(longs ? next(8) : next(4)));
        break;
      case 'c': std::snprintf(text, sizeof text, spec.c_str(), static_cast<int>(next(4))); break;
      case 'p': std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(next(8))); break;
      case 's': out += device_string(w, in, next(8), lane); continue;
      case 'e': case 'E': case 'f': case 'F': case 'g': case 'G': case 'a': case 'A': {
        const uint64_t bits = next(8);
        double value;
        std::memcpy(&value, &bits, 8);
        std::snprintf(text, sizeof text, spec.c_str(), value);
        break;
      }
      default: out += spec; continue;
    }
    out += text;
  }
}

void call_builtin(Warp& w, const Inst& in, const Program::CallSite& site) {
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    uint64_t a[5] = {};
    for (size_t i = 0; i < std::min<size_t>(5, site.arguments.size()); ++i)
      std::memcpy(&a[i], frame_bytes(w, lane, site.arguments[i]), std::min<size_t>(8, site.argument_bytes[i]));
    uint64_t result = 0;
    if (site.builtin == 1) {
      print(w, in, a[0], a[1], lane);
    } else if (site.builtin == 2) {
      fault(w, in, Fault::kTrap, "assertion `" + device_string(w, in, a[0], lane) + "` failed in " +
            device_string(w, in, a[1], lane) + ":" + std::to_string(static_cast<uint32_t>(a[2])), m & -m);
    } else if (site.builtin == 3) {
      fault(w, in, Fault::kUnknownInstruction, "malloc in a kernel is not implemented", m & -m);
    }
    for (size_t i = 0; i < site.results.size(); ++i) {
      std::memcpy(frame_bytes(w, lane, site.results[i]), &result, std::min<size_t>(8, site.result_bytes[i]));
      mark_local_known(w, lane, w.frame[lane] + static_cast<uint32_t>(site.results[i]), site.result_bytes[i]);
    }
  }
}

uint64_t get_register(const Warp& w, const std::pair<Offset, uint8_t>& row, int lane) {
  if (row.second == 0) return (w.pred(row.first) >> lane) & 1;
  if (row.second == 4) return w.row<uint32_t>(row.first)[lane];
  return w.row<uint64_t>(row.first)[lane];
}
void put_register(Warp& w, const std::pair<Offset, uint8_t>& row, int lane, uint64_t value) {
  if (row.second == 0) {
    uint32_t& p = *w.row<uint32_t>(row.first);
    p = (p & ~(1u << lane)) | static_cast<uint32_t>(value << lane);
  } else if (row.second == 4) {
    w.row<uint32_t>(row.first)[lane] = static_cast<uint32_t>(value);
  } else {
    w.row<uint64_t>(row.first)[lane] = value;
  }
}

void call(Warp& w, const Inst& in) {
  const Program& program = *w.machine->program;
  const auto& site = program.calls[static_cast<size_t>(in.imm)];
  if (site.builtin != 0) return call_builtin(w, in, site);
  const bool all = w.mask == w.group;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    int index = site.callee;
    if (index < 0) {
      const uint64_t address = w.row<uint64_t>(in.o[0])[lane];
      for (size_t i = 0; i < program.callees.size(); ++i)
        if (function_address(program.callees[i].function) == address) index = static_cast<int>(i);
      if (index < 0) fault(w, in, Fault::kOutOfBounds, "call of address " + hex(address) + ", which is no function", m & -m);
    }
    const auto& callee = program.callees[static_cast<size_t>(index)];
    auto& local = w.local[lane];
    const size_t base = (local.size() + 15) / 16 * 16;
    if (base + callee.frame_bytes > kLocalLimit || w.calls[lane].size() >= kMostCalls)
      fault(w, in, Fault::kOutOfBounds, "stack overflow: " + std::to_string(w.calls[lane].size()) + " calls deep, " +
            std::to_string(base + callee.frame_bytes) + " bytes", m & -m);
    CallFrame frame{w.pc, w.frame[lane], &site, index, {}};
    if (callee.recursive)
      for (const auto& row : callee.rows) frame.saved.push_back(get_register(w, row, lane));
    local.resize(base + callee.frame_bytes, kPoison);
    if (w.machine->checker != nullptr) w.local_known[lane].resize(local.size(), 0);
    const auto& params = callee.function->params;
    if (params.size() != site.arguments.size())
      fault(w, in, Fault::kBadLaunch, "call of `" + callee.function->name + "` with " +
            std::to_string(site.arguments.size()) + " arguments", m & -m);
    uint32_t offset = 0;
    for (size_t i = 0; i < params.size(); ++i) {  // laid out as Compiler::add_frame_variable does
      const uint32_t align = std::max<uint32_t>(4, params[i].align);
      offset = (offset + align - 1) / align * align;
      const size_t bytes = std::min<size_t>(params[i].bytes, site.argument_bytes[i]);
      std::memcpy(local.data() + base + offset, frame_bytes(w, lane, site.arguments[i]), bytes);
      mark_local_known(w, lane, static_cast<uint32_t>(base) + offset, static_cast<uint32_t>(bytes));
      offset += static_cast<uint32_t>(params[i].bytes);
    }
    w.calls[lane].push_back(std::move(frame));
    w.frame[lane] = static_cast<uint32_t>(base);
    w.lane_pc[lane] = callee.pc;
  }
  if (all && site.callee >= 0) {
    w.pc = program.callees[static_cast<size_t>(site.callee)].pc;
    w.reschedule = w.next_pc != kNever;
  } else {
    w.group &= ~w.mask;
    w.reschedule = true;
  }
}

void ret(Warp& w, const Inst& in) {
  uint32_t leaving = 0;
  for (uint32_t m = w.mask; m != 0; m &= m - 1) {
    const int lane = __builtin_ctz(m);
    if (w.calls[lane].empty()) {
      leaving |= m & -m;
      continue;
    }
    CallFrame frame = std::move(w.calls[lane].back());
    w.calls[lane].pop_back();
    const auto& callee = w.machine->program->callees[static_cast<size_t>(frame.callee)];
    auto& local = w.local[lane];
    uint32_t offset = 0;
    for (const Symbol& p : callee.function->params) {
      const uint32_t align = std::max<uint32_t>(4, p.align);
      offset = (offset + align - 1) / align * align + static_cast<uint32_t>(p.bytes);
    }
    for (size_t i = 0; i < callee.function->returns.size() && i < frame.site->results.size(); ++i) {
      const Symbol& r = callee.function->returns[i];
      const uint32_t align = std::max<uint32_t>(4, r.align);
      offset = (offset + align - 1) / align * align;
      const size_t bytes = std::min<size_t>(r.bytes, frame.site->result_bytes[i]);
      const uint32_t target = frame.frame + static_cast<uint32_t>(frame.site->results[i]);
      std::memcpy(local.data() + target, local.data() + w.frame[lane] + offset, bytes);
      mark_local_known(w, lane, target, static_cast<uint32_t>(bytes));
      offset += static_cast<uint32_t>(r.bytes);
    }
    if (!frame.saved.empty())
      for (size_t i = 0; i < callee.rows.size(); ++i) put_register(w, callee.rows[i], lane, frame.saved[i]);
    local.resize(w.frame[lane]);
    if (w.machine->checker != nullptr) w.local_known[lane].resize(local.size());
    w.frame[lane] = frame.frame;
    w.lane_pc[lane] = frame.return_pc;
  }
  w.group &= ~(w.mask & ~leaving);
  w.reschedule = true;
  if (leaving != 0) exit_lanes(w, in, leaving);
}

// ---- resolvers ----

void bra(Build& b) {
  b.take("uni");
  b.operands(1, 1);
  b.compiler().branch_to(b.in, b.ops[0].name);
  b.in.fn = branch;
}

void brx(Build& b) {
  b.take("idx"), b.take("uni");
  b.operands(2, 2);
  b.src(0, Type::kU32);
  b.in.imm = b.compiler().jump_table(b.ops[1].name, b.in);
  b.in.fn = branch_indexed;
}

void call_resolver(Build& b) {
  b.take("uni");
  Program::CallSite site;
  size_t at = 0;
  const auto slots = [&](const Operand& group, std::vector<int64_t>& offsets, std::vector<uint32_t>& bytes) {
    for (const Operand& part : group.parts) {
      if (part.kind != Operand::Kind::kSymbol || part.symbol == nullptr || part.symbol->space != Space::kLocal)
        b.fail("arguments in registers are not implemented");
      offsets.push_back(part.symbol->offset);
      bytes.push_back(static_cast<uint32_t>(part.symbol->bytes));
    }
  };
  if (at < b.ops.size() && b.ops[at].kind == Operand::Kind::kGroup) slots(b.ops[at++], site.results, site.result_bytes);
  if (at >= b.ops.size()) b.fail("it has no target");
  const Operand& target = b.ops[at++];
  if (at < b.ops.size() && b.ops[at].kind == Operand::Kind::kGroup) slots(b.ops[at++], site.arguments, site.argument_bytes);
  if (target.kind == Operand::Kind::kReg) {
    b.src(target, Type::kU64);
    for (const auto& [name, function] : b.compiler().module().functions)
      if (!function->entry && function->defined) b.compiler().callee(function);
  } else if (target.function == nullptr) {
    b.fail("its target is not known");
  } else if (target.function->name == "vprintf") {
    site.builtin = 1;
  } else if (target.function->name == "__assertfail") {
    site.builtin = 2;
  } else if (target.function->name == "malloc" || target.function->name == "free") {
    site.builtin = target.function->name == "malloc" ? 3 : 4;
  } else {
    site.callee = b.compiler().callee(target.function);
  }
  b.in.imm = static_cast<int64_t>(b.program().calls.size());
  b.program().calls.push_back(std::move(site));
  b.in.fn = call;
}

void ret_resolver(Build& b) {
  b.take("uni");
  b.in.fn = ret;
}
void exit_resolver(Build& b) { b.in.fn = exit_; }
void trap_resolver(Build& b) { b.in.fn = trap; }
void brkpt_resolver(Build& b) { b.in.fn = nothing; }
void nanosleep_resolver(Build& b) {
  b.take_type();
  b.in.fn = nanosleep;
}
// Programmatic dependent launch: launches run one after the other here, so there is nothing to wait for.
void griddepcontrol_resolver(Build& b) {
  b.take("launch_dependents"), b.take("wait");
  b.in.fn = nothing;
}
// A hint about registers: its number is checked by the assembler only.
void setmaxnreg_resolver(Build& b) {
  b.take("inc"), b.take("dec"), b.take("sync"), b.take("aligned"), b.take_type();
  b.in.fn = [](Warp& w, const Inst& in) { aligned_here(w, in, false); };
}

}  // namespace

bool is_call(const Inst& inst) { return inst.fn == call; }
bool is_branch(const Inst& inst) { return inst.fn == branch; }
bool is_indexed_branch(const Inst& inst) { return inst.fn == branch_indexed; }
bool ends_flow(const Inst& inst) { return inst.fn == exit_ || inst.fn == ret || inst.fn == trap; }

void add_control(OpcodeTable& table) {
  table["bra"] = bra;
  table["brx"] = brx;
  table["call"] = call_resolver;
  table["ret"] = ret_resolver;
  table["exit"] = exit_resolver;
  table["trap"] = trap_resolver;
  table["brkpt"] = brkpt_resolver;
  table["nanosleep"] = nanosleep_resolver;
  table["griddepcontrol"] = griddepcontrol_resolver;
  table["setmaxnreg"] = setmaxnreg_resolver;
}

}  // namespace ptxsim
