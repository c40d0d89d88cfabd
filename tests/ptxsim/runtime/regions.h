// The memory of the emulated GPU: what kernels may touch, with reference counts, and questions that the host side asks.
#pragma once

#include <cstddef>
#include <string>

namespace ptxsim {

// Calls with the same beginning are counted; the longest one stands until the last is removed.
void add_region(const void* begin, size_t bytes, const std::string& name);
void remove_region(const void* begin);

// Empty if the whole range lies in one region, else a sentence.
std::string outside(const void* begin, size_t bytes);

}  // namespace ptxsim
