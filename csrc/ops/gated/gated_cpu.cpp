// swiglu, geglu and reglu on the CPU, compiled once per instruction set. The maths is in gated.h.
#include "ops/gated/gated_cpu.h"

#include "common/cpu/map.h"
#include "ops/gated/activated_cpu.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class T, Activation kActivation>
void fwd_elements(const GatedFwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  for_each_part(p.cols, begin, end, [&](int64_t row, int64_t first, int64_t stop) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_row_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_row_stride;
    T* y = static_cast<T*>(p.y) + row * p.cols;
    map<T, 2, 1>(first, stop, {gate, up}, {y}, [](const Vec<Acc>(&in)[2], Vec<Acc>(&out)[1]) {
      out[0] = activated<T, kActivation>(in[0]) * in[1];
    });
  });
}

template <class T, Activation kActivation>
void bwd_elements(const GatedBwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  for_each_part(p.cols, begin, end, [&](int64_t row, int64_t first, int64_t stop) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
    const T* gate = static_cast<const T*>(p.gate) + row * p.gate_row_stride;
    const T* up = static_cast<const T*>(p.up) + row * p.up_row_stride;
    T* dgate = p.dgate != nullptr ? static_cast<T*>(p.dgate) + row * p.grad_row_stride : nullptr;
    T* dup = p.dup != nullptr ? static_cast<T*>(p.dup) + row * p.grad_row_stride : nullptr;
    map<T, 3, 2>(first, stop, {dy, gate, up}, {dgate, dup}, [](const Vec<Acc>(&in)[3], Vec<Acc>(&out)[2]) {
      const Pulled<Acc> pulled = pulled_back<T, kActivation>(in[1], in[0] * in[2]);
      out[0] = pulled.gradient;
      out[1] = in[0] * pulled.value;
    });
  });
}

}  // namespace

void gated_fwd(const GatedFwdParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, p.activation, [&](auto t, auto activation) {
    fwd_elements<decltype(t), decltype(activation)::value>(p, begin, end);
  });
}

void gated_bwd(const GatedBwdParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, p.activation, [&](auto t, auto activation) {
    bwd_elements<decltype(t), decltype(activation)::value>(p, begin, end);
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
