#include "loss_rows.h"

#include "lanes.h"

namespace flowkernels {

#ifdef FK_HAS_LANES
namespace {

struct Terms {
  Pair d, e;
};

template <bool teacher, bool guided, class T>
FK_AVX512 inline void prefetch_operands(const LossRow<T>& r, int64_t i) {
  prefetch_ahead(r.v + i);
  prefetch_ahead(r.noise + i);
  prefetch_ahead(r.x0 + i);
  if constexpr (teacher) prefetch_ahead(r.u + i);
  if constexpr (guided) prefetch_ahead(r.uncond + i);
}

template <bool teacher, bool guided, class T>
FK_AVX512 inline Terms terms_at(const LossRow<T>& r, int64_t i) {
  const Pair v = load(r.v + i), target = difference(load(r.noise + i), load(r.x0 + i));
  if constexpr (!teacher) {
    return {sum(v, target, _mm512_set1_ps(-r.inverse)), Pair{}};
  } else {
    Pair u = load(r.u + i);
    if constexpr (guided) {
      const Pair uncond = load(r.uncond + i);
      u = sum(uncond, difference(u, uncond), _mm512_set1_ps(r.guidance));
    }
    return {difference(u, v), difference(v, target)};
  }
}

template <bool teacher, bool stream, class T>
FK_AVX512 inline void store_gradients(const LossRow<T>& r, const Terms& at, int64_t i) {
  for (int64_t k = 0; k < r.wanted; ++k) {
    const GradientRow<T>& gradient = r.gradients[k];
    Pair value = scaled(at.d, _mm512_set1_ps(gradient.of_d));
    if constexpr (teacher) value = sum(value, at.e, _mm512_set1_ps(gradient.of_e));
    store<stream>(value, gradient.out + i);
  }
}

template <bool teacher, bool guided, bool stream, class T>
FK_AVX512 inline float loop(const LossRow<T>& row, int64_t n) {
  const LossRow<T> r = row;  // a gradient could be its memory, for all that the compiler knows
  const __m512 two = _mm512_set1_ps(2.f), lam = _mm512_set1_ps(r.lam);
  __m512 low = _mm512_setzero_ps(), high = low;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    if constexpr (!stream) prefetch_operands<teacher, guided>(r, i);
    const Terms at = terms_at<teacher, guided>(r, i);
    const Pair factor = teacher ? sum(scaled(at.e, two), at.d, lam) : at.d;
    low = _mm512_fmadd_ps(at.d.low, factor.low, low);
    high = _mm512_fmadd_ps(at.d.high, factor.high, high);
    store_gradients<teacher, stream>(r, at, i);
  }
  float total = _mm512_reduce_add_ps(_mm512_add_ps(low, high));
  for (; i < n; ++i) {
    const float v = widen(r.v[i]), target = widen(r.noise[i]) - widen(r.x0[i]);
    float d = v - target * r.inverse, e = 0.f;
    if constexpr (teacher) {
      float u = widen(r.u[i]);
      if constexpr (guided) u = widen(r.uncond[i]) + r.guidance * (u - widen(r.uncond[i]));
      d = u - v;
      e = v - target;
      total += d * (2.f * e + r.lam * d);
    } else {
      total += d * d;
    }
    for (int64_t k = 0; k < r.wanted; ++k) {
      const GradientRow<T>& gradient = r.gradients[k];
      narrow(gradient.of_d * d + gradient.of_e * e, gradient.out[i]);
    }
  }
  return total;
}

template <bool teacher, bool guided, class T>
FK_AVX512 float loop(const LossRow<T>& row, int64_t n) {
  return row.stream ? loop<teacher, guided, true>(row, n) : loop<teacher, guided, false>(row, n);
}

template <class T>
FK_AVX512 float flow_matching(const LossRow<T>& row, int64_t n) {
  return loop<false, false>(row, n);
}

template <class T>
FK_AVX512 float fgm(const LossRow<T>& row, int64_t n) {
  return row.uncond ? loop<true, true>(row, n) : loop<true, false>(row, n);
}

template <class T>
constexpr LossRows<T> kRows{flow_matching<T>, fgm<T>};

}  // namespace

template <class T>
const LossRows<T>* loss_rows() {
  static const bool supported = lanes_supported();
  return supported ? &kRows<T> : nullptr;
}
#else
template <class T>
const LossRows<T>* loss_rows() {
  return nullptr;
}
#endif

template const LossRows<float>* loss_rows();
template const LossRows<BFloat16>* loss_rows();

}  // namespace flowkernels
