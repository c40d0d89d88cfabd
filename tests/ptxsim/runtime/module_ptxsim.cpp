// tests.ptxsim._ptxsim: importing it registers the library's CUDA kernels for CPU tensors, on the emulated GPU; it also
// gives Python the interpreter itself.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "allocator.h"
#include "device.h"
#include "host_test.h"
#include "ptxsim.h"
#include "regions.h"
#include "torch/kernels.h"

namespace py = pybind11;
using namespace ptxsim;

namespace {

using Size = std::array<uint32_t, 3>;

Dim3 dim3_of(const Size& size) { return {size[0], size[1], size[2]}; }
Size size_of(Dim3 size) { return {size.x, size.y, size.z}; }

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

py::dict dict_of(const Counters& counters) {
  py::dict dict;
  dict["warp_instructions"] = counters.warp_instructions;
  dict["global_requests"] = counters.global_requests;
  dict["global_sectors"] = counters.global_sectors;
  dict["shared_requests"] = counters.shared_requests;
  dict["shared_wavefronts"] = counters.shared_wavefronts;
  dict["mma_flops"] = counters.mma_flops;
  return dict;
}

py::list taken_launches() {
  py::list list;
  for (const Launched& launch : take_launches()) {
    py::dict dict = dict_of(launch.counters);
    dict["kernel"] = launch.kernel;
    dict["grid"] = size_of(launch.grid);
    dict["block"] = size_of(launch.block);
    dict["cluster"] = size_of(launch.cluster);
    dict["dynamic_shared"] = launch.dynamic_shared;
    list.append(dict);
  }
  return list;
}

Result launch_module(const Module& module, const std::string& kernel, const Size& grid, const Size& block,
                     const Size& cluster, uint32_t dynamic_shared, const std::string& params, bool cooperative) {
  Launch launch;
  launch.kernel = kernel;
  launch.grid = dim3_of(grid);
  launch.block = dim3_of(block);
  launch.cluster = dim3_of(cluster);
  launch.dynamic_shared = dynamic_shared;
  launch.params.assign(params.begin(), params.end());
  Options options = device().options;
  options.cooperative = cooperative;
  const Result result = ptxsim::launch(module, launch, options);
  record(launch, result.counters);
  return result;
}

py::bytes tensor_map(int element_bytes, uintptr_t base, const std::vector<uint64_t>& sizes,
                     const std::vector<uint64_t>& strides, const std::vector<uint32_t>& box,
                     const std::vector<uint32_t>& element_strides, int interleave, int swizzle, bool nan_fill) {
  if (strides.size() + 1 != sizes.size() || box.size() != sizes.size() || element_strides.size() != sizes.size()) {
    throw py::value_error("tensor map: sizes, box and element_strides need one number a dimension, strides one less");
  }
  TensorMap map;
  const std::string refusal = encode_tensor_map(map, element_bytes, static_cast<int>(sizes.size()), pointer(base),
                                                sizes.data(), strides.data(), box.data(), element_strides.data(),
                                                interleave, static_cast<Swizzle>(swizzle), nan_fill);
  if (!refusal.empty()) throw py::value_error("tensor map: " + refusal);
  return {reinterpret_cast<const char*>(map.opaque), sizeof(map.opaque)};
}

template <class T>
T* memory(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void define_host_tests(py::module_ m) {
  using Address = uintptr_t;
  m.def("iota", [](Address out, int blocks) { return host_test::iota(memory<int>(out), blocks); });
  m.def("through_shared", [](Address out, int bytes, bool opt_in) {
    return host_test::through_shared(memory<int>(out), bytes, opt_in);
  });
  m.def("cluster_ranks", [](Address out, int blocks, int cluster) {
    return host_test::cluster_ranks(memory<int>(out), blocks, cluster);
  });
  m.def("cooperative_sum", [](Address out, Address scratch, int blocks) {
    return host_test::cooperative_sum(memory<int>(out), memory<int>(scratch), blocks);
  });
  m.def("set_and_copy", [](Address out, Address copy, int64_t bytes) {
    return host_test::set_and_copy(memory<int>(out), memory<int>(copy), bytes);
  });
  m.def("variables", [](Address out) { return host_test::variables(memory<int>(out)); });
  m.def("tensor_map", [](Address in, int rows, int row, Address out) {
    return host_test::tensor_map(memory<const int>(in), rows, row, memory<int>(out));
  });
  m.def("refused_tensor_map", [](Address in) { return host_test::refused_tensor_map(memory<const int>(in)); });
  m.def("occupancy", &host_test::occupancy);
}

}  // namespace

PYBIND11_MODULE(_ptxsim, m) {
  install_allocator();
  m.def("build_info", [] { return py::dict(py::arg("torch") = LLMKERNELS_TORCH_VERSION); });
  m.def("kernels", [] { return llmkernels::kernels_of("llmkernels_cuda", c10::DispatchKey::CPU); },
        "The schemas of the library's CUDA ops that accept CPU tensors here.");

  m.def("track", &track, py::arg("on"));
  m.def("is_tracked", [](uintptr_t address) { return is_tracked(pointer(address)); });
  m.def("add_region", [](uintptr_t address, size_t bytes, const std::string& name) {
    add_region(pointer(address), bytes, name);
  });
  m.def("remove_region", [](uintptr_t address) { remove_region(pointer(address)); });

  py::enum_<Async>(m, "Async").value("eager", Async::kEager).value("lazy", Async::kLazy).value("random", Async::kRandom);
  py::class_<Device>(m, "Device")
      .def(py::init<const Device&>())
      .def_readwrite("multiprocessors", &Device::multiprocessors)
      .def_readwrite("registers", &Device::registers)
      .def_readwrite("record", &Device::record)
      .def_property("arch", [](const Device& d) { return d.options.arch; },
                    [](Device& d, const std::string& arch) { d.options.arch = arch; })
      .def_property("seed", [](const Device& d) { return d.options.seed; },
                    [](Device& d, uint64_t seed) { d.options.seed = seed; })
      .def_property("check", [](const Device& d) { return d.options.check; },
                    [](Device& d, bool check) { d.options.check = check; })
      .def_property("async_mode", [](const Device& d) { return d.options.async; },
                    [](Device& d, Async async) { d.options.async = async; })
      .def_property("max_instructions", [](const Device& d) { return d.options.max_instructions; },
                    [](Device& d, int64_t most) { d.options.max_instructions = most; })
      .def_property("resident_blocks", [](const Device& d) { return d.options.resident_blocks; },
                    [](Device& d, int blocks) { d.options.resident_blocks = blocks; });
  m.def("device", [] { return device(); }, "A copy of this thread's device.");
  m.def("set_device", [](const Device& other) { device() = other; });
  m.def("take_launches", &taken_launches, "What this thread launched while `record` was set, since the last call.");

  py::class_<Module, std::shared_ptr<Module>>(m, "Module")
      .def("kernels", &Module::kernels)
      .def("params", &Module::params, "Byte offset and size of each parameter.")
      .def("param_bytes", &Module::param_bytes)
      .def("static_shared", &Module::static_shared)
      .def("symbol", [](const Module& module, const std::string& name) {
        size_t bytes = 0;
        const auto address = reinterpret_cast<uintptr_t>(module.symbol(name, &bytes));
        return std::pair(address, bytes);
      });
  m.def("load", [](const std::string& ptx, const std::string& name) {
    return std::const_pointer_cast<Module>(Module::load(ptx, name));  // pybind11 holds no const objects
  });

  py::class_<Result>(m, "Result")
      .def_property_readonly("fault", [](const Result& r) { return r.ok() ? py::none() : py::object(py::str(fault_name(r.fault))); })
      .def_readonly("message", &Result::message)
      .def_readonly("printed", &Result::printed)
      .def_property_readonly("counters", [](const Result& r) { return dict_of(r.counters); });
  m.def("launch", &launch_module, py::call_guard<py::gil_scoped_release>());
  m.def("tensor_map", &tensor_map);
  define_host_tests(m.def_submodule("host_test"));
}
