// torch's CPU allocator while tensors are made for the emulated GPU.
#pragma once

namespace ptxsim {

// Replaces torch's CPU allocator, once; tensors are as before until a thread switches tracking on.
void install_allocator();

// From now on allocations of this thread are regions of the GPU's memory, exact to the byte, and begin as kPoison.
// Returns the state before.
bool track(bool on);

// Whether this is the beginning of a tracked allocation.
bool is_tracked(const void* begin);

}  // namespace ptxsim
