// One step of one vector of units: all but the products. As vec.h: for sources that are compiled once per instruction
// set.
#pragma once

#include "common/cpu/math.h"
#include "common/dtype.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// 16-bit results have no digits to show the difference.
template <class T>
constexpr bool kCoarse = sizeof(T) == 2;

template <class Acc>
struct StepState {
  Vec<Acc> gates[4];  // activated: i, f, g, o
  Vec<Acc> c, m;      // after the step
};

// With all that they call, by order: gcc 12 otherwise hands vectors over in memory, on a chain that is long enough
// without.
#define LLMKERNELS_INLINE_ALL __attribute__((always_inline, flatten)) inline

template <class T, class Acc = AccOf<T>>
LLMKERNELS_INLINE_ALL StepState<Acc> step_forward(const Vec<Acc> (&sums)[4], Vec<Acc> c) {
  StepState<Acc> s;
  s.gates[0] = sigmoid<Acc, kCoarse<T>>(sums[0]);
  s.gates[1] = sigmoid<Acc, kCoarse<T>>(sums[1]);
  s.gates[2] = tanh<Acc, kCoarse<T>>(sums[2]);
  s.gates[3] = sigmoid<Acc, kCoarse<T>>(sums[3]);
  s.c = s.gates[1] * c + s.gates[0] * s.gates[2];
  s.m = s.gates[3] * tanh<Acc, kCoarse<T>>(s.c);
  return s;
}

template <class Acc>
struct StepGradient {
  Vec<Acc> dgates[4];  // of the gates before their activation
  Vec<Acc> dc, m;      // dc of the step before; what the step gave
};

// From the activated gates, c before and after the step, and the gradients of m and of c after the step.
template <class T, class Acc = AccOf<T>>
LLMKERNELS_INLINE_ALL StepGradient<Acc> step_backward(const Vec<Acc> (&gates)[4], Vec<Acc> c, Vec<Acc> next_c, Vec<Acc> dm,
                                       Vec<Acc> dc) {
  const auto& [i, f, g, o] = gates;
  const Vec<Acc> t = tanh<Acc, kCoarse<T>>(next_c);
  StepGradient<Acc> s;
  s.m = o * t;
  dc = dc + dm * o * (Acc{1} - t * t);
  s.dgates[0] = dc * g * (i * (Acc{1} - i));
  s.dgates[1] = dc * c * (f * (Acc{1} - f));
  s.dgates[2] = dc * i * (Acc{1} - g * g);
  s.dgates[3] = dm * t * (o * (Acc{1} - o));
  s.dc = dc * f;
  return s;
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
