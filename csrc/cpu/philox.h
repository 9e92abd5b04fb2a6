// Counter-based normals: element i is word i % 4 of philox4x32-10 at counter
// (i / 4 lo, i / 4 hi, offset lo, offset hi) under key (seed lo, seed hi), by Box-Muller in pairs.
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.)
#pragma once

#include "rows.h"

namespace flowkernels {

struct PhiloxStream {
  uint64_t seed = 0, offset = 0;
};

struct PhiloxWords {
  uint32_t word[4];
};

FK_INLINE PhiloxWords philox4x32(uint64_t group, const PhiloxStream& stream) {
  uint32_t c0 = static_cast<uint32_t>(group), c1 = static_cast<uint32_t>(group >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream.offset);
  uint32_t c3 = static_cast<uint32_t>(stream.offset >> 32);
  uint32_t k0 = static_cast<uint32_t>(stream.seed), k1 = static_cast<uint32_t>(stream.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{c0} * 0xD2511F53u, second = uint64_t{c2} * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(first);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// ln u for a normal float32 u in (0, 1]: u = 2^e m with m in [√½, √2), and on f = m - 1 a
// Chebyshev fit of (ln(1+f) - f + f²/2)/f³. Relative error 6e-8 and better, also as u nears 1.
FK_INLINE float log_of_uniform(float u) {
  const int32_t exponent = static_cast<int32_t>(float_to_bits(u) - 0x3f3504f3u) >> 23;
  const float f = bits_to_float(float_to_bits(u) - (static_cast<uint32_t>(exponent) << 23)) - 1.f;
  float p = 0.07149753719568253f;
  p = p * f - 0.115712009370327f;
  p = p * f + 0.11661510914564133f;
  p = p * f - 0.12411050498485565f;
  p = p * f + 0.14249937236309052f;
  p = p * f - 0.1666848063468933f;
  p = p * f + 0.20000708103179932f;
  p = p * f - 0.24999989569187164f;
  p = p * f + 0.3333333134651184f;
  const float tail = f * f * (p * f - 0.5f);
  return static_cast<float>(exponent) * 0.6931471805599453f + (f + tail);
}

// cos 2πu and sin 2πu for u in [0, 1). The reduction to f = u - q/4, |f| <= 1/8, is exact, so the
// error is that of the two Chebyshev fits: 6e-8 of the larger one, with no loss near the zeros.
FK_INLINE void cos_sin_of_turn(float u, float& cosine, float& sine) {
  const int32_t quadrant = static_cast<int32_t>(u * 4.f + 0.5f);
  const float f = u - static_cast<float>(quadrant) * 0.25f, z = f * f;
  const float s =
      f * (6.2831854820251465f +
           z * (-41.3416633605957f + z * (81.59254455566406f - z * 75.40184020996094f)));
  const float c =
      1.f + z * (-19.739208221435547f +
                 z * (64.93936920166016f + z * (-85.44882202148438f + z * 59.424224853515625f)));
  const float even = quadrant & 1 ? s : c, odd = quadrant & 1 ? c : s;
  const uint32_t turn = static_cast<uint32_t>(quadrant);
  cosine = bits_to_float(float_to_bits(even) ^ (((turn + 1) & 2u) << 30));
  sine = bits_to_float(float_to_bits(odd) ^ ((turn & 2u) << 30));
}

// A block of normals is always computed whole: every element then comes out of the same
// instructions, and is the same bits, wherever a tensor begins or ends.
constexpr int64_t kPhiloxGroups = 256;

struct NormalBlock {
  alignas(64) uint32_t word[4][kPhiloxGroups];
  alignas(64) float z[4 * kPhiloxGroups];
};

// block.z = elements 4·first_group to 4·(first_group + kPhiloxGroups).
FK_INLINE void fill_normals(uint64_t first_group, const PhiloxStream& stream, NormalBlock& block) {
#pragma omp simd
  for (int64_t g = 0; g < kPhiloxGroups; ++g) {
    const PhiloxWords words = philox4x32(first_group + static_cast<uint64_t>(g), stream);
    block.word[0][g] = words.word[0];
    block.word[1][g] = words.word[1];
    block.word[2][g] = words.word[2];
    block.word[3][g] = words.word[3];
  }
  for (int pair = 0; pair < 2; ++pair) {
    const uint32_t* first = block.word[2 * pair];
    const uint32_t* second = block.word[2 * pair + 1];
    float* z = block.z + 2 * pair;
#pragma omp simd
    for (int64_t g = 0; g < kPhiloxGroups; ++g) {
      // Through int32: unsigned conversions are slow before AVX-512, and 24 bits fit.
      const float u1 = static_cast<float>(static_cast<int32_t>((first[g] >> 8) + 1u)) * 0x1p-24f;
      const float u2 = static_cast<float>(static_cast<int32_t>(second[g] >> 8)) * 0x1p-24f;
      const float radius = std::sqrt(-2.f * log_of_uniform(u1));
      float cosine, sine;
      cos_sin_of_turn(u2, cosine, sine);
      z[4 * g] = radius * cosine;
      z[4 * g + 1] = radius * sine;
    }
  }
}

}  // namespace flowkernels
