// What the CPU and the CUDA binding of attention share: tensors -> params, with every check that protects memory. Only
// the device differs, and who runs the params.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

#include "ops/attention/attention.h"
#include "torch/checks.h"

namespace llmkernels {

// The arguments of a call as torch hands them over; what is absent is null.
struct AttentionTensors {
  const at::Tensor &q, &k, &v;
  const at::Tensor *mask = nullptr, *alibi_slopes = nullptr, *sinks = nullptr, *seed = nullptr;
  const at::Tensor *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;
  const at::Tensor *seqlens_k = nullptr, *block_table = nullptr;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
};

struct AttentionOptions {
  double scale;
  int64_t window_left, window_right;
  bool top_left;
  double softcap, dropout_p;
};

// Params of a call, and the tensors they point into (copies where a layout asked for one).
struct AttentionCall {
  AttentionInputs in{};
  at::Tensor q, k, v, mask, slopes, sinks, seed, cu_q, cu_k, seqlens, table;
  const char* op;

  AttentionCall(const char* name, const AttentionTensors& t, const AttentionOptions& o) : op(name) {
    in.dtype = dtype_of(op, "q", t.q);
    TORCH_CHECK_TYPE(in.dtype != DType::kFloat64, op, ": q has dtype float64, expected float32, bfloat16 or float16");
    q = rows("q", t.q, t.q.scalar_type());
    k = rows("k", t.k, t.q.scalar_type());
    v = rows("v", t.v, t.q.scalar_type());
    in.H = q.size(1), in.D = q.size(3), in.Hk = k.size(1), in.Dv = v.size(3);
    in.q_rows = q.size(2), in.k_rows = k.size(2);
    TORCH_CHECK_VALUE(k.size(3) == in.D && v.size(0) == k.size(0) && v.size(1) == in.Hk && v.size(2) == in.k_rows, op,
                      ": k is ", k.sizes(), " and v ", v.sizes(), ", expected what fits q, ", q.sizes());
    TORCH_CHECK_VALUE(in.Hk > 0 ? in.H % in.Hk == 0 : in.H == 0, op, ": q has ", in.H, " heads, expected a multiple of ",
                      in.Hk);
    in.q = q.const_data_ptr(), in.k = k.const_data_ptr(), in.v = v.const_data_ptr();
    in.q_strides = strides(q), in.k_strides = strides(k), in.v_strides = strides(v);
    in.B = q.size(0), in.S = in.q_rows, in.T = in.k_rows;
    if (t.cu_seqlens_q != nullptr) {
      packed(t);
    } else if (t.block_table != nullptr) {
      paged(t);
    } else {
      TORCH_CHECK_VALUE(k.size(0) == in.B, op, ": k is ", k.sizes(), ", expected a batch of ", in.B);
    }
    if (t.seqlens_k != nullptr) seqlens = lengths("seqlens_k", *t.seqlens_k, in.B);
    in.seqlens_k = ints(seqlens);
    per_head(t);
    if (t.mask != nullptr) set_mask(*t.mask);
    in.scale = static_cast<float>(o.scale), in.softcap = static_cast<float>(o.softcap);
    in.window_left = o.window_left, in.window_right = o.window_right, in.top_left = o.top_left;
    if (t.seed != nullptr) {
      check_device(op, "seed", *t.seed, q.device());
      check_dtype(op, "seed", *t.seed, at::kLong);
      TORCH_CHECK_VALUE(t.seed->numel() == 1, op, ": seed has shape ", t.seed->sizes(), ", expected one element");
      seed = t.seed->contiguous();
      in.seed = seed.const_data_ptr<int64_t>();
      in.dropout_p = static_cast<float>(o.dropout_p);
      in.dropout_threshold = static_cast<uint32_t>(std::nearbyint(o.dropout_p * 16777216.0));
    }
  }

  static AttentionStrides strides(const at::Tensor& tensor) {
    return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }

  // Four dimensions on the device of q, the last one contiguous.
  at::Tensor rows(const char* name, const at::Tensor& tensor, at::ScalarType dtype) const {
    TORCH_CHECK_VALUE(tensor.dim() == 4, op, ": ", name, " has shape ", tensor.sizes(), ", expected four dimensions");
    if (q.defined()) check_device(op, name, tensor, q.device());
    check_dtype(op, name, tensor, dtype);
    return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : tensor.contiguous();
  }

