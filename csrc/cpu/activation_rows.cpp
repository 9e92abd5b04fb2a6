#include "activation_rows.h"

#include <algorithm>

#include "activation_math.h"
#include "lanes.h"

namespace flowkernels {

#ifdef FK_HAS_LANES
namespace {

FK_AVX512 inline __m512 both(float value) { return _mm512_set1_ps(value); }

// e^x; like all that end in 16, of sixteen. A second operand that is NaN is what min and max
// return.
FK_AVX512 inline __m512 exp16(__m512 x) {
  x = _mm512_min_ps(both(89.f), _mm512_max_ps(both(-105.f), x));
  const __m512 k = _mm512_roundscale_ps(_mm512_mul_ps(x, both(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(k, both(0.693359375f), x);
  r = _mm512_fmadd_ps(k, both(2.12194440e-4f), r);
  __m512 p = both(1.f / 5040.f);
  for (const float term : {1.f / 720.f, 1.f / 120.f, 1.f / 24.f, 1.f / 6.f, 0.5f, 1.f, 1.f})
    p = _mm512_fmadd_ps(p, r, both(term));
  return _mm512_scalef_ps(p, k);
}

// 2 z of gelu_argument.
FK_AVX512 inline __m512 argument16(__m512 u) {
  const __m512 cubic = both(2.f * kSqrtTwoOverPi * kCubic), linear = both(2.f * kSqrtTwoOverPi);
  return _mm512_mul_ps(u, _mm512_fmadd_ps(_mm512_mul_ps(u, u), cubic, linear));
}

FK_AVX512 inline __m512 negative(__m512 x) {
  return _mm512_castsi512_ps(
      _mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x80000000u)));
}

// e^-x, s = 1 / (1 + e^-x) and s e^-x, which is 1 - s.
struct Sigmoid {
  __m512 s, rest;
};

FK_AVX512 inline Sigmoid sigmoid16(__m512 x) {
  const __m512 e = exp16(negative(x));
  const __m512 s = _mm512_div_ps(both(1.f), _mm512_add_ps(both(1.f), e));
  return {s, _mm512_mul_ps(s, _mm512_min_ps(both(3e38f), e))};
}

FK_AVX512 inline __m512 gelu16(__m512 u) {
  return _mm512_div_ps(u, _mm512_add_ps(both(1.f), exp16(negative(argument16(u)))));
}

FK_AVX512 inline __m512 gelu_slope16(__m512 u) {
  const __m512 x = _mm512_min_ps(both(20.f), _mm512_max_ps(both(-20.f), u));
  const Sigmoid at = sigmoid16(argument16(x));
  const __m512 slope = _mm512_fmadd_ps(_mm512_mul_ps(x, x), both(6.f * kSqrtTwoOverPi * kCubic),
                                       both(2.f * kSqrtTwoOverPi));
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(x, at.s), at.rest), slope, at.s);
}

FK_AVX512 inline __m512 swiglu16(__m512 a, __m512 b) {
  const __m512 s = _mm512_div_ps(a, _mm512_add_ps(both(1.f), exp16(negative(a))));
  return _mm512_mul_ps(s, b);
}

template <class T>
FK_AVX512 inline T* in_place(const View& view, const Activation& a, int64_t index) {
  return reinterpret_cast<T*>(view.row(index / a.rows, index % a.rows));
}

// A bias row in float32, arranged; null where there is none.
template <class T>
FK_AVX512 inline const float* arranged_bias(const Activation& a, float* scratch) {
  if (!a.bias) return nullptr;
  const float* bias = load_row(a.bias.data, a.bias.dtype, scratch, a.columns);
  if (bias != scratch) std::memcpy(scratch, bias, a.columns * sizeof(float));
  arrange<T>(scratch, a.columns);
  return scratch;
}

template <class T>
FK_AVX512 inline Pair biased(const T* x, const float* bias, int64_t i) {
  Pair u = load(x + i);
  if (!bias) return u;
  const Pair addend = load(bias + i);
  return {_mm512_add_ps(u.low, addend.low), _mm512_add_ps(u.high, addend.high)};
}

template <class T>
FK_AVX512 void gelu_forward(const Activation& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  Scratch scratch(1, n);
  const float* bias = arranged_bias<T>(a, scratch[0]);
  for (int64_t index = begin; index < end; ++index) {
    const T* x = in_place<T>(a.x, a, index);
    T* y = in_place<T>(a.out, a, index);
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) {
      const Pair u = biased(x, bias, i);
      store<false>(Pair{gelu16(u.low), gelu16(u.high)}, y + i);
    }
    for (; i < n; ++i) {
      const float u = bias ? widen(x[i]) + bias[i] : widen(x[i]);
      narrow(u * gelu_gate(u), y[i]);
    }
  }
}

