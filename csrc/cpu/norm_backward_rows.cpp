#include "norm_backward_rows.h"

#include "lanes.h"

namespace flowkernels {

#ifdef FK_HAS_LANES
namespace {

FK_AVX512 inline Pair sum(const Pair& a, const Pair& b) {
  return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)};
}

FK_AVX512 inline Pair product(const Pair& a, const Pair& b) {
  return {_mm512_mul_ps(a.low, b.low), _mm512_mul_ps(a.high, b.high)};
}

// a * b + c
FK_AVX512 inline Pair fused(const Pair& a, const Pair& b, const Pair& c) {
  return {_mm512_fmadd_ps(a.low, b.low, c.low), _mm512_fmadd_ps(a.high, b.high, c.high)};
}

FK_AVX512 inline Pair both(float value) { return {_mm512_set1_ps(value), _mm512_set1_ps(value)}; }

FK_AVX512 inline float total(const Pair& x) {
  return _mm512_reduce_add_ps(_mm512_add_ps(x.low, x.high));
}

template <class T>
FK_AVX512 inline Pair xhat(const NormRow<T>& row, int64_t i) {
  return product(sum(load(row.h + i), both(-row.mean)), both(row.rstd));
}

// A row's sums of g m and g m xhat.
struct Means {
  Pair c1{}, c2{};
};

FK_AVX512 inline void add(const Pair& g, const Pair& gx, const Pair& m, Means& means) {
  means.c1 = fused(g, m, means.c1);
  means.c2 = fused(gx, m, means.c2);
}

template <int kRows, bool shares, class T>
FK_AVX512 inline void sweep_rows(const BackwardSweep<T>& s, int64_t n) {
  NormRow<T>&p = s.rows[0], &q = s.rows[kRows - 1];
  const NormRow<T> first = p, second = q;
  const float* multiplier = s.multiplier;
  float *shift = s.shift, *scale = s.scale;
  Means of_first, of_second;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    const Pair m = load(multiplier + i);
    Pair g = load(first.g + i), gx = product(g, xhat(first, i));
    add(g, gx, m, of_first);
    if constexpr (kRows == 2) {
      const Pair other = load(second.g + i), other_gx = product(other, xhat(second, i));
      add(other, other_gx, m, of_second);
      g = sum(g, other);
      gx = sum(gx, other_gx);
    }
    if constexpr (shares) {
      store<false>(sum(load(shift + i), g), shift + i);
      store<false>(sum(load(scale + i), gx), scale + i);
    }
  }
  p.c1 = total(of_first.c1);
  p.c2 = total(of_first.c2);
  if constexpr (kRows == 2) {
    q.c1 = total(of_second.c1);
    q.c2 = total(of_second.c2);
  }
  for (; i < n; ++i)
    for (int64_t k = 0; k < kRows; ++k) {
      NormRow<T>& row = s.rows[k];
      const float g = row.g_at(i), gx = g * row.xhat_at(i);
      row.c1 += g * multiplier[i];
      row.c2 += gx * multiplier[i];
      if constexpr (shares) {
        shift[i] += g;
        scale[i] += gx;
      }
    }
}

template <class T>
FK_AVX512 void sweep(const BackwardSweep<T>& s, int64_t n) {
  if (s.count == 2)
    s.shift ? sweep_rows<2, true>(s, n) : sweep_rows<2, false>(s, n);
  else
    s.shift ? sweep_rows<1, true>(s, n) : sweep_rows<1, false>(s, n);
}

template <bool norm, bool carried, bool stream, class T>
FK_AVX512 inline void distribute_row(const BackwardRow<T>& row, int64_t n) {
  const BackwardRow<T> r = row;  // a gradient could be its memory, for all that the compiler knows
  const Pair rstd = both(r.norm.rstd), c1 = both(-r.norm.c1), c2 = both(-r.norm.c2);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    for (int64_t k = 0; k < r.nexts; ++k) prefetch(r.next[k] + i);
    Pair gradient{};
    if constexpr (carried) gradient = load(r.grad_h + i);
    if constexpr (norm) {
      const Pair own = fused(load(r.norm.g + i), load(r.multiplier + i), c1);
      gradient = fused(fused(xhat(r.norm, i), c2, own), rstd, gradient);
    }
    if (r.grad_input) store<stream>(gradient, r.grad_input + i);
    if (r.grad_branch) store<stream>(product(load(r.gate + i), gradient), r.grad_branch + i);
    if (r.gate_sums)
      store<false>(fused(load(r.branch + i), gradient, load(r.gate_sums + i)), r.gate_sums + i);
  }
  for (; i < n; ++i) {
    float gradient = 0.f;
    if constexpr (carried) gradient = widen(r.grad_h[i]);
    if constexpr (norm)
      gradient += r.norm.rstd *
                  (r.norm.g_at(i) * r.multiplier[i] - r.norm.c1 - r.norm.xhat_at(i) * r.norm.c2);
    if (r.grad_input) narrow(gradient, r.grad_input[i]);
    if (r.grad_branch) narrow(widen(r.gate[i]) * gradient, r.grad_branch[i]);
    if (r.gate_sums) r.gate_sums[i] += widen(r.branch[i]) * gradient;
  }
}

template <bool norm, bool carried, class T>
FK_AVX512 inline void distribute_row(const BackwardRow<T>& row, int64_t n) {
  row.stream ? distribute_row<norm, carried, true>(row, n)
             : distribute_row<norm, carried, false>(row, n);
}

template <class T>
FK_AVX512 void distribute(const BackwardRow<T>& row, int64_t n) {
  if (!row.norm.g)
    distribute_row<false, true>(row, n);
  else
    row.grad_h ? distribute_row<true, true>(row, n) : distribute_row<true, false>(row, n);
}

template <class T>
constexpr NormBackwardRows<T> kRows{arrange<T>, restore<T>, sweep<T>, distribute<T>};

}  // namespace

template <class T>
const NormBackwardRows<T>* norm_backward_rows() {
  static const bool supported = lanes_supported();
  return supported ? &kRows<T> : nullptr;
}
#else
template <class T>
const NormBackwardRows<T>* norm_backward_rows() {
  return nullptr;
}
#endif

template const NormBackwardRows<float>* norm_backward_rows();
template const NormBackwardRows<BFloat16>* norm_backward_rows();

}  // namespace flowkernels