  // As `rows`, of the shape of `like`.
  at::Tensor rows_as(const char* name, const at::Tensor& tensor, at::IntArrayRef sizes) const {
    check_shape(op, name, tensor, sizes);
    return rows(name, tensor, q.scalar_type());
  }

  at::Tensor stats(const char* name, const at::Tensor& tensor) const {
    check_device(op, name, tensor, q.device());
    check_dtype(op, name, tensor, at::kFloat);
    check_shape(op, name, tensor, {q.size(0), in.H, in.q_rows});
    return tensor.contiguous();
  }

 private:
  static const int32_t* ints(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<int32_t>() : nullptr;
  }

  at::Tensor lengths(const char* name, const at::Tensor& tensor, int64_t size) const {
    check_device(op, name, tensor, q.device());
    check_dtype(op, name, tensor, at::kInt);
    check_shape(op, name, tensor, {size});
    return tensor.contiguous();
  }

  void packed(const AttentionTensors& t) {
    TORCH_CHECK_VALUE(t.cu_seqlens_k != nullptr, op, ": cu_seqlens_k is missing");
    TORCH_CHECK_VALUE(q.size(0) == 1 && k.size(0) == 1, op, ": q is ", q.sizes(), ", expected a packed batch of 1");
    TORCH_CHECK_VALUE(t.cu_seqlens_q->dim() == 1 && t.cu_seqlens_q->size(0) > 0, op, ": cu_seqlens_q has shape ",
                      t.cu_seqlens_q->sizes(), ", expected (sequences + 1)");
    cu_q = lengths("cu_seqlens_q", *t.cu_seqlens_q, t.cu_seqlens_q->size(0));
    cu_k = lengths("cu_seqlens_k", *t.cu_seqlens_k, cu_q.size(0));
    in.cu_seqlens_q = ints(cu_q), in.cu_seqlens_k = ints(cu_k);
    in.B = cu_q.size(0) - 1;
    in.S = std::min(t.max_seqlen_q, in.q_rows), in.T = std::min(t.max_seqlen_k, in.k_rows);
    in.q_strides.batch = in.k_strides.batch = in.v_strides.batch = 0;
  }

  void paged(const AttentionTensors& t) {
    check_device(op, "block_table", *t.block_table, q.device());
    check_dtype(op, "block_table", *t.block_table, at::kInt);
    TORCH_CHECK_VALUE(t.block_table->dim() == 2 && t.block_table->size(0) == in.B, op, ": block_table has shape ",
                      t.block_table->sizes(), ", expected (", in.B, ", pages of a sequence)");
    TORCH_CHECK_VALUE(t.seqlens_k != nullptr, op, ": seqlens_k is missing, which a paged cache needs");
    table = t.block_table->contiguous();
    in.block_table = ints(table);
    in.block_table_stride = table.size(1);
    in.pages = k.size(0), in.page_size = in.k_rows;
    in.T = in.k_rows = in.pages > 0 ? table.size(1) * in.page_size : 0;
  }

  at::Tensor floats(const char* name, const at::Tensor& tensor) const {
    check_device(op, name, tensor, q.device());
    return tensor.to(at::kFloat).contiguous();
  }

  void per_head(const AttentionTensors& t) {
    if (t.alibi_slopes != nullptr) {
      slopes = floats("alibi_slopes", *t.alibi_slopes);
      const bool each = slopes.dim() == 2;
      check_shape(op, "alibi_slopes", slopes, each ? at::DimVector{in.B, in.H} : at::DimVector{in.H});
      in.alibi_slopes = slopes.const_data_ptr<float>();
      in.slope_batch_stride = each ? in.H : 0;
    }
    if (t.sinks != nullptr) {
      sinks = floats("sinks", *t.sinks);
      check_shape(op, "sinks", sinks, {in.H});
      in.sinks = sinks.const_data_ptr<float>();
    }
  }

