// Products of many rows with weights, for the inputs of all steps: the tiles of the recurrence, which multiply about as
// fast as the processor can.
#include "ops/lstm/lstm_blocks.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class T>
struct RowsProduct {
  using Acc = AccOf<T>;
  // Rows whose sums are finished together: the panels of all weights are read once for so many.
  static constexpr int64_t kGroup = kHeldTiles * kTileRows;

  const RowsProductParams& p;
  int64_t stride = operand_stride<T>(p.common);

  int64_t blocks() const { return (p.cols + kBlockColumns<T> - 1) / kBlockColumns<T>; }
  int64_t group_bytes() const { return kGroup * stride * static_cast<int64_t>(sizeof(Operand<T>)); }
  int64_t panel_elements() const { return panel_bytes<T>(p.common) / static_cast<int64_t>(sizeof(Operand<T>)); }

  struct Finished {
    const RowsProductParams& p;
    int64_t first_row, first;

    T* out(int64_t row) const { return static_cast<T*>(p.out) + (first_row + row) * p.cols + first; }
    template <class Where>
    void fetch(int64_t row, Where) const {
      CPU_CAPABILITY::fetch<Where>(out(row), p.cols - first < kBlockColumns<T> ? p.cols - first : kBlockColumns<T>);
    }
    void operator()(int64_t row, const Vec<Acc> (&sums)[kBlockVectors]) const {
      for (int v = 0; v < kBlockVectors; ++v) {
        const int64_t column = v * kLanes<Acc>;
        with_units<Acc>(first + column, p.cols, [&](auto part) {
          const T* bias = static_cast<const T*>(p.bias);
          part.store(out(row) + column, bias != nullptr ? sums[v] + part.load(bias + first + column) : sums[v]);
        });
      }
    }
  };

  void pack(Operand<T>* panels, int64_t begin, int64_t end) const {
    const T* weights = static_cast<const T*>(p.weights);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockColumns<T>;
      if (p.columns) {
        pack_columns<T>(panels + block * panel_elements(), weights, p.common, p.cols, first);
        continue;
      }
      pack_rows<T, kBlockVectors>(panels + block * panel_elements(), p.common, [&](int v, int lane) {
        const int64_t column = first + v * kLanes<Acc> + lane;
        return column < p.cols ? weights + column * p.common : nullptr;
      });
    }
  }

  void multiply(const Operand<T>* panels, Operand<T>* operand, int64_t begin, int64_t end) const {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first_row = group * kGroup, rows = p.rows - first_row < kGroup ? p.rows - first_row : kGroup;
      operands_from<T>(operand, stride, static_cast<const T*>(p.x) + first_row * p.common, rows, p.common);
      for (int64_t block = 0; block < blocks(); ++block) {
        const int64_t next = block + 1 < blocks() ? block + 1 : 0;
        multiply_rows<T, kBlockVectors>(operand, stride, rows, panels + block * panel_elements(),
                                        panels + next * panel_elements(), depth_of<T>(p.common),
                                        Finished{p, first_row, block * kBlockColumns<T>});
      }
    }
  }
};

}  // namespace

RowsProductLayout rows_product_layout(const RowsProductParams& p) {
  RowsProductLayout l{};
  with_type(p.dtype, [&](auto t) {
    const RowsProduct<decltype(t)> product{p};
    l = {product.blocks(), panel_bytes<decltype(t)>(p.common), product.kGroup, product.group_bytes()};
  });
  return l;
}

void rows_product_pack(const RowsProductParams& p, void* panels, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) {
    RowsProduct<decltype(t)>{p}.pack(static_cast<Operand<decltype(t)>*>(panels), begin, end);
  });
}

void rows_product(const RowsProductParams& p, const void* panels, void* operand, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) {
    using T = decltype(t);
    RowsProduct<T>{p}.multiply(static_cast<const Operand<T>*>(panels), static_cast<Operand<T>*>(operand), begin, end);
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
