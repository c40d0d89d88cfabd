// Activations with a bias on the CPU, compiled once per instruction set.
#include "ops/activation/activation_cpu.h"

#include "common/cpu/map.h"
#include "ops/gated/activated_cpu.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

template <class T, Activation kActivation>
void fwd_elements(const ActivationFwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const Acc* bias = static_cast<const Acc*>(p.bias);
  for_each_part(p.cols, begin, end, [&](int64_t row, int64_t first, int64_t stop) {
    const T* input = static_cast<const T*>(p.input) + row * p.input_row_stride;
    T* y = static_cast<T*>(p.y) + row * p.cols;
    if (bias == nullptr) {
      map<T, 1, 1>(first, stop, {input}, {y}, [](const Vec<Acc>(&in)[1], Vec<Acc>(&out)[1]) {
        out[0] = activated<T, kActivation>(in[0]);
      });
    } else {
      for_each_vector<Acc>(first, stop, [&](int64_t j, auto part) {
        part.store(y + j, activated<T, kActivation>(part.load(input + j) + part.load(bias + j)));
      });
    }
  });
}

template <class T, Activation kActivation>
void bwd_elements(const ActivationBwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const Acc* bias = static_cast<const Acc*>(p.bias);
  for_each_part(p.cols, begin, end, [&](int64_t row, int64_t first, int64_t stop) {
    const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
    const T* input = static_cast<const T*>(p.input) + row * p.input_row_stride;
    T* dinput = static_cast<T*>(p.dinput) + row * p.cols;
    if (bias == nullptr) {
      map<T, 2, 1>(first, stop, {dy, input}, {dinput}, [](const Vec<Acc>(&in)[2], Vec<Acc>(&out)[1]) {
        out[0] = pulled_back<T, kActivation>(in[1], in[0]).gradient;
      });
    } else {
      for_each_vector<Acc>(first, stop, [&](int64_t j, auto part) {
        const Vec<Acc> at = part.load(input + j) + part.load(bias + j);
        part.store(dinput + j, pulled_back<T, kActivation>(at, part.load(dy + j)).gradient);
      });
    }
  });
}

template <class T, Activation kActivation>
void bwd_slabs(const ActivationBwdParams& p, int64_t begin, int64_t end) {
  using Acc = AccOf<T>;
  const Acc* bias = static_cast<const Acc*>(p.bias);
  for (int64_t slab = begin; slab < end; ++slab) {
    Acc* partial = static_cast<Acc*>(p.partial) + slab * p.cols;
    for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) { part.store(partial + j, Vec<Acc>{}); });
    const int64_t first = slab * kActivationSlabRows;
    const int64_t stop = first + kActivationSlabRows < p.rows ? first + kActivationSlabRows : p.rows;
    for (int64_t row = first; row < stop; ++row) {
      const T* dy = static_cast<const T*>(p.dy) + row * p.dy_row_stride;
      const T* input = static_cast<const T*>(p.input) + row * p.input_row_stride;
      T* dinput = p.dinput != nullptr ? static_cast<T*>(p.dinput) + row * p.cols : nullptr;
      for_each_vector<Acc>(0, p.cols, [&](int64_t j, auto part) {
        Vec<Acc> at = part.load(input + j);
        if (bias != nullptr) at += part.load(bias + j);
        const Vec<Acc> gradient = rounded(pulled_back<T, kActivation>(at, part.load(dy + j)).gradient);
        if (dinput != nullptr) part.store(dinput + j, gradient);
        part.store(partial + j, part.load(partial + j) + gradient);
      });
    }
  }
}

}  // namespace

void activation_fwd(const ActivationFwdParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, p.activation, [&](auto t, auto activation) {
    fwd_elements<decltype(t), decltype(activation)::value>(p, begin, end);
  });
}

void activation_bwd(const ActivationBwdParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, p.activation, [&](auto t, auto activation) {
    bwd_elements<decltype(t), decltype(activation)::value>(p, begin, end);
  });
}

void activation_bwd_sums(const ActivationBwdParams& p, int64_t begin, int64_t end) {
  with_types(p.dtype, p.activation, [&](auto t, auto activation) {
    bwd_slabs<decltype(t), decltype(activation)::value>(p, begin, end);
  });
}

}  // namespace llmkernels::cpu::CPU_CAPABILITY
