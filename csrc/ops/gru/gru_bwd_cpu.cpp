// The recurrence of a GRU layer, backward, compiled once per instruction set.
#include "ops/gru/gru_cpu.h"
#include "ops/gru/gru_step.h"
#include "ops/lstm/lstm_blocks.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Step s begins with the products of the gradients that step s + 1 gave to h @ w_hh^T, which are a part of what arrives
// at the h of step s, and ends with the gradients of its own.
template <class T>
struct GRUBackward {
  using Acc = AccOf<T>;
  static constexpr int kUnits = kLanes<Acc>;

  const GRUBwdParams& p;
  const LSTMScratch& scratch;
  int64_t H = p.at.hidden, d_stride = operand_stride<T>(kGruGates * H);

  Operand<T>* panel(int64_t block) const {
    return reinterpret_cast<Operand<T>*>(static_cast<char*>(scratch.hh_panels) + block * panel_bytes<T>(kGruGates * H));
  }
  Operand<T>* dgates(int64_t step) const { return static_cast<Operand<T>*>(scratch.operand[(step + 2) % 2]); }
  int64_t count(int64_t step) const { return step >= 0 && step < p.at.steps ? p.at.count[step] : 0; }
  const T* h_before(int64_t step, int64_t b) const {
    return b < count(step - 1) ? static_cast<const T*>(p.y) + (p.at.first[step - 1] + b) * H
                               : static_cast<const T*>(p.h0) + b * H;
  }

  // The product's part of what arrives at h of sequence b in kUnits columns: goes on to the gates with the rest, or
  // waits in the state.
  void arrived(int64_t step, int64_t b, int64_t unit, Vec<Acc> dh) const {
    with_units<Acc>(unit, H, [&](auto part) {
      Acc* state = static_cast<Acc*>(scratch.dh) + b * H + unit;
      dh += part.load(state);
      if (b >= count(step)) {
        part.store(state, dh);
        return;
      }
      const int64_t row = p.at.first[step] + b;
      if (p.dy != nullptr) dh += part.load(static_cast<const T*>(p.dy) + row * H + unit);
      const T* gates = static_cast<const T*>(p.gates) + row * 4 * H + unit;
      Vec<Acc> saved[4];
      for (int q = 0; q < 4; ++q) saved[q] = part.load(gates + q * H);
      const GRUGradient<Acc> s = gru_backward<T>(saved, part.load(h_before(step, b) + unit), dh);
      part.store(state, s.dh);
      T* out = static_cast<T*>(p.dgates_x) + row * kGruGates * H + unit;
      T* of_h = p.dgates_h != nullptr ? static_cast<T*>(p.dgates_h) + row * kGruGates * H + unit : nullptr;
      Operand<T>* next = dgates(step) + b * d_stride + unit;
      for (int q = 0; q < kGruGates; ++q) {
        part.store(out + q * H, s.dx[q]);
        store_both<T>(of_h != nullptr ? of_h + q * H : nullptr, next + q * H, s.of_h[q], part);
      }
    });
  }

  // What a row of the sums of a block becomes.
  struct Arrived {
    const GRUBackward& of;
    int64_t step, first;

    template <class Where>
    void fetch(int64_t b, Where) const {
      if (b >= of.count(step)) return;
      const GRUBwdParams& p = of.p;
      const int64_t H = of.H, row = p.at.first[step] + b;
      const int64_t cols = H - first < kBlockColumns<T> ? H - first : kBlockColumns<T>;
      for (int q = 0; q < 4; ++q) {
        CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.gates) + (row * 4 + q) * H + first, cols);
      }
      for (int q = 0; q < kGruGates; ++q) {
        const int64_t at = (row * kGruGates + q) * H + first;
        CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.dgates_x) + at, cols);
        if (p.dgates_h != nullptr) CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.dgates_h) + at, cols);
      }
      CPU_CAPABILITY::fetch<Where>(of.h_before(step, b) + first, cols);
      if (p.dy != nullptr) CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.dy) + row * H + first, cols);
    }

    void operator()(int64_t b, const Vec<Acc> (&dh)[kBlockVectors]) const {
      for (int v = 0; v < kBlockVectors; ++v) of.arrived(step, b, first + v * kUnits, dh[v]);
    }
  };

  void step(bool packed, int64_t step, int64_t begin, int64_t end) const {
    const int64_t rows = count(step + 1);
    multiply_column_blocks<T>(
        packed, dgates(step + 1), d_stride, rows, static_cast<const T*>(p.w_hh), kGruGates * H, H, begin, end,
        [&](int64_t block) { return panel(block); }, [&](int64_t first) { return Arrived{*this, step, first}; });
    const Vec<Acc> nothing[kBlockVectors] = {};
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t b = rows; b < count(step); ++b) Arrived{*this, step, block * kBlockColumns<T>}(b, nothing);
    }
  }

  void pack(int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      pack_columns<T>(panel(block), static_cast<const T*>(p.w_hh), kGruGates * H, H, block * kBlockColumns<T>);
    }
  }

  void start() const {
    for (int turn = 0; turn < 2; ++turn) operands_from<T>(dgates(turn), d_stride, nullptr, p.at.batch, kGruGates * H);
    sums_from<T>(static_cast<Acc*>(scratch.dh), static_cast<const T*>(p.dh_n), p.at.batch * H);
  }

  void finish() const {
    sums_to<T>(static_cast<T*>(p.dh0), static_cast<const Acc*>(scratch.dh), p.at.batch * H);
  }
};

}  // namespace

void gru_bwd_begin(const GRUBwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { GRUBackward<decltype(t)>{p, scratch}.start(); });
}

void gru_bwd_pack(const GRUBwdParams& p, const LSTMScratch& scratch, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { GRUBackward<decltype(t)>{p, scratch}.pack(begin, end); });
}

void gru_bwd_step(const GRUBwdParams& p, const LSTMScratch& scratch, bool packed, int64_t step, int64_t begin,
                  int64_t end) {
  with_type(p.dtype, [&](auto t) { GRUBackward<decltype(t)>{p, scratch}.step(packed, step, begin, end); });
}

void gru_bwd_end(const GRUBwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { GRUBackward<decltype(t)>{p, scratch}.finish(); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
