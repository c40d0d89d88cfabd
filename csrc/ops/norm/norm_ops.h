// The torch ops of the norm family, the same on the CPU and on CUDA but for who runs the params.
#pragma once

#include <torch/library.h>

#include "ops/norm/norm_torch.h"

namespace llmkernels {

// The ops of a device, from how it runs params: Device::widen_rows, Device(op, x).fwd(params) and
// .bwd(params, make_partial).
template <class Device>
struct NormOps {
  using OptionalTensor = std::optional<at::Tensor>;
  using Tensor = at::Tensor;

  static auto fwd(const char* op, NormKind kind, const Tensor& x, const OptionalTensor& residual,
                  const OptionalTensor& weight, const OptionalTensor& bias, at::IntArrayRef normalized_shape, double eps,
                  double weight_offset, const NormDropout& dropout = {}) {
    const Device device(op, x);
    return norm_fwd_call(op, kind, x, get(residual), get(weight), get(bias), normalized_shape, eps, weight_offset,
                         Device::kWidenRows, [&](const NormFwdParams& p) { device.fwd(p); }, dropout);
  }

  static NormGradients bwd(const char* op, NormKind kind, const Tensor& dy, const OptionalTensor& dresidual,
                           const Tensor& x, const OptionalTensor& weight, const Tensor* mean, const Tensor& rstd,
                           at::IntArrayRef normalized_shape, double weight_offset, std::array<bool, 3> wanted,
                           const NormDropout& dropout = {}, bool dropped_wanted = false) {
    const Device device(op, x);
    return norm_bwd_call(op, kind, dy, get(dresidual), x, get(weight), mean, rstd, normalized_shape, weight_offset,
                         wanted, [&](NormBwdParams& p, auto&& make_partial) { device.bwd(p, make_partial); }, dropout,
                         dropped_wanted);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_fwd(
      const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
      at::IntArrayRef normalized_shape, double eps) {
    return fwd("layer_norm_fwd", NormKind::kLayerNorm, x, residual, weight, bias, normalized_shape, eps, 0.0);
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(
      const Tensor& dy, const OptionalTensor& dresidual, const Tensor& x, const OptionalTensor& weight,
      const Tensor& mean, const Tensor& rstd, at::IntArrayRef normalized_shape, std::array<bool, 3> wanted) {
    const NormGradients d = bwd("layer_norm_bwd", NormKind::kLayerNorm, dy, dresidual, x, weight, &mean, rstd,
                                normalized_shape, 0.0, wanted);
    return {d.dx, d.dweight, d.dbias};
  }

  static std::tuple<Tensor, Tensor, Tensor> rms_norm_fwd(const Tensor& x, const OptionalTensor& residual,
                                                         const OptionalTensor& weight,
                                                         at::IntArrayRef normalized_shape, double eps,
                                                         double weight_offset) {
    const auto [y, new_residual, mean, rstd] = fwd("rms_norm_fwd", NormKind::kRmsNorm, x, residual, weight, {},
                                                   normalized_shape, eps, weight_offset);
    return {y, new_residual, rstd};
  }

  static std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const OptionalTensor& dresidual, const Tensor& x,
                                                 const OptionalTensor& weight, const Tensor& rstd,
                                                 at::IntArrayRef normalized_shape, double weight_offset,
                                                 std::array<bool, 2> wanted) {
    const NormGradients d = bwd("rms_norm_bwd", NormKind::kRmsNorm, dy, dresidual, x, weight, nullptr, rstd,
                                normalized_shape, weight_offset, {wanted[0], wanted[1], false});
    return {d.dx, d.dweight};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_fwd(
      const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const OptionalTensor& bias,
      const Tensor& seed, at::IntArrayRef normalized_shape, double eps, double dropout_p) {
    return fwd("dropout_add_layer_norm_fwd", NormKind::kLayerNorm, x, residual, weight, bias, normalized_shape, eps,
               0.0, {&seed, dropout_p});
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_bwd(
      const Tensor& dy, const OptionalTensor& dsum, const Tensor& s, const OptionalTensor& weight, const Tensor& mean,
      const Tensor& rstd, const Tensor& seed, at::IntArrayRef normalized_shape, double dropout_p,
      std::array<bool, 4> wanted) {
    const NormGradients d = bwd("dropout_add_layer_norm_bwd", NormKind::kLayerNorm, dy, dsum, s, weight, &mean, rstd,
                                normalized_shape, 0.0, {wanted[0] || wanted[1], wanted[2], wanted[3]},
                                {&seed, dropout_p}, wanted[0]);
    return {d.dx_dropped, of_residual(d, wanted[1]), d.dweight, d.dbias};
  }

  static std::tuple<Tensor, Tensor, Tensor> dropout_add_rms_norm_fwd(
      const Tensor& x, const Tensor& residual, const OptionalTensor& weight, const Tensor& seed,
      at::IntArrayRef normalized_shape, double eps, double weight_offset, double dropout_p) {
    const auto [y, new_residual, mean, rstd] = fwd("dropout_add_rms_norm_fwd", NormKind::kRmsNorm, x, residual, weight,
                                                   {}, normalized_shape, eps, weight_offset, {&seed, dropout_p});
    return {y, new_residual, rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> dropout_add_rms_norm_bwd(
      const Tensor& dy, const OptionalTensor& dsum, const Tensor& s, const OptionalTensor& weight, const Tensor& rstd,
      const Tensor& seed, at::IntArrayRef normalized_shape, double weight_offset, double dropout_p,
      std::array<bool, 3> wanted) {
    const NormGradients d = bwd("dropout_add_rms_norm_bwd", NormKind::kRmsNorm, dy, dsum, s, weight, nullptr, rstd,
                                normalized_shape, weight_offset, {wanted[0] || wanted[1], wanted[2], false},
                                {&seed, dropout_p}, wanted[0]);
    return {d.dx_dropped, of_residual(d, wanted[1]), d.dweight};
  }

  static void define(torch::Library& m) {
    m.impl("layer_norm_fwd", layer_norm_fwd);
    m.impl("layer_norm_bwd", layer_norm_bwd);
    m.impl("rms_norm_fwd", rms_norm_fwd);
    m.impl("rms_norm_bwd", rms_norm_bwd);
    m.impl("dropout_add_layer_norm_fwd", dropout_add_layer_norm_fwd);
    m.impl("dropout_add_layer_norm_bwd", dropout_add_layer_norm_bwd);
    m.impl("dropout_add_rms_norm_fwd", dropout_add_rms_norm_fwd);
    m.impl("dropout_add_rms_norm_bwd", dropout_add_rms_norm_bwd);
  }

 private:
  // The kernels compute the gradient of s for that of dropout's input, also where nobody wants it itself.
  static Tensor of_residual(const NormGradients& d, bool wanted) { return wanted ? d.dx : empty({0}, d.dx.options()); }
};

}  // namespace llmkernels
