// The recurrence of a GRU layer, forward, compiled once per instruction set.
#include "ops/gru/gru_cpu.h"
#include "ops/gru/gru_step.h"
#include "ops/lstm/lstm_blocks.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class T>
struct GRUForward {
  using Acc = AccOf<T>;
  static constexpr int kUnits = kLanes<Acc>;  // of a block: their three gates

  const GRUFwdParams& p;
  const LSTMScratch& scratch;
  int64_t H = p.at.hidden, h_stride = operand_stride<T>(H);

  Operand<T>* panel(int64_t block) const {
    return reinterpret_cast<Operand<T>*>(static_cast<char*>(scratch.hh_panels) + block * panel_bytes<T, kGruGates>(H));
  }
  Operand<T>* h(int64_t step) const { return static_cast<Operand<T>*>(scratch.operand[step % 2]); }
  // Row of w_hh for gate v of unit `lane` of a block; null beyond the last unit.
  const T* row_of(int64_t block, int v, int lane) const {
    const int64_t unit = block * kUnits + lane;
    return unit < H ? static_cast<const T*>(p.w_hh) + (v * H + unit) * H : nullptr;
  }

  // What a row of the sums of a block becomes: the step of the sequence `b`.
  struct Units {
    const GRUForward& of;
    int64_t step, unit;

    template <class Where>
    void fetch(int64_t b, Where) const {
      const int64_t row = of.p.at.first[step] + b, H = of.H;
      for (int q = 0; q < kGruGates; ++q) {
        CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(of.p.gates_x) + (row * kGruGates + q) * H + unit, kUnits);
      }
      if (of.p.gates == nullptr) return;
      for (int q = 0; q < 4; ++q) {
        CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(of.p.gates) + (row * 4 + q) * H + unit, kUnits);
      }
    }

    void operator()(int64_t b, const Vec<Acc> (&products)[kGruGates]) const {
      const GRUFwdParams& p = of.p;
      const int64_t H = of.H, row = p.at.first[step] + b;
      const T* gates_x = static_cast<const T*>(p.gates_x) + row * kGruGates * H + unit;
      const T* bias = static_cast<const T*>(p.b_hh);
      with_units<Acc>(unit, H, [&](auto part) {
        Vec<Acc> x[kGruGates], of_h[kGruGates];
        for (int q = 0; q < kGruGates; ++q) {
          x[q] = part.load(gates_x + q * H);
          of_h[q] = bias != nullptr ? products[q] + part.load(bias + q * H + unit) : products[q];
        }
        const GRUState<Acc> s = gru_forward<T>(x, of_h, part.load(of.h(step) + b * of.h_stride + unit));
        store_both<T>(static_cast<T*>(p.y) + row * H + unit, of.h(step + 1) + b * of.h_stride + unit, s.h, part);
        if (p.gates == nullptr) return;
        T* gates = static_cast<T*>(p.gates) + row * 4 * H + unit;
        for (int q = 0; q < 4; ++q) part.store(gates + q * H, s.gates[q]);
      });
    }
  };

  void step(bool packed, int64_t step, int64_t begin, int64_t end) const {
    multiply_blocks<T, kGruGates>(
        packed, h(step), h_stride, p.at.count[step], static_cast<const T*>(p.w_hh), H, begin, end,
        [&](int64_t block) { return panel(block); },
        [&](int64_t block, int v, int lane) { return row_of(block, v, lane); },
        [&](int64_t block) { return Units{*this, step, block * kUnits}; });
  }

  void pack(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      pack_rows<T, kGruGates>(panel(block), H, [&](int v, int lane) { return row_of(block, v, lane); });
    }
  }

  void start() const {
    // Both, for a sequence that only begins at a later step.
    for (int turn = 0; turn < 2; ++turn) {
      operands_from<T>(h(turn), h_stride, static_cast<const T*>(p.h0), p.at.batch, H);
    }
  }

  void finish() const {
    last_rows<T>(p.at, static_cast<const T*>(p.y), static_cast<const T*>(p.h0), static_cast<T*>(p.h_n));
  }
};

}  // namespace

LSTMLayout gru_layout(DType dtype, const LSTMSteps& at, bool forward) {
  LSTMLayout result{};
  with_type(dtype, [&](auto t) { result = layout_of<decltype(t), kGruGates>(at, false, forward); });
  return result;
}

void gru_fwd_begin(const GRUFwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { GRUForward<decltype(t)>{p, scratch}.start(); });
}

void gru_fwd_pack(const GRUFwdParams& p, const LSTMScratch& scratch, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { GRUForward<decltype(t)>{p, scratch}.pack(begin, end); });
}

void gru_fwd_step(const GRUFwdParams& p, const LSTMScratch& scratch, bool packed, int64_t step, int64_t begin,
                  int64_t end) {
  with_type(p.dtype, [&](auto t) { GRUForward<decltype(t)>{p, scratch}.step(packed, step, begin, end); });
}

void gru_fwd_end(const GRUFwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { GRUForward<decltype(t)>{p, scratch}.finish(); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
