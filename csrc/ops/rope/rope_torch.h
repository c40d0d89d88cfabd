// What the CPU and the CUDA binding of rope share: tensors -> params, with every check that protects memory. Only the
// device differs, and who runs the params.
#pragma once

#include <ATen/ops/empty_like.h>

#include <tuple>

#include "ops/rope/rope.h"
#include "torch/checks.h"

namespace llmkernels {

constexpr const char* kRope = "rope";

// Which dimensions of a tensor are what: `seq` is -2 or -3.
struct RopeShape {
  int64_t batch = 1, seq = 1, heads = 1, cols = 0;
  int64_t seq_dim, head_dim;
  bool has_batch, has_heads;

  RopeShape(const char* name, const at::Tensor& x, int64_t seq_from_end)
      : seq_dim(seq_from_end), head_dim(-5 - seq_from_end) {
    TORCH_CHECK_VALUE((seq_dim == -2 || seq_dim == -3) && x.dim() >= -seq_dim && x.dim() <= 4, kRope, ": ", name,
                      " has shape ", x.sizes(), ", expected 2 to 4 dimensions with the sequence at ", seq_dim);
    has_batch = x.dim() == 4;
    has_heads = x.dim() >= 3;
    if (has_batch) batch = x.size(0);
    if (has_heads) heads = x.size(head_dim);
    seq = x.size(seq_dim);
    cols = x.size(-1);
  }
};

inline bool has_unit_stride(const at::Tensor& x) { return x.size(-1) <= 1 || x.stride(-1) == 1; }

// One of q and k: where it is read and written, and what must be copied to a result whose heads are not contiguous.
struct RopeOperand {
  at::Tensor result, source, target;

  RopeOperand() = default;
  RopeOperand(const at::Tensor& x, bool inplace)
      : result(inplace ? x : at::empty_like(x)), source(has_unit_stride(x) ? x : x.contiguous()) {
    target = has_unit_stride(result) ? result : inplace ? source : empty(x.sizes(), x.options());
  }
  void finish() const {
    if (!target.is_same(result)) result.copy_(target);
  }
  RopeTensor params(const RopeShape& shape) const {
    RopeTensor t{};
    t.x = source.data_ptr();
    t.y = target.data_ptr();
    t.heads = shape.heads;
    t.x_seq_stride = source.stride(shape.seq_dim);
    t.y_seq_stride = target.stride(shape.seq_dim);
    if (shape.has_heads) {
      t.x_head_stride = source.stride(shape.head_dim);
      t.y_head_stride = target.stride(shape.head_dim);
    }
    if (shape.has_batch) {
      t.x_batch_stride = source.stride(0);
      t.y_batch_stride = target.stride(0);
    }
    return t;
  }
};

// Everything of the params but q and k. The tensors stay alive as long as this does.
struct RopeTables {
  at::Tensor cos, sin, positions;

  RopeTables(const at::Tensor& q, const RopeShape& shape, const at::Tensor& given_cos, const at::Tensor& given_sin,
             const at::Tensor* given_positions, RopeParams& p)
      : cos(given_cos), sin(given_sin) {
    for (at::Tensor* table : {&cos, &sin}) {
      const char* name = table == &cos ? "cos" : "sin";
      check_device(kRope, name, *table, q.device());
      if (table->scalar_type() != q.scalar_type()) check_dtype(kRope, name, *table, acc_of(q));
      check_dtype(kRope, name, *table, cos.scalar_type());
      TORCH_CHECK_VALUE((table->dim() == 2 || table->dim() == 3) && table->size(-1) >= 1 &&
                            2 * table->size(-1) <= shape.cols,
                        kRope, ": ", name, " has shape ", table->sizes(), ", expected at most ", shape.cols / 2,
                        " columns");
      check_shape(kRope, name, *table, cos.sizes());
      if (!has_unit_stride(*table)) *table = table->contiguous();
    }
    p.dtype = dtype_of(kRope, "q", q);
    p.table_dtype = dtype_of(kRope, "cos", cos);
    p.batch = shape.batch;
    p.seq = shape.seq;
    p.cols = shape.cols;
    p.half = cos.size(-1);
    p.length = cos.size(-2);
    p.cos = cos.data_ptr();
    p.sin = sin.data_ptr();
    p.cos_row_stride = cos.stride(-2);
    p.sin_row_stride = sin.stride(-2);
    if (cos.dim() == 3) {
      TORCH_CHECK_VALUE(cos.size(0) == shape.batch && cos.size(1) == shape.seq, kRope, ": cos has shape ", cos.sizes(),
                        ", expected a row for each of ", shape.batch, " x ", shape.seq);
      p.cos_batch_stride = cos.stride(0);
      p.sin_batch_stride = sin.stride(0);
    }
    if (given_positions == nullptr) {
      TORCH_CHECK_VALUE(p.length >= p.seq, kRope, ": cos and sin have ", p.length, " rows, expected ", p.seq);
      return;
    }
    positions = *given_positions;
    check_device(kRope, "positions", positions, q.device());
    p.narrow_positions = positions.scalar_type() == at::kInt;
    if (!p.narrow_positions) check_dtype(kRope, "positions", positions, at::kLong);
    const bool batched = positions.dim() == 2;
    TORCH_CHECK_VALUE(cos.dim() == 2 && (positions.dim() == 1 || batched) && positions.size(-1) == shape.seq &&
                          (!batched || positions.size(0) == shape.batch),
                      kRope, ": positions has shape ", positions.sizes(), ", expected [", shape.seq, "] or [",
                      shape.batch, ", ", shape.seq, "]");
    p.positions = positions.data_ptr();
    p.position_seq_stride = positions.stride(-1);
    if (batched) p.position_batch_stride = positions.stride(0);
  }
};

// `run(params)` writes the results; it is not called when there is nothing to write. Returns them, and an empty tensor
// where there is no `k`.
template <class Run>
std::tuple<at::Tensor, at::Tensor> rope_call(const at::Tensor& q, const at::Tensor* k, const at::Tensor& cos,
                                             const at::Tensor& sin, const at::Tensor* positions, int64_t seq_dim,
                                             bool interleaved, bool inverse, bool inplace, Run&& run) {
  RopeParams p{};
  const RopeShape shape("q", q, seq_dim);
  const RopeTables tables(q, shape, cos, sin, positions, p);
  p.interleaved = interleaved;
  p.inverse = inverse;
  const RopeOperand of_q(q, inplace);
  RopeOperand of_k;
  p.tensors[0] = of_q.params(shape);
  if (k != nullptr) {
    check_device(kRope, "k", *k, q.device());
    check_dtype(kRope, "k", *k, q.scalar_type());
    const RopeShape other("k", *k, seq_dim);
    TORCH_CHECK_VALUE(k->dim() == q.dim() && other.batch == p.batch && other.seq == p.seq && other.cols == p.cols, kRope,
                      ": k has shape ", k->sizes(), ", expected ", q.sizes(), ", but for the number of heads");
    of_k = RopeOperand(*k, inplace);
    p.tensors[1] = of_k.params(other);
  }
  if (p.batch * p.seq * (p.tensors[0].heads + p.tensors[1].heads) > 0) run(p);
  of_q.finish();
  if (k != nullptr) of_k.finish();
  return {of_q.result, k != nullptr ? of_k.result : empty({0}, q.options())};
}

}  // namespace llmkernels
