#include "step_rows.h"

#include "lanes.h"

namespace flowkernels {

#ifdef FK_HAS_LANES
namespace {

FK_AVX512 inline __m512 stepped(__m512 x, __m512 v, __m512 dt) { return _mm512_fmadd_ps(dt, v, x); }

FK_AVX512 inline __m512 guided(__m512 v, __m512 uncond, __m512 guidance) {
  return _mm512_fmadd_ps(guidance, _mm512_sub_ps(v, uncond), uncond);
}

template <bool guides, bool keeps, bool stream, class T>
FK_AVX512 inline void loop(const StepRow<T>& row, int64_t n) {
  const StepRow<T> r = row;  // out could be its memory, for all that the compiler knows
  const __m512 dt = _mm512_set1_ps(r.dt), guidance = _mm512_set1_ps(r.guidance);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const Pair x = load(r.x + i);
    Pair now = load(r.v + i);
    if constexpr (guides) {
      const Pair uncond = load(r.uncond + i);
      now = {guided(now.low, uncond.low, guidance), guided(now.high, uncond.high, guidance)};
    }
    store<stream>(Pair{stepped(x.low, now.low, dt), stepped(x.high, now.high, dt)}, r.out + i);
    if constexpr (keeps) {
      now = restored<T>(now);
      if (r.increment) store<stream>(difference(now, load(r.previous + i)), r.increment + i);
      store<stream>(now, r.velocity + i);
    }
  }
  for (; i < n; ++i) {
    float now = widen(r.v[i]);
    if constexpr (guides) now = widen(r.uncond[i]) + r.guidance * (now - widen(r.uncond[i]));
    narrow(widen(r.x[i]) + r.dt * now, r.out[i]);
    if constexpr (keeps) {
      if (r.increment) r.increment[i] = now - r.previous[i];
      r.velocity[i] = now;
    }
  }
}

template <bool guides, bool keeps, class T>
FK_AVX512 inline void loop(const StepRow<T>& row, int64_t n) {
  row.stream ? loop<guides, keeps, true>(row, n) : loop<guides, keeps, false>(row, n);
}

template <bool guides, class T>
FK_AVX512 inline void loop(const StepRow<T>& row, int64_t n) {
  row.velocity ? loop<guides, true>(row, n) : loop<guides, false>(row, n);
}

template <class T>
FK_AVX512 void step(const StepRow<T>& row, int64_t n) {
  row.uncond ? loop<true>(row, n) : loop<false>(row, n);
}

}  // namespace

template <class T>
StepRows<T> step_rows() {
  static const bool supported = lanes_supported();
  return supported ? step<T> : nullptr;
}
#else
template <class T>
StepRows<T> step_rows() {
  return nullptr;
}
#endif

template StepRows<float> step_rows();
template StepRows<BFloat16> step_rows();

}  // namespace flowkernels
