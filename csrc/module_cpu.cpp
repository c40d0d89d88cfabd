// llmkernels._cpu: importing it registers the CPU kernels as torch ops; it also says how it was built. Tensors never
// pass through pybind11, only through torch's dispatcher.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu/isa.h"
#include "torch/kernels.h"

PYBIND11_MODULE(_cpu, m) {
  namespace cpu = llmkernels::cpu;
  m.doc() = "Native CPU kernels of llmkernels.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = LLMKERNELS_TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["isas"] = LLMKERNELS_ISAS;
    return info;
  });
  m.def("kernels", [] { return llmkernels::kernels_of("llmkernels_cpu", c10::DispatchKey::CPU); },
        "The schemas of the ops that this module implements.");
  m.def("isa", [] { return cpu::isa_name(cpu::isa()); }, "The instruction set in use.");
  m.def("available_isas", &cpu::available_isas, "Those that were built and run on this CPU, slowest first.");
  m.def("force_isa", &cpu::force_isa, pybind11::arg("name"), "Use another instruction set from now on.");
}
