#include "device.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "regions.h"

namespace ptxsim {
namespace {

// --- PTX files: <directory of this module>/ptx/<architecture>/*.ptx, read when the first kernel of one is launched ---

struct File {
  std::filesystem::path path;
  std::string text;
  std::set<std::string> entries;
  std::shared_ptr<const Module> module;
};

std::recursive_mutex mutex;

std::string read(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// The names after `.entry`, without parsing the rest.
std::set<std::string> entries_of(const std::string& text) {
  static constexpr std::string_view kWord = ".entry ";
  std::set<std::string> names;
  for (size_t at = text.find(kWord); at != std::string::npos; at = text.find(kWord, at)) {
    at += kWord.size();
    names.insert(text.substr(at, text.find('(', at) - at));
  }
  return names;
}

std::filesystem::path directory() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&directory), &info);
  return std::filesystem::path(info.dli_fname).parent_path() / "ptx" / device().options.arch;
}

std::vector<File>& files() {
  static auto* by_architecture = new std::map<std::string, std::vector<File>>;
  const auto [found, added] = by_architecture->try_emplace(device().options.arch);
  if (added && std::filesystem::is_directory(directory())) {
    for (const auto& item : std::filesystem::directory_iterator(directory())) {
      if (item.path().extension() != ".ptx") continue;
      File file{item.path(), read(item.path()), {}, nullptr};
      file.entries = entries_of(file.text);
      found->second.push_back(std::move(file));
    }
  }
  return found->second;
}

const Module& load(File& file) {
  if (file.module == nullptr) file.module = Module::load(file.text, file.path.filename().string());
  return *file.module;
}

// --- what host code registered ---

struct Registered {
  std::map<const void*, std::string> kernels, variables;
  std::map<std::pair<std::string, const void*>, Kernel> by_architecture;
};

// Never destroyed: static objects of other files register while this module is loaded.
Registered& registered() {
  static auto* object = new Registered;
  return *object;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  return result;
}

// --- checks ---

bool within(Dim3 size, uint32_t x, uint32_t y, uint32_t z) {
  return size.x >= 1 && size.y >= 1 && size.z >= 1 && size.x <= x && size.y <= y && size.z <= z;
}

std::string text_of(Dim3 size) {
  std::ostringstream text;
  text << "(" << size.x << ", " << size.y << ", " << size.z << ")";
  return text.str();
}

std::string check_launch(const Kernel& kernel, const Launch& launch, bool cooperative, uint32_t static_shared) {
  if (!within(launch.grid, 0x7fffffff, 65535, 65535)) {
    return "invalid configuration argument: grid " + text_of(launch.grid);
  }
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (!within(launch.block, 1024, 1024, 64) || threads > 1024) {
    return "invalid configuration argument: block " + text_of(launch.block);
  }
  const Dim3 cluster = launch.cluster;
  const uint32_t size = cluster.x * cluster.y * cluster.z;
  if (size == 0 || launch.grid.x % cluster.x != 0 || launch.grid.y % cluster.y != 0 || launch.grid.z % cluster.z != 0 ||
      size > (kernel.any_cluster ? 16 : 8) || (size > 1 && limits().major < 9)) {
    return "invalid cluster size: " + text_of(cluster) + " for grid " + text_of(launch.grid) + " on " +
           device().options.arch;
  }
  // What was opted in to counts the dynamic part only; the limit of a block counts both.
  const uint32_t allowed = kernel.dynamic_shared_limit > 0
                               ? std::min(kernel.dynamic_shared_limit, limits().shared_per_block - static_shared)
                               : kSharedWithoutOptIn - std::min(static_shared, kSharedWithoutOptIn);
  if (launch.dynamic_shared > allowed) {
    return "invalid argument: " + std::to_string(launch.dynamic_shared) + " bytes of dynamic shared memory, allowed are " +
           std::to_string(allowed) + (kernel.dynamic_shared_limit > 0 ? "" : " without cudaFuncSetAttribute");
  }
  if (cooperative) {
    const int resident = blocks_per_multiprocessor(kernel, threads, launch.dynamic_shared) * device().multiprocessors;
    if (uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z > static_cast<uint64_t>(resident)) {
      return "too many blocks in cooperative launch: grid " + text_of(launch.grid) + ", resident at once are " +
             std::to_string(resident);
    }
  }
  return {};
}

