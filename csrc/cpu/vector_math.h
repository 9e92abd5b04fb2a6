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

// ln x of a normal x > 0 to 2e-7: k ln 2 + 2 atanh z of a mantissa in [0.7, 1.4], |z| <= 0.172.
// NaN stays NaN.
FK_INLINE float vector_log(float x) {
  const uint32_t bits = float_to_bits(x) - 0x3f3504f3u;  // of the root of 1/2
  const float k = static_cast<float>(static_cast<int32_t>(bits) >> 23);
  const float f = bits_to_float((bits & 0x007fffffu) + 0x3f3504f3u);
  const float z = (f - 1.f) / (f + 1.f), w = z * z;
  float p = 1.f / 9.f;
  p = p * w + 1.f / 7.f;
  p = p * w + 1.f / 5.f;
  p = p * w + 1.f / 3.f;
  const float value = k * 0.693147182f + 2.f * z * (p * w + 1.f);
  return x == x ? value : x;
}

// ln(1 + e) of e in [0, 1] to 2e-7 of itself: 2 atanh z, z = e / (2 + e) <= 1/3, by its series.
FK_INLINE float vector_log1p(float e) {
  const float z = e / (2.f + e), w = z * z;
  float p = 1.f / 15.f;
  p = p * w + 1.f / 13.f;
  p = p * w + 1.f / 11.f;
  p = p * w + 1.f / 9.f;
  p = p * w + 1.f / 7.f;
  p = p * w + 1.f / 5.f;
  p = p * w + 1.f / 3.f;
  return 2.f * z * (p * w + 1.f);
}

// ln(1 + e^x) and its derivative 1 / (1 + e^-x), for x of any size. NaN stays NaN.
FK_INLINE float vector_softplus(float x, float& slope) {
  const float size = std::fabs(x);
  const float e = size > 87.f ? 0.f : vector_exp(-size);
  slope = (x < 0.f ? e : 1.f) / (1.f + e);
  return (x > 0.f ? x : 0.f) + vector_log1p(e);
}

FK_INLINE float vector_sigmoid(float x) { return 1.f / (1.f + vector_exp(-x)); }

}  // namespace flowkernels
