// Elementary functions as polynomials, written so that the vectoriser takes them whole.
#pragma once

#include "rows.h"

namespace flowkernels {

// e^x to about 1 ulp on [-87, 88.3]; above it infinity, below it the value at -87. NaN stays NaN.
// x = k ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7 (error 6e-9).
FK_INLINE float vector_exp(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 89.f ? 89.f : x;                     // k = 128, whose scale below is infinity
  constexpr float kRoundingBias = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRoundingBias;
  const float k = shifted - kRoundingBias;
  // ln 2 in two parts, so that k ln 2 is exact to well below an ulp of r.
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float p = 1.f / 5040.f;
  p = p * r + 1.f / 720.f;
  p = p * r + 1.f / 120.f;
  p = p * r + 1.f / 24.f;
  p = p * r + 1.f / 6.f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.f;
  const float scale = bits_to_float((float_to_bits(shifted) << 23) + 0x3f800000u);
  return p * scale;
}

FK_INLINE float vector_sigmoid(float x) { return 1.f / (1.f + vector_exp(-x)); }

}  // namespace flowkernels
