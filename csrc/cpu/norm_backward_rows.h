// The loops of a norm's backward pass over rows of one dtype, in the CPU's own instructions.
#pragma once

#include "rows.h"

namespace flowkernels {

// A row's gradient and norm input; c1 and c2 are the means that its own gradient needs.
template <class T>
struct NormRow {
  const T *g = nullptr, *h = nullptr;
  float mean = 0.f, rstd = 0.f, c1 = 0.f, c2 = 0.f;

  FK_INLINE_LAMBDA float g_at(int64_t i) const { return widen(g[i]); }
  FK_INLINE_LAMBDA float xhat_at(int64_t i) const { return (widen(h[i]) - mean) * rstd; }
};

// One row or two with the same multiplier. Their sums of g m and g m xhat go to c1 and c2, their
// share of the gradients is added to shift += g and scale += g xhat, unless these are null.
template <class T>
struct BackwardSweep {
  NormRow<T>* rows;
  int64_t count;
  const float* multiplier;
  float *shift, *scale;
};

// total = grad_h + rstd * (g m - c1 - xhat c2), without grad_h or, where there is no g, without
// the rest; grad_input = total, grad_branch = gate * total, gate_sums += branch * total, unless
// null. The memory is asked for the `next` rows, read after this one; they need not exist.
template <class T>
struct BackwardRow {
  NormRow<T> norm;
  const float* multiplier;
  const T *grad_h, *branch, *gate;
  T *grad_input, *grad_branch;
  float* gate_sums;
  const T* next[4];
  int64_t nexts;
  bool stream;  // past the caches: 64-byte aligned rows alone
};

// Rows of float32 (factors and sums) are in the order of `arrange`; `restore` is its inverse.
template <class T>
struct NormBackwardRows {
  void (*arrange)(float* row, int64_t n);
  void (*restore)(float* row, int64_t n);
  void (*sweep)(const BackwardSweep<T>& sweep, int64_t n);
  void (*distribute)(const BackwardRow<T>& row, int64_t n);
};

// For float and BFloat16; null where the CPU or the compiler has no AVX-512 with bfloat16.
template <class T>
const NormBackwardRows<T>* norm_backward_rows();

}  // namespace flowkernels
