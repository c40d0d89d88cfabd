// Matrix products of fp32 CPU tensors by the faster of torch's two libraries; llmkernels/ops/lstm/products.py says why.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mm.h>
#include <omp.h>

#include <optional>
#include <string_view>

namespace llmkernels {

// a^T @ b for a [N, rows] and b [N, cols].
inline at::Tensor transposed_product(const at::Tensor& a, const at::Tensor& b) {
#if defined(__x86_64__)
  using Scalars = c10::List<std::optional<at::Scalar>>;
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            Scalars, std::optional<std::string_view>);
  static const auto linear = []() -> std::optional<c10::TypedOperatorHandle<Linear>> {
    __builtin_cpu_init();
    if (!__builtin_cpu_is("amd")) return std::nullopt;
    const auto found = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return found ? std::optional(found->typed<Linear>()) : std::nullopt;
  }();
  const bool all_threads = at::get_num_threads() <= omp_get_thread_limit();
  if (linear && all_threads && a.scalar_type() == at::kFloat && a.size(0) >= 16 && a.numel() > 0 && b.numel() > 0) {
    const auto product = [](const at::Tensor& left, const at::Tensor& right) {
      return linear->call(left.t(), right.t(), std::nullopt, "none", Scalars(), "");
    };
    // Of many rows the narrower matrix is better the left one, though the result then has to be transposed (measured on
    // a Zen 5, one thread: 4096 rows of 1024 and 256, 10.9 ms against 24.9).
    return a.size(0) >= 4 * b.size(1) ? product(b, a).t().contiguous() : product(a, b);
  }
#endif
  return at::mm(a.t(), b);
}

}  // namespace llmkernels