template <class T>
FK_AVX512 void gelu_backward(const Activation& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns, total = a.batch * a.rows;
  Scratch scratch(1, n);
  const float* bias = arranged_bias<T>(a, scratch[0]);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = a.partial_bias ? a.partial_bias + chunk * n : nullptr;
    if (sums) std::fill(sums, sums + n, 0.f);
    const int64_t last = std::min((chunk + 1) * a.rows_per_chunk, total);
    for (int64_t index = chunk * a.rows_per_chunk; index < last; ++index) {
      const T *x = in_place<T>(a.x, a, index), *grad = in_place<T>(a.grad, a, index);
      T* dx = a.out ? in_place<T>(a.out, a, index) : nullptr;
      int64_t i = 0;
      for (; i + kPair <= n; i += kPair) {
        const Pair u = biased(x, bias, i), g = load(grad + i);
        const Pair d{_mm512_mul_ps(g.low, gelu_slope16(u.low)),
                     _mm512_mul_ps(g.high, gelu_slope16(u.high))};
        if (dx) store<false>(d, dx + i);
        if (!sums) continue;
        const Pair sum = load(sums + i);
        store<false>(Pair{_mm512_add_ps(sum.low, d.low), _mm512_add_ps(sum.high, d.high)},
                     sums + i);
      }
      for (; i < n; ++i) {
        const float d = widen(grad[i]) * gelu_slope(bias ? widen(x[i]) + bias[i] : widen(x[i]));
        if (dx) narrow(d, dx[i]);
        if (sums) sums[i] += d;
      }
    }
    if (sums) restore<T>(sums, n);
  }
}

template <class T>
FK_AVX512 void swiglu_forward_rows(const Activation& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  for (int64_t index = begin; index < end; ++index) {
    const T *gate = in_place<T>(a.x, a, index), *value = gate + n;
    T* y = in_place<T>(a.out, a, index);
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) {
      const Pair x = load(gate + i), b = load(value + i);
      store<false>(Pair{swiglu16(x.low, b.low), swiglu16(x.high, b.high)}, y + i);
    }
    for (; i < n; ++i) {
      const float x = widen(gate[i]);
      narrow(x * vector_sigmoid(x) * widen(value[i]), y[i]);
    }
  }
}

// The gradients of a and of b.
struct Halves {
  __m512 a, b;
};

FK_AVX512 inline Halves swiglu_slopes16(__m512 a, __m512 b, __m512 g) {
  const Sigmoid at = sigmoid16(a);
  const __m512 gs = _mm512_mul_ps(g, at.s), bounded = _mm512_min_ps(both(88.f), a);
  return {_mm512_mul_ps(_mm512_mul_ps(gs, b), _mm512_fmadd_ps(bounded, at.rest, both(1.f))),
          _mm512_mul_ps(gs, a)};
}

template <class T>
FK_AVX512 void swiglu_backward_rows(const Activation& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  for (int64_t index = begin; index < end; ++index) {
    const T *gate = in_place<T>(a.x, a, index), *value = gate + n;
    const T* grad = in_place<T>(a.grad, a, index);
    T *d_gate = in_place<T>(a.out, a, index), *d_value = d_gate + n;
    int64_t i = 0;
    for (; i + kPair <= n; i += kPair) {
      const Pair x = load(gate + i), b = load(value + i), g = load(grad + i);
      const Halves low = swiglu_slopes16(x.low, b.low, g.low);
      const Halves high = swiglu_slopes16(x.high, b.high, g.high);
      store<false>(Pair{low.a, high.a}, d_gate + i);
      store<false>(Pair{low.b, high.b}, d_value + i);
    }
    for (; i < n; ++i) {
      float of_a, of_b;
      swiglu_slopes(widen(gate[i]), widen(value[i]), widen(grad[i]), of_a, of_b);
      narrow(of_a, d_gate[i]);
      narrow(of_b, d_value[i]);
    }
  }
}

using Work = void (*)(const Activation& a, int64_t begin, int64_t end);

bool run(const Activation& a, int64_t begin, int64_t end, Work of_float, Work of_bfloat16) {
  static const bool supported = lanes_supported();
  const bool is_float = all_of<float>(a.x, a.grad, a.out);
  if (!supported || !(is_float || all_of<BFloat16>(a.x, a.grad, a.out))) return false;
  (is_float ? of_float : of_bfloat16)(a, begin, end);
  return true;
}

}  // namespace

#define FK_OWN(name, rows)                                     \
  bool name(const Activation& a, int64_t begin, int64_t end) { \
    return run(a, begin, end, rows<float>, rows<BFloat16>);    \
  }
#else
#define FK_OWN(name, rows) \
  bool name(const Activation&, int64_t, int64_t) { return false; }
#endif

FK_OWN(own_gelu_tanh_forward, gelu_forward)
FK_OWN(own_gelu_tanh_backward, gelu_backward)
FK_OWN(own_swiglu_forward, swiglu_forward_rows)
FK_OWN(own_swiglu_backward, swiglu_backward_rows)

}  // namespace flowkernels
