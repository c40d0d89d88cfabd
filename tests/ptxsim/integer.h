// What the integer instructions share. Compiled once per instruction set, hence the namespace.
#pragma once

#include <type_traits>

#include "lanes.h"
#include "opcodes.h"

namespace ptxsim::PTXSIM_ISA {

template <class V>
using U = std::make_unsigned_t<V>;
template <class V>
using Wide = std::conditional_t<sizeof(V) <= 4, std::conditional_t<std::is_signed_v<V>, int64_t, uint64_t>,
                                std::conditional_t<std::is_signed_v<V>, __int128, unsigned __int128>>;

template <class V>
inline V wrap(U<V> value) {
  return static_cast<V>(value);
}

inline void three(Build& b, Type type) {
  b.operands(3, 3);
  b.dst(0, type), b.src(1, type), b.src(2, type);
}

}  // namespace ptxsim::PTXSIM_ISA