  void set_mask(const at::Tensor& given) {
    check_device(op, "mask", given, q.device());
    const at::ScalarType dtype = given.scalar_type();
    TORCH_CHECK_TYPE(dtype == at::kBool || dtype == q.scalar_type() || dtype == at::kFloat, op, ": mask has dtype ",
                     dtype, ", expected bool, ", q.scalar_type(), " or float32");
    TORCH_CHECK_VALUE(given.dim() == 4 && in.cu_seqlens_q == nullptr, op, ": mask has shape ", given.sizes(),
                      ", expected four dimensions and a batch that is not packed");
    mask = given.size(3) == 1 || given.stride(3) == 1 ? given : given.contiguous();
    const int64_t whole[4] = {in.B, in.H, in.S, in.T};
    for (int i = 0; i < 4; ++i) {
      TORCH_CHECK_VALUE(mask.size(i) == 1 || mask.size(i) == whole[i], op, ": mask has shape ", given.sizes(),
                        ", expected one that broadcasts to ", at::IntArrayRef(whole, 4));
      in.mask_strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
    }
    in.mask = mask.const_data_ptr();
    in.mask_kind = dtype == at::kBool          ? MaskKind::kBool
                   : dtype == q.scalar_type() ? MaskKind::kElement
                                              : MaskKind::kFloat32;
  }
};

// Laid out as [B, S, H, Dv]: what follows attention in a model joins the heads.
inline at::Tensor empty_out(const at::Tensor& q, const at::Tensor& v) {
  return empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
}

// `run(params)` fills the outputs; it is not called when there is nothing to fill. Returns (out, row_max, log_sum).
template <class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_fwd_call(const char* op, const AttentionTensors& tensors,
                                                                  const AttentionOptions& options, Run&& run) {
  const AttentionCall call(op, tensors, options);
  AttentionFwdParams p{};
  p.in = call.in;
  at::Tensor out = empty_out(call.q, call.v);
  at::Tensor row_max = empty({call.q.size(0), p.in.H, p.in.q_rows}, call.q.options().dtype(at::kFloat));
  at::Tensor log_sum = at::empty_like(row_max);
  p.out = out.data_ptr();
  p.row_max = row_max.data_ptr<float>(), p.log_sum = log_sum.data_ptr<float>();
  p.out_strides = AttentionCall::strides(out);
  if (p.in.cu_seqlens_q != nullptr) p.out_strides.batch = 0;
  if (row_max.numel() > 0) run(p);
  return {out, row_max, log_sum};
}

// dsinks = -sum over b and i of exp((sink - m) - log l) * delta.
inline at::Tensor dsinks_of(const AttentionCall& call, const at::Tensor& row_max, const at::Tensor& log_sum,
                            const at::Tensor& delta) {
  const at::Tensor finite = row_max.masked_fill(row_max.eq(-std::numeric_limits<float>::infinity()), 0.0);
  const at::Tensor weights = ((call.sinks.view({1, -1, 1}) - finite) - log_sum).exp();
  return (weights * delta).sum({0, 2}).neg();
}

// delta from the weights. A gradient in fp32 shows what rounding out to 16 bits does to delta: where one key has most
// of a row's weight, p * (dp - delta) is a small difference. The sums over all keys of a mask's gradient are
// sum_j p * dp where delta is 0, so that any backward can make them; it costs two products more than the five.
template <class Run>
void delta_of_weights(AttentionBwdParams p, const at::Tensor& delta, const at::Tensor& dlse, Run&& run) {
  const at::Tensor zeros = at::zeros_like(delta);
  p.dmask = p.delta;
  p.delta = zeros.data_ptr<float>(), p.has_delta = true;
  p.dq = p.dk = p.dv = nullptr;
  p.dmask_sizes[0] = p.in.B, p.dmask_sizes[1] = p.in.H, p.dmask_sizes[2] = p.in.S, p.dmask_sizes[3] = 1;
  run(p);
  if (dlse.defined()) delta.sub_(dlse);
}

// `run(params)` fills what is wanted and delta. Returns (dq, dk, dv, dmask, dsinks); what is not wanted is empty.
template <class Run>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_bwd_call(
    const char* op, const AttentionTensors& tensors, const at::Tensor& dout, const at::Tensor* dlse,
    const at::Tensor& out, const at::Tensor& row_max, const at::Tensor& log_sum, const AttentionOptions& options,
    std::array<bool, 5> wanted, Run&& run) {
  const AttentionCall call(op, tensors, options);
  AttentionBwdParams p{};
  p.in = call.in;
  const bool is_packed = p.in.cu_seqlens_q != nullptr;
  // A tensor of its own for each: outputs of an op must not be one another.
  const auto none = [&] { return empty({0}, call.q.options()); };
  const auto strides = [&](const at::Tensor& tensor) {
    AttentionStrides found = AttentionCall::strides(tensor);
    if (is_packed) found.batch = 0;
    return found;
  };
  const at::DimVector sizes{call.q.size(0), p.in.H, p.in.q_rows, p.in.Dv};
  const at::Tensor dout_rows = call.rows_as("dout", dout, sizes), out_rows = call.rows_as("out", out, sizes);
  const at::Tensor top = call.stats("row_max", row_max), total = call.stats("log_sum", log_sum);
  const at::Tensor dlse_rows = dlse != nullptr ? call.stats("dlse", *dlse) : at::Tensor();
  at::Tensor delta = at::empty_like(top);
  p.dout = dout_rows.const_data_ptr(), p.out = out_rows.const_data_ptr();
  p.dout_strides = strides(dout_rows), p.out_strides = strides(out_rows);
  p.row_max = top.const_data_ptr<float>(), p.log_sum = total.const_data_ptr<float>();
  p.dlse = dlse_rows.defined() ? dlse_rows.const_data_ptr<float>() : nullptr;
  p.delta = delta.data_ptr<float>();
  // A gradient has the layout of its tensor; the kernels need its last dimension contiguous, as any dense layout that
  // has one there is.
  const auto grad = [&](bool want, const at::Tensor& of) { return want ? fresh(at::empty_like(of)) : none(); };
  const auto target = [](bool want, const at::Tensor& made) {
    return want && made.size(3) > 1 && made.stride(3) != 1 ? at::empty_like(made, at::MemoryFormat::Contiguous) : made;
  };
  at::Tensor dq = grad(wanted[0], tensors.q), dk = grad(wanted[1], tensors.k), dv = grad(wanted[2], tensors.v);
  const at::Tensor to_q = target(wanted[0], dq), to_k = target(wanted[1], dk), to_v = target(wanted[2], dv);
  if (wanted[0]) p.dq = to_q.data_ptr(), p.dq_strides = strides(to_q);
  if (wanted[1]) p.dk = to_k.data_ptr(), p.dk_strides = strides(to_k);
  if (wanted[2]) p.dv = to_v.data_ptr(), p.dv_strides = strides(to_v);
  at::Tensor dmask = none(), to_mask;
  if (wanted[3]) {
    TORCH_CHECK_VALUE(p.in.mask_kind == MaskKind::kElement || p.in.mask_kind == MaskKind::kFloat32, op,
                      ": the gradient of mask is wanted, expected an additive mask");
    dmask = at::empty_like(*tensors.mask);
    to_mask = dmask.is_contiguous() ? dmask : at::empty_like(dmask, at::MemoryFormat::Contiguous);
    p.dmask = to_mask.data_ptr();
    for (int i = 0; i < 4; ++i) p.dmask_sizes[i] = to_mask.size(i);
  }
  if (top.numel() > 0 && p.in.k_rows > 0) {
    if (p.dmask != nullptr && p.in.mask_kind == MaskKind::kFloat32) {
      delta_of_weights(p, delta, dlse_rows, run);
      p.has_delta = true;
    }
    run(p);
  } else {  // no scores: nothing depends on anything
    for (const at::Tensor& each : {to_q, to_k, to_v}) each.zero_();
    if (to_mask.defined()) to_mask.zero_();
    delta.zero_();
    if (dlse != nullptr) delta.sub_(dlse_rows);
  }
  if (wanted[0] && !to_q.is_same(dq)) dq.copy_(to_q);
  if (wanted[1] && !to_k.is_same(dk)) dk.copy_(to_k);
  if (wanted[2] && !to_v.is_same(dv)) dv.copy_(to_v);
  if (wanted[3] && !to_mask.is_same(dmask)) dmask.copy_(to_mask);
  at::Tensor dsinks = none();
  if (wanted[4]) {
    TORCH_CHECK_VALUE(tensors.sinks != nullptr, op, ": the gradient of sinks is wanted, which are absent");
    dsinks = dsinks_of(call, top, total, delta).to(tensors.sinks->scalar_type());
  }
  return {dq, dk, dv, dmask, dsinks};
}

}  // namespace llmkernels
