#include "runge_kutta_rows.h"

#include <cmath>

#include "lanes.h"

namespace flowkernels {

#ifdef FK_HAS_LANES
namespace {

FK_AVX512 inline Pair sum_at(const StageRow& stages, int64_t i) {
  Pair total{_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t j = 0; j < stages.count; ++j)
    total = sum(total, load(stages.ks[j] + i), _mm512_set1_ps(stages.weights[j]));
  return total;
}

FK_AVX512 inline float scalar_sum_at(const StageRow& stages, int64_t i) {
  float total = 0.f;
  for (int64_t j = 0; j < stages.count; ++j)
    total = std::fma(stages.weights[j], widen(stages.ks[j][i]), total);
  return total;
}

FK_AVX512 void combine(const StageRow& given, const BFloat16* y, BFloat16* out, int64_t n) {
  const StageRow stages = given;  // out could be its memory, for all that the compiler knows
  const __m512 dt = _mm512_set1_ps(stages.dt);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) store<false>(sum(load(y + i), sum_at(stages, i), dt), out + i);
  for (; i < n; ++i) narrow(std::fma(stages.dt, scalar_sum_at(stages, i), widen(y[i])), out[i]);
}

// The larger magnitude, or NaN where one is.
FK_AVX512 inline __m512 largest(__m512 before, __m512 after) {
  before = _mm512_abs_ps(before);
  after = _mm512_abs_ps(after);
  const __mmask16 nan = _mm512_cmp_ps_mask(before, before, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(_mm512_max_ps(before, after), nan, before);  // max has `after`'s
}

FK_AVX512 inline __m512 ratio_of(__m512 error, __m512 before, __m512 after, __m512 rtol,
                                 __m512 atol) {
  return _mm512_div_ps(error, _mm512_fmadd_ps(rtol, largest(before, after), atol));
}

FK_AVX512 inline Pair tolerance_at(const float* row, float value, int64_t i) {
  if (!row) return {_mm512_set1_ps(value), _mm512_set1_ps(value)};
  return arranged<BFloat16>(load(row + i));
}

FK_AVX512 inline void prefetch_operands(const StageRow& stages, const ErrorRow& row, int64_t i) {
  prefetch_ahead(row.y0 + i);
  prefetch_ahead(row.y1 + i);
  for (int64_t j = 0; j < stages.count; ++j) prefetch_ahead(stages.ks[j] + i);
}

FK_AVX512 float error(const StageRow& given, const ErrorRow& given_row, int64_t n) {
  const StageRow stages = given;  // as above
  const ErrorRow row = given_row;
  const __m512 dt = _mm512_set1_ps(stages.dt);
  __m512 low = _mm512_setzero_ps(), high = low;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    prefetch_operands(stages, row, i);
    const Pair found = scaled(sum_at(stages, i), dt);
    if (row.error) store<false>(found, row.error + i);
    const Pair before = load(row.y0 + i), after = load(row.y1 + i);
    const Pair rtol = tolerance_at(row.rtol, row.rtol_value, i);
    const Pair atol = tolerance_at(row.atol, row.atol_value, i);
    const __m512 first = ratio_of(found.low, before.low, after.low, rtol.low, atol.low);
    const __m512 second = ratio_of(found.high, before.high, after.high, rtol.high, atol.high);
    low = _mm512_fmadd_ps(first, first, low);
    high = _mm512_fmadd_ps(second, second, high);
  }
  float total = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
  for (; i < n; ++i) {
    const float found = stages.dt * scalar_sum_at(stages, i);
    if (row.error) narrow(found, row.error[i]);
    const float before = std::abs(widen(row.y0[i])), after = std::abs(widen(row.y1[i]));
    const float larger = before > after || before != before ? before : after;
    const float rtol = row.rtol ? row.rtol[i] : row.rtol_value;
    const float ratio = found / std::fma(rtol, larger, row.atol ? row.atol[i] : row.atol_value);
    total += ratio * ratio;
  }
  return total;
}

constexpr RungeKuttaRows kRows{combine, error};

}  // namespace

const RungeKuttaRows* runge_kutta_rows() {
  static const bool supported = lanes_supported();
  return supported ? &kRows : nullptr;
}
#else
const RungeKuttaRows* runge_kutta_rows() { return nullptr; }
#endif

}  // namespace flowkernels
