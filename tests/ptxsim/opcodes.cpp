#include "opcodes.h"

#include <cstdlib>

namespace ptxsim {

bool host_has_avx2() {
  // PTXSIM_ISA=base shows that results do not depend on the host.
  static const char* const wanted = std::getenv("PTXSIM_ISA");
  static const bool has = !(wanted != nullptr && std::string_view(wanted) == "base") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                          __builtin_cpu_supports("bmi2");
  return has;
}

Resolver find_resolver(std::string_view base) {
  static const OpcodeTable table = [] {
    OpcodeTable t;
    if (host_has_avx2()) {
      isa_avx2::add_integer(t), isa_avx2::add_float(t), isa_avx2::add_convert(t), isa_avx2::add_compare(t);
      isa_avx2::add_mma(t);
    } else {
      isa_base::add_integer(t), isa_base::add_float(t), isa_base::add_convert(t), isa_base::add_compare(t);
      isa_base::add_mma(t);
    }
    add_move(t), add_control(t), add_memory(t), add_atomic(t), add_warp(t), add_matrix(t), add_barrier(t);
    add_async(t), add_mbarrier(t), add_bulk(t), add_wgmma(t);
    return t;
  }();
  const auto it = table.find(base);
  return it == table.end() ? nullptr : it->second;
}

}  // namespace ptxsim
