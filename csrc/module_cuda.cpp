// llmkernels._cuda: importing it registers the CUDA kernels as torch ops; it also says how it was built. Importing it
// needs neither a GPU nor a CUDA build of torch.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "torch/kernels.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of llmkernels.";
  m.def("build_info", [] {
    pybind11::dict info;
    info["torch"] = LLMKERNELS_TORCH_VERSION;
    info["compiler"] = __VERSION__;
    info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
    info["targets"] = LLMKERNELS_CUDA_TARGETS;
    return info;
  });
  m.def("kernels", [] { return llmkernels::kernels_of("llmkernels_cuda", c10::DispatchKey::CUDA); },
        "The schemas of the ops that this module implements.");
}
