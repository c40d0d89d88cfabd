// What the CPU and the CUDA binding of cross entropy share: tensors -> params, with every check that protects memory.
// Only the device differs, and who runs the params.
#pragma once

#include <tuple>

#include "ops/cross_entropy/cross_entropy.h"
#include "torch/checks.h"

namespace llmkernels {

struct CrossEntropySettings {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
};

// The arguments of both directions, and what keeps their memory alive.
struct CrossEntropyCall {
  at::Tensor input, target, weight, dloss;

  CrossEntropyCall(const char* op, const at::Tensor& given_input, const at::Tensor& given_target,
                   const at::Tensor* given_weight, const at::Tensor* given_dloss, const CrossEntropySettings& settings,
                   CrossEntropyInputs& p) {
    p.dtype = dtype_of(op, "input", given_input);
    TORCH_CHECK_VALUE(given_input.dim() == 2 && given_input.size(1) > 0, op, ": input has shape ", given_input.sizes(),
                      ", expected [rows, classes] with at least one class");
    p.rows = given_input.size(0);
    p.cols = given_input.size(1);
    const Rows input_rows = as_rows(given_input, p.rows, p.cols);
    input = input_rows.owner;
    p.input = input_rows.data();
    p.input_row_stride = input_rows.stride;
    take_target(op, given_input, given_target, settings, p);
    if (given_weight != nullptr) {
      check_device(op, "weight", *given_weight, given_input.device());
      check_dtype(op, "weight", *given_weight, acc_of(given_input));
      check_shape(op, "weight", *given_weight, {p.cols});
      weight = given_weight->contiguous();
      p.weight = weight.data_ptr();
    }
    if (given_dloss != nullptr) {
      check_device(op, "dloss", *given_dloss, given_input.device());
      check_dtype(op, "dloss", *given_dloss, acc_of(given_input));
      check_shape(op, "dloss", *given_dloss, {p.rows});
      dloss = *given_dloss;
      p.dloss = dloss.data_ptr();
      p.dloss_stride = dloss.stride(0);
    }
    p.ignore_index = settings.ignore_index;
    p.label_smoothing = settings.label_smoothing;
    p.z_loss = settings.z_loss;
    p.softcap = settings.softcap;
  }

 private:
  void take_target(const char* op, const at::Tensor& given_input, const at::Tensor& given,
                   const CrossEntropySettings& settings, CrossEntropyInputs& p) {
    check_device(op, "target", given, given_input.device());
    if (!given.is_floating_point()) {
      check_dtype(op, "target", given, at::kLong);
      check_shape(op, "target", given, {p.rows});
      target = given.contiguous();
      p.target = target.data_ptr();
      p.kind = settings.label_smoothing == 0.0 ? TargetKind::kIndex : TargetKind::kSmoothedIndex;
      return;
    }
    p.wide_target = given.scalar_type() != given_input.scalar_type();
    if (p.wide_target) check_dtype(op, "target", given, acc_of(given_input));
    check_shape(op, "target", given, given_input.sizes());
    const Rows rows = as_rows(given, p.rows, p.cols);
    target = rows.owner;
    p.target = rows.data();
    p.target_row_stride = rows.stride;
    p.kind = TargetKind::kProbabilities;
  }
};

// `run(params)` fills the outputs; it is not called when there are no rows. Returns (loss, stats, dinput); without
// `dloss` the last one is an empty tensor.
template <class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_fwd_call(const char* op, const at::Tensor& input,
                                                                      const at::Tensor& target,
                                                                      const at::Tensor* weight, const at::Tensor* dloss,
                                                                      const CrossEntropySettings& settings, Run&& run) {
  CrossEntropyFwdParams p{};
  const CrossEntropyCall call(op, input, target, weight, dloss, settings, p);
  const at::TensorOptions acc = input.options().dtype(acc_of(input));
  at::Tensor loss = empty({p.rows}, acc), stats = empty({kStats, p.rows}, acc);
  at::Tensor dinput = empty(dloss != nullptr ? input.sizes() : at::IntArrayRef{0}, input.options());
  p.loss = loss.data_ptr();
  p.stats = stats.data_ptr();
  p.dinput = dinput.data_ptr();
  if (p.rows > 0) run(p);
  return {loss, stats, dinput};
}

template <class Run>
at::Tensor cross_entropy_bwd_call(const char* op, const at::Tensor& dloss, const at::Tensor& input,
                                  const at::Tensor& target, const at::Tensor* weight, const at::Tensor& stats,
                                  const CrossEntropySettings& settings, Run&& run) {
  CrossEntropyBwdParams p{};
  const CrossEntropyCall call(op, input, target, weight, &dloss, settings, p);
  check_device(op, "stats", stats, input.device());
  check_dtype(op, "stats", stats, acc_of(input));
  check_shape(op, "stats", stats, {kStats, p.rows});
  const at::Tensor kept = stats.contiguous();
  at::Tensor dinput = empty(input.sizes(), input.options());
  p.stats = kept.data_ptr();
  p.dinput = dinput.data_ptr();
  if (p.rows > 0) run(p);
  return dinput;
}

}  // namespace llmkernels
