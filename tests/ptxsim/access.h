// From addresses of lanes to host pointers: bounds, alignment, counters, and the checker's view of every access.
#pragma once

#include "compiler.h"
#include "machine.h"

namespace ptxsim {

enum class Access : uint8_t { kRead, kWrite, kStrongRead, kStrongWrite, kAtomic };

inline bool writes(Access access) { return access != Access::kRead && access != Access::kStrongRead; }
inline bool strong(Access access) { return access >= Access::kStrongRead; }

// Fills pointers for the lanes of the mask (the others get that of one of these). `values`, of writes: `bytes` a lane,
// to tell stores of the same value apart; null if unknown.
void resolve(Warp& w, const Inst& in, Space space, const uint64_t* addresses, uint32_t mask, uint32_t bytes,
             Access access, unsigned char** pointers, const unsigned char* values);

// The addresses of the lanes from the address operand number `operand` of the instruction.
void gather_addresses(const Warp& w, const Inst& in, int operand, uint64_t* addresses);

// One generic address of one lane, for reading, without the race check.
unsigned char* host_pointer(Warp& w, const Inst& in, uint64_t address, uint32_t bytes, int lane);

// The block that a shared address belongs to; `address` becomes one of that block's own window.
Block& shared_owner(const Warp& w, const Inst& in, uint32_t& address, int lane);
unsigned char* shared_pointer(Warp& w, const Inst& in, Block& owner, uint32_t address, uint32_t bytes, uint32_t lanes);
std::string shared_name(const Warp& w, uint32_t address);

void count_global(Machine& m, const uint64_t* addresses, uint32_t mask, uint32_t bytes);
void count_shared(Machine& m, const uint64_t* addresses, uint32_t mask, uint32_t bytes);

}  // namespace ptxsim
