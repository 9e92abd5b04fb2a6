// The activations of one element, which the vectoriser takes whole.
#pragma once

#include "vector_math.h"

namespace flowkernels {

constexpr float kSqrtTwoOverPi = 0.7978845608f;
constexpr float kCubic = 0.044715f;

FK_INLINE float gelu_argument(float u) {  // 2 z
  return 2.f * kSqrtTwoOverPi * (u + kCubic * u * u * u);
}

FK_INLINE float gelu_gate(float u) { return vector_sigmoid(gelu_argument(u)); }

// Keeps s e, with s = 1 / (1 + e), from being 0 times infinity. NaN stays NaN.
FK_INLINE float finite(float e) { return e > 3e38f ? 3e38f : e; }

// With s = sigmoid(2 z): d/du (u s) = s + u s (1 - s) 2 z', z' = sqrt(2/pi) (1 + 3 c u^2).
// 1 - s is s e^(-2z), since the difference loses every digit where s is near 1.
FK_INLINE float gelu_slope(float u) {
  // Beyond 20 the derivative is 0 or 1 to every digit, and the cubic would overflow.
  const float x = u < -20.f ? -20.f : (u > 20.f ? 20.f : u);
  const float e = vector_exp(-gelu_argument(x));
  const float s = 1.f / (1.f + e);
  const float slope = 2.f * kSqrtTwoOverPi * (1.f + 3.f * kCubic * x * x);
  return s + x * s * (s * finite(e)) * slope;
}

// With s = sigmoid(a): d(a s b)/da = b s (1 + a (1 - s)), d/db = a s; 1 - s is s e^(-a).
FK_INLINE void swiglu_slopes(float a, float b, float g, float& of_a, float& of_b) {
  const float e = vector_exp(-a);
  const float s = 1.f / (1.f + e);
  const float bounded = a > 88.f ? 88.f : a;  // beyond, e is no longer as small as it should be
  const float gs = g * s;                     // first: s may be 0 where g a overflows
  of_a = gs * b * (1.f + bounded * (s * finite(e)));
  of_b = gs * a;
}

}  // namespace flowkernels
