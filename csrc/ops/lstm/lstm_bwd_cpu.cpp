// The recurrence of an LSTM layer, backward, compiled once per instruction set.
#include "ops/lstm/lstm_blocks.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// Step s begins with the products of the gradients of step s + 1's gates, which give what arrives at the h of step s
// from there, and ends with the gradients of its own gates.
template <class T>
struct Backward {
  using Acc = AccOf<T>;
  static constexpr int kUnits = kLanes<Acc>;

  const LSTMBwdParams& p;
  const LSTMScratch& scratch;
  int64_t H = p.at.hidden, R = p.at.size;
  int64_t d_stride = operand_stride<T>(4 * H), inner_stride = operand_stride<T>(R);

  Operand<T>* hh_panel(int64_t block) const {
    return reinterpret_cast<Operand<T>*>(static_cast<char*>(scratch.hh_panels) + block * panel_bytes<T>(4 * H));
  }
  Operand<T>* hr_panel(int64_t block) const {
    return reinterpret_cast<Operand<T>*>(static_cast<char*>(scratch.hr_panels) + block * panel_bytes<T>(R));
  }
  Operand<T>* dgates(int64_t step) const { return static_cast<Operand<T>*>(scratch.operand[(step + 2) % 2]); }
  Operand<T>* inner() const { return static_cast<Operand<T>*>(scratch.inner); }
  int64_t count(int64_t step) const { return step >= 0 && step < p.at.steps ? p.at.count[step] : 0; }

  // Behind dm: the gradients of sequence b's gates for kUnits units, and of c.
  template <class Part>
  void units(int64_t step, int64_t b, int64_t unit, Vec<Acc> dm, Part part) const {
    const int64_t row = p.at.first[step] + b;
    const T* gates = static_cast<const T*>(p.gates) + row * 4 * H + unit;
    Vec<Acc> active[4];
    for (int q = 0; q < 4; ++q) active[q] = part.load(gates + q * H);
    const Vec<Acc> last_c = b < count(step - 1)
                                ? part.load(static_cast<const Acc*>(p.cells) + (p.at.first[step - 1] + b) * H + unit)
                                : part.load(static_cast<const T*>(p.c0) + b * H + unit);
    Acc* dc_state = static_cast<Acc*>(scratch.c) + b * H + unit;
    Vec<Acc> dc = part.load(dc_state);
    if (p.dcells != nullptr) dc += part.load(static_cast<const Acc*>(p.dcells) + row * H + unit);
    const Vec<Acc> c = part.load(static_cast<const Acc*>(p.cells) + row * H + unit);
    const StepGradient<Acc> s = step_backward<T>(active, last_c, c, dm, dc);
    part.store(dc_state, s.dc);
    T* out = static_cast<T*>(p.dgates) + row * 4 * H + unit;
    Operand<T>* next = dgates(step) + b * d_stride + unit;
    for (int q = 0; q < 4; ++q) store_both<T>(out + q * H, next + q * H, s.dgates[q], part);
    if (p.m != nullptr) part.store(static_cast<T*>(p.m) + row * H + unit, s.m);
  }

  // What arrives at h of sequence b in kUnits columns, all but dy: goes on to the gates, or waits in the state.
  void arrived(int64_t step, int64_t b, int64_t column, Vec<Acc> dh, bool product) const {
    with_units<Acc>(column, R, [&](auto part) {
      Acc* state = static_cast<Acc*>(scratch.dh) + b * R + column;
      if (b >= count(step)) {
        part.store(state, dh);
        return;
      }
      if (!product) dh = part.load(state);
      const int64_t row = p.at.first[step] + b;
      if (p.dy != nullptr) dh += part.load(static_cast<const T*>(p.dy) + row * R + column);
      if (p.w_hr == nullptr) {
        units(step, b, column, dh, part);
      } else {
        T* out = p.dh != nullptr ? static_cast<T*>(p.dh) + row * R + column : nullptr;
        store_both<T>(out, inner() + b * inner_stride + column, dh, part);
      }
    });
  }

  // What a row of the sums of a block becomes.
  struct Arrived {
    const Backward& of;
    int64_t step, first;

    template <class Where>
    void fetch(int64_t b, Where) const {
      if (of.p.w_hr == nullptr) of.template fetch<Where>(step, b, first);
    }
    void operator()(int64_t b, const Vec<Acc> (&dh)[kBlockVectors]) const {
      for (int v = 0; v < kBlockVectors; ++v) of.arrived(step, b, first + v * kUnits, dh[v], true);
    }
  };

