// A C interface for ctypes; core.py is its other side.
#include <cstring>
#include <string>

#include "ptxsim.h"

using namespace ptxsim;

namespace {

char* copy(const std::string& text) {
  char* out = static_cast<char*>(std::malloc(text.size() + 1));
  std::memcpy(out, text.c_str(), text.size() + 1);
  return out;
}

using Handle = std::shared_ptr<const Module>;

}  // namespace

extern "C" {

struct PtxsimLaunch {
  const char* kernel;
  uint32_t grid[3], block[3], cluster[3];
  uint32_t dynamic_shared;
  const unsigned char* params;
  uint64_t param_bytes;
  uint64_t seed;
  int32_t check, async;
  int64_t max_instructions;
  int32_t resident_blocks, cooperative;
  const char* arch;
};

struct PtxsimResult {
  int32_t fault;
  char* message;
  char* printed;
  int64_t counters[6];
};

void ptxsim_free_text(char* text) { std::free(text); }

void* ptxsim_load(const char* text, uint64_t size, const char* name, char** error) {
  try {
    return new Handle(Module::load({text, static_cast<size_t>(size)}, name));
  } catch (const std::exception& e) {
    *error = copy(e.what());
    return nullptr;
  }
}
void ptxsim_unload(void* module) { delete static_cast<Handle*>(module); }

char* ptxsim_kernels(void* module) {
  std::string text;
  for (const std::string& name : (*static_cast<Handle*>(module))->kernels()) text += name + "\n";
  return copy(text);
}
// "offset size" lines, then static shared memory; or an error that starts with '!'.
char* ptxsim_describe(void* module, const char* kernel) {
  try {
    const Module& m = **static_cast<Handle*>(module);
    std::string text;
    for (const auto& [offset, size] : m.params(kernel)) text += std::to_string(offset) + " " + std::to_string(size) + "\n";
    return copy(text + std::to_string(m.static_shared(kernel)));
  } catch (const std::exception& e) {
    return copy(std::string("!") + e.what());
  }
}
void* ptxsim_symbol(void* module, const char* name, uint64_t* bytes) {
  size_t size = 0;
  void* data = (*static_cast<Handle*>(module))->symbol(name, &size);
  *bytes = size;
  return data;
}

void ptxsim_add(const void* begin, uint64_t bytes, const char* name) { Memory::global().add(begin, bytes, name); }
void ptxsim_remove(const void* begin) { Memory::global().remove(begin); }

void ptxsim_launch(void* module, const PtxsimLaunch* a, PtxsimResult* out) {
  Launch l;
  l.kernel = a->kernel;
  l.grid = {a->grid[0], a->grid[1], a->grid[2]};
  l.block = {a->block[0], a->block[1], a->block[2]};
  l.cluster = {a->cluster[0], a->cluster[1], a->cluster[2]};
  l.dynamic_shared = a->dynamic_shared;
  l.params.assign(a->params, a->params + a->param_bytes);
  Options o;
  o.seed = a->seed;
  o.check = a->check != 0;
  o.async = static_cast<Async>(a->async);
  o.max_instructions = a->max_instructions;
  o.resident_blocks = a->resident_blocks;
  o.cooperative = a->cooperative != 0;
  o.arch = a->arch;
  const Result r = launch(**static_cast<Handle*>(module), l, o);
  out->fault = static_cast<int32_t>(r.fault);
  out->message = copy(r.message);
  out->printed = copy(r.printed);
  const Counters& c = r.counters;
  const int64_t counters[6] = {c.warp_instructions, c.global_requests, c.global_sectors,
                               c.shared_requests,   c.shared_wavefronts, c.mma_flops};
  std::memcpy(out->counters, counters, sizeof counters);
}

char* ptxsim_encode_tensor_map(unsigned char* map, int element_bytes, int rank, const void* base, const uint64_t* sizes,
                               const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                               int interleave, int swizzle, int nan_fill) {
  TensorMap m;
  const std::string error = encode_tensor_map(m, element_bytes, rank, base, sizes, strides, box, element_strides,
                                              interleave, static_cast<Swizzle>(swizzle), nan_fill != 0);
  std::memcpy(map, m.opaque, sizeof m.opaque);
  return copy(error);
}

}  // extern "C"
