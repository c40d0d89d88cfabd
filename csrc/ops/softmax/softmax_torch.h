// What the CPU and the CUDA binding of the softmax family share: tensors -> params, with every check that protects
// memory. Only the device differs, and who runs the params.
#pragma once

#include <array>
#include <tuple>

#include "ops/softmax/softmax.h"
#include "torch/checks.h"

namespace llmkernels {

struct SoftmaxShape {
  int64_t rows = 1, cols = 1;
  explicit SoftmaxShape(const at::Tensor& x) {
    if (x.dim() > 0) cols = x.size(-1);
    for (int64_t i = 0; i + 1 < x.dim(); ++i) rows *= x.size(i);
  }
};

// A mask that expands to `x`, as rows: neighbouring dimensions that step as one are joined. `owner` keeps the memory
// alive, a copy if the columns have no memory of their own or more than kMaskDims dimensions are left.
struct Mask {
  at::Tensor owner;
  MaskRows rows{};

  Mask(const char* op, const at::Tensor* given, const at::Tensor& x, int64_t cols) {
    for (int64_t& size : rows.sizes) size = 1;
    if (given == nullptr) return;
    check_device(op, "mask", *given, x.device());
    rows.kind = given->scalar_type() == at::kBool             ? MaskKind::kBool
                : given->scalar_type() == x.scalar_type() ? MaskKind::kOwn
                                                              : MaskKind::kAcc;
    if (rows.kind == MaskKind::kAcc) check_dtype(op, "mask", *given, acc_of(x));
    TORCH_CHECK_VALUE(given->dim() <= x.dim(), op, ": mask has shape ", given->sizes(), ", expected one that expands to ",
                      x.sizes());
    for (int64_t i = 1; i <= given->dim(); ++i) {
      TORCH_CHECK_VALUE(given->size(-i) == 1 || given->size(-i) == x.size(-i), op, ": mask has shape ", given->sizes(),
                        ", expected one that expands to ", x.sizes());
    }
    owner = *given;
    if (x.dim() > 0 && cols > 1 && (owner.dim() == 0 || owner.size(-1) != cols || owner.stride(-1) != 1)) {
      at::DimVector sizes(owner.sizes());
      if (sizes.empty()) sizes.push_back(1);
      sizes.back() = cols;
      owner = owner.expand(sizes).contiguous();
    }
    if (!fill(x)) {
      owner = owner.expand(x.sizes()).contiguous();
      fill(x);
    }
    rows.data = owner.data_ptr();
  }

 private:
  bool fill(const at::Tensor& x) {
    const at::Tensor wide = owner.expand(x.sizes());
    for (int d = 0; d < kMaskDims; ++d) {
      rows.sizes[d] = 1;
      rows.strides[d] = 0;
    }
    int at = kMaskDims;
    for (int64_t i = x.dim() - 2; i >= 0; --i) {
      const int64_t size = wide.size(i), stride = size == 1 ? 0 : wide.stride(i);
      if (size == 1) continue;
      if (at < kMaskDims && stride == rows.strides[at] * rows.sizes[at]) {
        rows.sizes[at] *= size;
        continue;
      }
      if (at == 0) return false;
      --at;
      rows.sizes[at] = size;
      rows.strides[at] = stride;
    }
    // The slowest dimension is the first: an absent one in front of it has one place.
    if (at < kMaskDims && at > 0) {
      rows.sizes[0] = 1;
      rows.strides[0] = 0;
    }
    return true;
  }
};

// `run(params)` fills the output; it is not called when there is nothing to fill.
template <class Run>
at::Tensor softmax_fwd_call(const char* op, const at::Tensor& x, const at::Tensor* mask, double scale, bool log,
                            Run&& run) {
  SoftmaxFwdParams p{};
  p.dtype = dtype_of(op, "x", x);
  const SoftmaxShape shape(x);
  const Rows x_rows = as_rows(x, shape.rows, shape.cols);
  const Mask masked(op, mask, x, shape.cols);
  at::Tensor y = empty(x.sizes(), x.options());
  p.x = x_rows.data();
  p.y = y.data_ptr();
  p.mask = masked.rows;
  p.rows = shape.rows;
  p.cols = shape.cols;
  p.x_row_stride = x_rows.stride;
  p.scale = scale;
  p.log = log;
  if (y.numel() > 0) run(p);
  return y;
}

// Returns (dx, ds); what is not wanted is empty.
template <class Run>
std::tuple<at::Tensor, at::Tensor> softmax_bwd_call(const char* op, const at::Tensor& dy, const at::Tensor& y,
                                                    double scale, bool log, std::array<bool, 2> wanted, Run&& run) {
  SoftmaxBwdParams p{};
  p.dtype = dtype_of(op, "y", y);
  const SoftmaxShape shape(y);
  const Rows y_rows = as_rows(y, shape.rows, shape.cols);
  const Rows dy_rows = rows_like(op, "dy", &dy, y, y.sizes(), shape.rows, shape.cols);
  at::Tensor dx = empty(wanted[0] ? y.sizes() : at::IntArrayRef{0}, y.options());
  at::Tensor ds = empty(wanted[1] ? y.sizes() : at::IntArrayRef{0}, y.options().dtype(acc_of(y)));
  p.dy = dy_rows.data();
  p.y = y_rows.data();
  p.dx = wanted[0] ? dx.data_ptr() : nullptr;
  p.ds = wanted[1] ? ds.data_ptr() : nullptr;
  p.rows = shape.rows;
  p.cols = shape.cols;
  p.dy_row_stride = dy_rows.stride;
  p.y_row_stride = y_rows.stride;
  p.scale = scale;
  p.log = log;
  if (y.numel() > 0 && (wanted[0] || wanted[1])) run(p);
  return {dx, ds};
}

}  // namespace llmkernels
