#pragma once

#include "machine.h"

namespace ptxsim {

// A register that a wgmma in flight will write is copied: the copy will be written as well.
void move_pending(Warp& w, Offset from, Offset to);

}  // namespace ptxsim