std::vector<Launched>& launches() {
  thread_local std::vector<Launched> list;
  return list;
}

}  // namespace

Device& device() {
  thread_local Device device;
  return device;
}

std::vector<Launched> take_launches() { return std::exchange(launches(), {}); }

void record(const Launch& launch, const Counters& counters) {
  if (!device().record) return;
  launches().push_back(
      {demangled(launch.kernel), launch.grid, launch.block, launch.cluster, launch.dynamic_shared, counters});
}

const Limits& limits() {
  static constexpr Limits kSm80{8, 0, 163 << 10, 164 << 10}, kSm90{9, 0, 227 << 10, 228 << 10};
  return device().options.arch == "sm_80" ? kSm80 : kSm90;
}

void register_kernel(const void* host, const char* name) { registered().kernels[host] = name; }

void register_variable(const void* host, const char* name) { registered().variables[host] = name; }

Kernel* find_kernel(const void* host) {
  const std::lock_guard lock(mutex);
  const auto found = registered().kernels.find(host);
  if (found == registered().kernels.end()) return nullptr;
  Kernel& kernel = registered().by_architecture[{device().options.arch, host}];
  kernel.name = found->second;
  return &kernel;
}

const Module& module_of(const std::string& kernel) {
  const std::lock_guard lock(mutex);
  for (File& file : files()) {
    if (file.entries.count(kernel) != 0) return load(file);
  }
  throw std::runtime_error("no PTX in " + directory().string() + " has kernel " + kernel);
}

void* variable(const void* host, size_t* bytes) {
  const std::lock_guard lock(mutex);
  const auto found = registered().variables.find(host);
  if (found == registered().variables.end()) return nullptr;
  for (File& file : files()) {
    if (file.text.find(found->second) == std::string::npos) continue;
    void* address = load(file).symbol(found->second, bytes);
    if (address == nullptr) continue;
    add_region(address, *bytes, demangled(found->second));  // the host may fill and copy it
    return address;
  }
  return nullptr;
}

int blocks_per_multiprocessor(const Kernel& kernel, uint32_t threads, uint32_t dynamic_shared) {
  const uint32_t shared = module_of(kernel.name).static_shared(kernel.name) + dynamic_shared + kSharedReserved;
  const uint32_t whole_warps = (threads + 31) / 32 * 32;
  return static_cast<int>(std::min({kThreadsPerMultiprocessor / std::max(whole_warps, 1u),
                                    limits().shared_per_multiprocessor / shared, kBlocksPerMultiprocessor}));
}

std::string run(const Kernel& kernel, Launch launch, void** arguments, bool cooperative) {
  try {
    const Module& module = module_of(kernel.name);
    launch.kernel = kernel.name;
    const std::string refusal = check_launch(kernel, launch, cooperative, module.static_shared(kernel.name));
    if (!refusal.empty()) return demangled(kernel.name) + ": " + refusal;
    launch.params.resize(module.param_bytes(kernel.name));
    size_t index = 0;
    for (const auto& [offset, bytes] : module.params(kernel.name)) {
      std::memcpy(launch.params.data() + offset, arguments[index++], bytes);
    }
    Options options = device().options;
    options.cooperative = cooperative;
    const Result result = ptxsim::launch(module, launch, options);
    if (!result.printed.empty()) std::fwrite(result.printed.data(), 1, result.printed.size(), stdout);
    record(launch, result.counters);
    if (result.ok()) return {};
    const std::string kind = fault_name(result.fault);
    return demangled(kernel.name) + ": " + (result.message.rfind(kind, 0) == 0 ? "" : kind + ": ") + result.message;
  } catch (const std::exception& error) {
    return demangled(kernel.name) + ": " + error.what();
  }
}

}  // namespace ptxsim
