// Which kernels of a namespace this build implements, as torch's dispatcher knows them.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <sstream>
#include <string>
#include <vector>

namespace llmkernels {

// The schemas of the ops in `ns` that have a kernel for `key`.
inline std::vector<std::string> kernels_of(const std::string& ns, c10::DispatchKey key) {
  std::vector<std::string> found;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind(ns + "::", 0) != 0) continue;
    const auto handle = c10::Dispatcher::singleton().findOp(name);
    if (!handle || !handle->hasSchema() || !handle->hasKernelForDispatchKey(key)) continue;
    std::ostringstream text;
    text << handle->schema();
    found.push_back(text.str());
  }
  return found;
}

}  // namespace llmkernels
