#include "activation.h"

#include <algorithm>

#include "activation_math.h"
#include "activation_rows.h"

namespace flowkernels {
namespace {

// Row `index` of [batch, rows, columns].
struct Position {
  int64_t b, s;
};
FK_INLINE Position position(const Activation& a, int64_t index) {
  return {index / a.rows, index % a.rows};
}

FK_INLINE const float* biased_row(const Activation& a, Position at, const float* bias, float* row) {
  const float* x = load_row(a.x.row(at.b, at.s), a.x.dtype, row, a.columns);
  if (!bias) return x;
#pragma omp simd
  for (int64_t i = 0; i < a.columns; ++i) row[i] = x[i] + bias[i];
  return row;
}

}  // namespace

FK_CLONES void gelu_tanh_forward(const Activation& a, int64_t begin, int64_t end) {
  if (own_gelu_tanh_forward(a, begin, end)) return;
  const int64_t n = a.columns;
  Scratch scratch(3, n);
  const float* bias = a.bias ? load_row(a.bias.data, a.bias.dtype, scratch[0], n) : nullptr;
  for (int64_t index = begin; index < end; ++index) {
    const Position at = position(a, index);
    const float* u = biased_row(a, at, bias, scratch[1]);
    char* target = a.out.row(at.b, at.s);
    float* y = target_row(target, a.out.dtype, scratch[2]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = u[i] * gelu_gate(u[i]);
    store_row(y, target, a.out.dtype, n);
  }
}

FK_CLONES void gelu_tanh_backward(const Activation& a, int64_t begin, int64_t end) {
  if (own_gelu_tanh_backward(a, begin, end)) return;
  const int64_t n = a.columns, total = a.batch * a.rows;
  Scratch scratch(4, n);
  const float* bias = a.bias ? load_row(a.bias.data, a.bias.dtype, scratch[0], n) : nullptr;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* partial = a.partial_bias ? a.partial_bias + chunk * n : nullptr;
    if (partial) std::fill(partial, partial + n, 0.f);
    const int64_t last = std::min((chunk + 1) * a.rows_per_chunk, total);
    for (int64_t index = chunk * a.rows_per_chunk; index < last; ++index) {
      const Position at = position(a, index);
      const float* u = biased_row(a, at, bias, scratch[1]);
      const float* g = load_row(a.grad.row(at.b, at.s), a.grad.dtype, scratch[2], n);
      char* target = a.out ? a.out.row(at.b, at.s) : nullptr;
      float* dx = target ? target_row(target, a.out.dtype, scratch[3]) : scratch[3];
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) dx[i] = g[i] * gelu_slope(u[i]);
      if (partial) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) partial[i] += dx[i];
      }
      if (target) store_row(dx, target, a.out.dtype, n);
    }
  }
}

FK_CLONES void swiglu_forward(const Activation& a, int64_t begin, int64_t end) {
  if (own_swiglu_forward(a, begin, end)) return;
  const int64_t n = a.columns;
  Scratch scratch(2, 2 * n);
  for (int64_t index = begin; index < end; ++index) {
    const Position at = position(a, index);
    const float* x = load_row(a.x.row(at.b, at.s), a.x.dtype, scratch[0], 2 * n);
    char* target = a.out.row(at.b, at.s);
    float* y = target_row(target, a.out.dtype, scratch[1]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = x[i] * vector_sigmoid(x[i]) * x[n + i];
    store_row(y, target, a.out.dtype, n);
  }
}

FK_CLONES void swiglu_backward(const Activation& a, int64_t begin, int64_t end) {
  if (own_swiglu_backward(a, begin, end)) return;
  const int64_t n = a.columns;
  Scratch scratch(3, 2 * n);
  for (int64_t index = begin; index < end; ++index) {
    const Position at = position(a, index);
    const float* x = load_row(a.x.row(at.b, at.s), a.x.dtype, scratch[0], 2 * n);
    const float* g = load_row(a.grad.row(at.b, at.s), a.grad.dtype, scratch[1], n);
    char* target = a.out.row(at.b, at.s);
    float* dx = target_row(target, a.out.dtype, scratch[2]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) swiglu_slopes(x[i], x[n + i], g[i], dx[i], dx[n + i]);
    store_row(dx, target, a.out.dtype, 2 * n);
  }
}

}  // namespace flowkernels
