// The recurrence of an LSTM layer, forward, compiled once per instruction set.
#include "ops/lstm/lstm_blocks.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class T>
struct Forward {
  using Acc = AccOf<T>;
  static constexpr int kUnits = kLanes<Acc>;  // of a block of the product with w_hh: their four gates

  const LSTMFwdParams& p;
  const LSTMScratch& scratch;
  int64_t H = p.at.hidden, R = p.at.size;
  int64_t h_stride = operand_stride<T>(R), m_stride = operand_stride<T>(H);

  Operand<T>* hh_panel(int64_t block) const {
    return reinterpret_cast<Operand<T>*>(static_cast<char*>(scratch.hh_panels) + block * panel_bytes<T>(R));
  }
  Operand<T>* hr_panel(int64_t block) const {
    return reinterpret_cast<Operand<T>*>(static_cast<char*>(scratch.hr_panels) + block * panel_bytes<T>(H));
  }
  Operand<T>* h(int64_t step) const { return static_cast<Operand<T>*>(scratch.operand[step % 2]); }
  Operand<T>* m() const { return static_cast<Operand<T>*>(scratch.inner); }
  // Row of w_hh for gate v of unit `lane` of a block; null beyond the last unit.
  const T* hh_row(int64_t block, int v, int lane) const {
    const int64_t unit = block * kUnits + lane;
    return unit < H ? static_cast<const T*>(p.w_hh) + (v * H + unit) * R : nullptr;
  }
  const T* hr_row(int64_t block, int v, int lane) const {
    const int64_t column = block * kBlockColumns<T> + v * kUnits + lane;
    return column < R ? static_cast<const T*>(p.w_hr) + column * H : nullptr;
  }

  // What a row of the sums of a block becomes: the step of the sequence `b`.
  struct Units {
    const Forward& of;
    int64_t step, unit;

    template <class Where>
    void fetch(int64_t b, Where) const {
      const LSTMFwdParams& p = of.p;
      const int64_t row = p.at.first[step] + b, wide = (row * 4) * of.H + unit;
      for (int q = 0; q < 4; ++q) {
        CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.gates_x) + wide + q * of.H, kUnits);
        if (p.gates != nullptr) CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.gates) + wide + q * of.H, kUnits);
      }
    }

    void operator()(int64_t b, const Vec<Acc> (&products)[kBlockVectors]) const {
      const LSTMFwdParams& p = of.p;
      const int64_t H = of.H, R = of.R, row = p.at.first[step] + b;
      const T* gates_x = static_cast<const T*>(p.gates_x) + row * 4 * H + unit;
      Acc* c = static_cast<Acc*>(of.scratch.c) + b * H + unit;
      with_units<Acc>(unit, H, [&](auto part) {
        Vec<Acc> sums[4];
        for (int q = 0; q < 4; ++q) sums[q] = products[q] + part.load(gates_x + q * H);
        const StepState<Acc> s = step_forward<T>(sums, part.load(c));
        part.store(c, s.c);
        if (p.w_hr == nullptr) {
          store_both<T>(static_cast<T*>(p.y) + row * R + unit, of.h(step + 1) + b * of.h_stride + unit, s.m, part);
        } else {
          store_both<T>(static_cast<T*>(nullptr), of.m() + b * of.m_stride + unit, s.m, part);
        }
        if (p.gates == nullptr) return;
        T* gates = static_cast<T*>(p.gates) + row * 4 * H + unit;
        for (int q = 0; q < 4; ++q) part.store(gates + q * H, s.gates[q]);
        part.store(static_cast<Acc*>(p.cells) + row * H + unit, s.c);
      });
    }
  };

  struct Projected {
    const Forward& of;
    int64_t step, first;

    template <class Where>
    void fetch(int64_t, Where) const {}

    void operator()(int64_t b, const Vec<Acc> (&products)[kBlockVectors]) const {
      T* y = static_cast<T*>(of.p.y) + (of.p.at.first[step] + b) * of.R;
      for (int v = 0; v < kBlockVectors; ++v) {
        const int64_t column = first + v * kUnits;
        with_units<Acc>(column, of.R, [&](auto part) {
          store_both<T>(y + column, of.h(step + 1) + b * of.h_stride + column, products[v], part);
        });
      }
    }
  };

  void step(bool packed, int64_t step, bool projection, int64_t begin, int64_t end) const {
    const int64_t rows = p.at.count[step];
    if (!projection) {
      multiply_blocks<T, kBlockVectors>(
          packed, h(step), h_stride, rows, static_cast<const T*>(p.w_hh), R, begin, end,
          [&](int64_t block) { return hh_panel(block); },
          [&](int64_t block, int v, int lane) { return hh_row(block, v, lane); },
          [&](int64_t block) { return Units{*this, step, block * kUnits}; });
    } else {
      multiply_blocks<T, kBlockVectors>(
          packed, m(), m_stride, rows, static_cast<const T*>(p.w_hr), H, begin, end,
          [&](int64_t block) { return hr_panel(block); },
          [&](int64_t block, int v, int lane) { return hr_row(block, v, lane); },
          [&](int64_t block) { return Projected{*this, step, block * kBlockColumns<T>}; });
    }
  }

  void pack(bool projection, int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      if (!projection) {
        pack_rows<T, kBlockVectors>(hh_panel(block), R, [&](int v, int lane) { return hh_row(block, v, lane); });
      } else {
        pack_rows<T, kBlockVectors>(hr_panel(block), H, [&](int v, int lane) { return hr_row(block, v, lane); });
      }
    }
  }

  void start() const {
    // Both, for a sequence that only begins at a later step.
    for (int turn = 0; turn < 2; ++turn) {
      operands_from<T>(h(turn), h_stride, static_cast<const T*>(p.h0), p.at.batch, R);
    }
    if (p.w_hr != nullptr) operands_from<T>(m(), m_stride, nullptr, p.at.batch, H);
    sums_from<T>(static_cast<Acc*>(scratch.c), static_cast<const T*>(p.c0), p.at.batch * H);
  }

  void finish() const {
    sums_to<T>(static_cast<T*>(p.c_n), static_cast<const Acc*>(scratch.c), p.at.batch * H);
    last_rows<T>(p.at, static_cast<const T*>(p.y), static_cast<const T*>(p.h0), static_cast<T*>(p.h_n));
  }
};

}  // namespace

LSTMLayout lstm_layout(DType dtype, const LSTMSteps& at, bool projection, bool forward) {
  LSTMLayout result{};
  with_type(dtype, [&](auto t) { result = layout_of<decltype(t), kBlockVectors>(at, projection, forward); });
  return result;
}

void lstm_fwd_begin(const LSTMFwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { Forward<decltype(t)>{p, scratch}.start(); });
}

void lstm_fwd_pack(const LSTMFwdParams& p, const LSTMScratch& scratch, bool projection, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { Forward<decltype(t)>{p, scratch}.pack(projection, begin, end); });
}

void lstm_fwd_step(const LSTMFwdParams& p, const LSTMScratch& scratch, bool packed, int64_t step, bool projection,
                   int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { Forward<decltype(t)>{p, scratch}.step(packed, step, projection, begin, end); });
}

void lstm_fwd_end(const LSTMFwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { Forward<decltype(t)>{p, scratch}.finish(); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
