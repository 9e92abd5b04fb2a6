#include "norm_rows.h"

#include "rows.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)

#include <immintrin.h>

#define FK_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")))

namespace flowkernels {
namespace {

constexpr int64_t kLanes = 16, kChains = 4;

FK_AVX512_BF16 inline __m512 load(const uint16_t* source) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// The instruction takes subnormal numbers for zeros and keeps the payload of a NaN; rows.h does
// neither.
FK_AVX512_BF16 inline bool differs(__m512 x) {
  constexpr int kSubnormal = 0x20, kQuietNan = 0x01, kSignalingNan = 0x80;
  return __builtin_expect(_mm512_fpclass_ps_mask(x, kSubnormal | kQuietNan | kSignalingNan), 0);
}

FK_AVX512_BF16 inline void store(__m512 x, uint16_t* target) {
  if (differs(x)) {
    alignas(64) float values[kLanes];
    _mm512_store_ps(values, x);
    for (int64_t i = 0; i < kLanes; ++i) target[i] = float_to_bfloat16(values[i]);
  } else {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(target, &rounded, sizeof(rounded));
  }
}

// Of the chains, then of their lanes in order.
FK_AVX512_BF16 inline float sum_of(const __m512* chains) {
  alignas(64) float lanes[kLanes];
  _mm512_store_ps(lanes, _mm512_add_ps(_mm512_add_ps(chains[0], chains[1]),
                                       _mm512_add_ps(chains[2], chains[3])));
  float sum = 0.f;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

FK_AVX512_BF16 float widen(const uint16_t* source, float* row, int64_t n) {
  __m512 chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int64_t chain = 0; chain < kChains; ++chain) {
      const int64_t at = i + chain * kLanes;
      const __m512 x = load(source + at);
      _mm512_storeu_ps(row + at, x);
      chains[chain] = _mm512_add_ps(chains[chain], x);
    }
  float sum = sum_of(chains);
  for (; i < n; ++i) sum += row[i] = bfloat16_to_float(source[i]);
  return sum;
}

FK_AVX512_BF16 float gated(const uint16_t* residual, const uint16_t* branch, const uint16_t* gate,
                           uint16_t* h, float* row, int64_t n) {
  __m512 chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int64_t chain = 0; chain < kChains; ++chain) {
      const int64_t at = i + chain * kLanes;
      store(_mm512_fmadd_ps(load(gate + at), load(branch + at), load(residual + at)), h + at);
      const __m512 x = load(h + at);
      _mm512_storeu_ps(row + at, x);
      chains[chain] = _mm512_add_ps(chains[chain], x);
    }
  float sum = sum_of(chains);
  for (; i < n; ++i) {
    h[i] = float_to_bfloat16(std::fma(bfloat16_to_float(gate[i]), bfloat16_to_float(branch[i]),
                                      bfloat16_to_float(residual[i])));
    sum += row[i] = bfloat16_to_float(h[i]);
  }
  return sum;
}

FK_AVX512_BF16 inline __m512 normed_lanes(const NormedRow& row, int64_t i, __m512 mean,
                                          __m512 rstd) {
  const __m512 xhat = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(row.h + i), mean), rstd);
  return _mm512_fmadd_ps(xhat, _mm512_loadu_ps(row.multiplier + i),
                         _mm512_loadu_ps(row.addend + i));
}

FK_AVX512_BF16 void normed(const NormedRow& row, float mean, float rstd, uint16_t* y,
                           const uint16_t* next) {
  const NormedRow r = row;  // y could be its memory, for all that the compiler knows
  const __m512 means = _mm512_set1_ps(mean), rstds = _mm512_set1_ps(rstd);
  int64_t i = 0;
  for (; i + 2 * kLanes <= r.n; i += 2 * kLanes) {
    __builtin_prefetch(next + i);  // a cache line; the other loops leave the memory idle
    const __m512 low = normed_lanes(r, i, means, rstds);
    const __m512 high = normed_lanes(r, i + kLanes, means, rstds);
    if (differs(low) || differs(high)) {
      store(low, y + i);
      store(high, y + i + kLanes);
    } else {
      const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
      std::memcpy(y + i, &rounded, sizeof(rounded));
    }
  }
  for (; i < r.n; ++i)
    y[i] = float_to_bfloat16(std::fma((r.h[i] - mean) * rstd, r.multiplier[i], r.addend[i]));
}

constexpr NormRows kRows{widen, gated, normed};

const NormRows* supported() {
  __builtin_cpu_init();
  const bool all = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("fma");
  return all ? &kRows : nullptr;
}

}  // namespace

const NormRows* const kNormRows = supported();

}  // namespace flowkernels

#else

namespace flowkernels {

const NormRows* const kNormRows = nullptr;

}  // namespace flowkernels

#endif
