// Activations and their gradients on vectors, and the choice of a kernel by type and activation. As vec.h: raw vectors in
// the anonymous namespace of the instruction set. The maths is in gated.h.
#pragma once

#include "common/cpu/map.h"
#include "common/cpu/math.h"
#include "ops/gated/gated.h"

namespace llmkernels::cpu::CPU_CAPABILITY {
namespace {

// 16-bit results have no digits to show the difference.
template <class T>
constexpr bool kCoarse = sizeof(T) == 2;

// 1 / sigmoid(x)
template <class T>
inline Vec<AccOf<T>> inverse_sigmoid(Vec<AccOf<T>> x) {
  return AccOf<T>{1} + exp<AccOf<T>, kCoarse<T>>(-x);
}

// The argument of gelu_tanh's sigmoid, 2 u.
template <class Acc>
inline Vec<Acc> gelu_tanh_argument(Vec<Acc> g) {
  constexpr Acc kScale = static_cast<Acc>(kGeluTanhScale);
  return g * (kScale + static_cast<Acc>(kGeluTanhScale * kGeluTanhCubic) * (g * g));
}

template <class T, Activation kActivation, class Acc = AccOf<T>>
inline Vec<Acc> activated(Vec<Acc> g) {
  if constexpr (kActivation == Activation::kSilu) {
    return g / inverse_sigmoid<T>(g);
  } else if constexpr (kActivation == Activation::kGelu) {
    return g * normal<kCoarse<T>>(g).cdf;
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return g / inverse_sigmoid<T>(gelu_tanh_argument<Acc>(g));
  } else {
    return g < Acc{0} ? Vec<Acc>{} : g;  // a NaN stays
  }
}

// act(g), and d * act'(g) for the gradient d that arrives there.
template <class Acc>
struct Pulled {
  Vec<Acc> value, gradient;
};

template <class T, Activation kActivation, class Acc = AccOf<T>>
inline Pulled<Acc> pulled_back(Vec<Acc> g, Vec<Acc> d) {
  if constexpr (kActivation == Activation::kSilu) {
    const Vec<Acc> s = Acc{1} / inverse_sigmoid<T>(g);
    return {g * s, d * (s * (Acc{1} + g * (Acc{1} - s)))};
  } else if constexpr (kActivation == Activation::kGelu) {
    const Normal<Acc> n = normal<kCoarse<T>>(g);
    return {g * n.cdf, d * (n.cdf + g * n.density)};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    constexpr Acc kScale = static_cast<Acc>(kGeluTanhScale);
    const Vec<Acc> s = Acc{1} / inverse_sigmoid<T>(gelu_tanh_argument<Acc>(g));
    const Vec<Acc> slope = kScale + static_cast<Acc>(3 * kGeluTanhScale * kGeluTanhCubic) * (g * g);
    return {g * s, d * (s * (Acc{1} + g * (Acc{1} - s) * slope))};
  } else {
    return {activated<T, kActivation>(g), g <= Acc{0} ? Vec<Acc>{} : d};
  }
}

template <Activation kActivation>
struct Constant {
  static constexpr Activation value = kActivation;
};

// Calls f(T{}, activation) for the element type and the activation of a call.
template <class T, class F>
inline void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kSilu:
      return f(T{}, Constant<Activation::kSilu>{});
    case Activation::kGelu:
      return f(T{}, Constant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(T{}, Constant<Activation::kGeluTanh>{});
    case Activation::kRelu:
      return f(T{}, Constant<Activation::kRelu>{});
  }
}

template <class F>
inline void with_types(DType dtype, Activation activation, F&& f) {
  with_type(dtype, [&](auto t) { with_activation<decltype(t)>(activation, f); });
}

}  // namespace
}  // namespace llmkernels::cpu::CPU_CAPABILITY