  struct Units {
    const Backward& of;
    int64_t step, first;

    template <class Where>
    void fetch(int64_t b, Where) const { of.template fetch<Where>(step, b, first); }
    void operator()(int64_t b, const Vec<Acc> (&dm)[kBlockVectors]) const {
      for (int v = 0; v < kBlockVectors; ++v) {
        const int64_t unit = first + v * kUnits;
        with_units<Acc>(unit, of.H, [&](auto part) { of.units(step, b, unit, dm[v], part); });
      }
    }
  };

  // What the units of a block read and write of sequence `b`.
  template <class Where>
  void fetch(int64_t step, int64_t b, int64_t first) const {
    if (b >= count(step)) return;
    const int64_t row = p.at.first[step] + b, cols = H - first < kBlockColumns<T> ? H - first : kBlockColumns<T>;
    for (int q = 0; q < 4; ++q) {
      const int64_t at = (row * 4 + q) * H + first;
      CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.gates) + at, cols);
      CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.dgates) + at, cols);
    }
    CPU_CAPABILITY::fetch<Where>(static_cast<const Acc*>(p.cells) + row * H + first, cols);
    if (p.dy != nullptr && p.w_hr == nullptr) CPU_CAPABILITY::fetch<Where>(static_cast<const T*>(p.dy) + row * R + first, cols);
    if (b < count(step - 1)) {
      CPU_CAPABILITY::fetch<Where>(static_cast<const Acc*>(p.cells) + (p.at.first[step - 1] + b) * H + first, cols);
    }
  }

  void step(bool packed, int64_t step, bool projection, int64_t begin, int64_t end) const {
    if (projection) {
      multiply_column_blocks<T>(
          packed, inner(), inner_stride, count(step), static_cast<const T*>(p.w_hr), R, H, begin, end,
          [&](int64_t block) { return hr_panel(block); }, [&](int64_t first) { return Units{*this, step, first}; });
      return;
    }
    const int64_t rows = count(step + 1);
    multiply_column_blocks<T>(
        packed, dgates(step + 1), d_stride, rows, static_cast<const T*>(p.w_hh), 4 * H, R, begin, end,
        [&](int64_t block) { return hh_panel(block); }, [&](int64_t first) { return Arrived{*this, step, first}; });
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t b = rows; b < count(step); ++b) {
        for (int v = 0; v < kBlockVectors; ++v) {
          arrived(step, b, block * kBlockColumns<T> + v * kUnits, Vec<Acc>{}, false);
        }
      }
    }
  }

  void pack(bool projection, int64_t begin, int64_t end) const {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockColumns<T>;
      if (!projection) {
        pack_columns<T>(hh_panel(block), static_cast<const T*>(p.w_hh), 4 * H, R, first);
      } else {
        pack_columns<T>(hr_panel(block), static_cast<const T*>(p.w_hr), R, H, first);
      }
    }
  }

  void start() const {
    for (int turn = 0; turn < 2; ++turn) operands_from<T>(dgates(turn), d_stride, nullptr, p.at.batch, 4 * H);
    if (p.w_hr != nullptr) operands_from<T>(inner(), inner_stride, nullptr, p.at.batch, R);
    sums_from<T>(static_cast<Acc*>(scratch.c), static_cast<const T*>(p.dc_n), p.at.batch * H);
    sums_from<T>(static_cast<Acc*>(scratch.dh), static_cast<const T*>(p.dh_n), p.at.batch * R);
  }

  void finish() const {
    sums_to<T>(static_cast<T*>(p.dc0), static_cast<const Acc*>(scratch.c), p.at.batch * H);
    sums_to<T>(static_cast<T*>(p.dh0), static_cast<const Acc*>(scratch.dh), p.at.batch * R);
  }
};

}  // namespace

void lstm_bwd_begin(const LSTMBwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { Backward<decltype(t)>{p, scratch}.start(); });
}

void lstm_bwd_pack(const LSTMBwdParams& p, const LSTMScratch& scratch, bool projection, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { Backward<decltype(t)>{p, scratch}.pack(projection, begin, end); });
}

void lstm_bwd_step(const LSTMBwdParams& p, const LSTMScratch& scratch, bool packed, int64_t step, bool projection,
                   int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) { Backward<decltype(t)>{p, scratch}.step(packed, step, projection, begin, end); });
}

void lstm_bwd_end(const LSTMBwdParams& p, const LSTMScratch& scratch) {
  with_type(p.dtype, [&](auto t) { Backward<decltype(t)>{p, scratch}.finish(); });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
