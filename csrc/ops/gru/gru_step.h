// One step of one vector of units of a GRU: all but the products. As vec.h: for sources that are compiled once per
// instruction set.
#pragma once

#include "ops/lstm/lstm_step.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

constexpr int kGruGates = 3;

template <class Acc>
struct GRUState {
  Vec<Acc> gates[4];  // r, z, n, h_n
  Vec<Acc> h;         // after the step
};

// From what the input and what h add to the gates, and h before the step.
template <class T, class Acc = AccOf<T>>
LLMKERNELS_INLINE_ALL GRUState<Acc> gru_forward(const Vec<Acc> (&x)[kGruGates], const Vec<Acc> (&of_h)[kGruGates],
                                                Vec<Acc> h) {
  GRUState<Acc> s;
  s.gates[0] = sigmoid<Acc, kCoarse<T>>(x[0] + of_h[0]);
  s.gates[1] = sigmoid<Acc, kCoarse<T>>(x[1] + of_h[1]);
  s.gates[2] = tanh<Acc, kCoarse<T>>(x[2] + s.gates[0] * of_h[2]);
  s.gates[3] = of_h[2];
  s.h = s.gates[2] + s.gates[1] * (h - s.gates[2]);
  return s;
}

template <class Acc>
struct GRUGradient {
  Vec<Acc> dx[kGruGates];    // of gates_x
  Vec<Acc> of_h[kGruGates];  // of h @ w_hh^T + b_hh
  Vec<Acc> dh;               // of h before the step, but for what the product gives
};

// From the saved gates, h before the step, and the gradient of h after it.
template <class T, class Acc = AccOf<T>>
LLMKERNELS_INLINE_ALL GRUGradient<Acc> gru_backward(const Vec<Acc> (&gates)[4], Vec<Acc> h, Vec<Acc> dh) {
  const auto& [r, z, n, h_n] = gates;
  GRUGradient<Acc> s;
  s.dx[2] = dh * (Acc{1} - z) * (Acc{1} - n * n);
  s.dx[0] = s.dx[2] * h_n * (r * (Acc{1} - r));
  s.dx[1] = dh * (h - n) * (z * (Acc{1} - z));
  s.of_h[0] = s.dx[0];
  s.of_h[1] = s.dx[1];
  s.of_h[2] = s.dx[2] * r;
  s.dh = dh * z;
  return s;
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
