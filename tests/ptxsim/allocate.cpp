#include "allocate.h"

#include <algorithm>

namespace ptxsim {

void allocate_rows(Compiler& compiler) {
  Program& program = *compiler.program;
  std::vector<Offset> place(compiler.registers.size());
  constexpr uint32_t kBytes[] = {4, 128, 256, 512};
  uint32_t end = 0;
  for (const RowClass c : {RowClass::k128, RowClass::k64, RowClass::k32, RowClass::kPred}) {
    for (size_t r = 0; r < place.size(); ++r) {
      const auto& reg = compiler.registers[r];
      if (reg.row_class != c) continue;
      place[r] = end;
      if (reg.callee >= 0 && program.callees[static_cast<size_t>(reg.callee)].recursive && c != RowClass::k128)
        program.callees[static_cast<size_t>(reg.callee)].rows.emplace_back(
            end, static_cast<uint8_t>(c == RowClass::kPred ? 0 : c == RowClass::k32 ? 4 : 8));
      end += kBytes[static_cast<int>(c)];
    }
  }
  program.register_bytes = (end + 63) / 64 * 64;
  const auto patch = [&](Offset& o) {
    if (o != kNoOffset && !(o & 1)) o = place[o >> 1];
  };
  for (Inst& in : program.code) {
    patch(in.guard);
    for (size_t i = 0; i < std::min<size_t>(in.count, kInlineOperands); ++i) patch(in.o[i]);
    if (in.list != nullptr)
      for (size_t i = 0; i < in.count; ++i) patch(const_cast<Offset*>(in.list)[i]);
  }
  for (auto& special : program.specials) patch(special.row);
}

}  // namespace ptxsim
