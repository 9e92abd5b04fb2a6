// The loops of the losses over elements of one type, in the CPU's own instructions.
#pragma once

#include "rows.h"

namespace flowkernels {

// A gradient: of_d d + of_e e, rounded.
template <class T>
struct GradientRow {
  T* out;
  float of_d, of_e;
};

// d = v - (noise - x0) * inverse; where there is a teacher u (guided by uncond, unless that is
// null), e is that d with inverse 1, and d = u - v.
template <class T>
struct LossRow {
  const T *v, *x0, *noise;
  float inverse;
  const T *u, *uncond;
  float guidance, lam;
  GradientRow<T> gradients[5];
  int64_t wanted;  // gradients
  bool stream;     // past the caches: 64-byte aligned rows alone
};

template <class T>
struct LossRows {
  float (*flow_matching)(const LossRow<T>& row, int64_t n);  // Σ d²
  float (*fgm)(const LossRow<T>& row, int64_t n);            // Σ d (2 e + lam d)
};

// For float and BFloat16; null where the CPU or the compiler has no AVX-512 with bfloat16.
template <class T>
const LossRows<T>* loss_rows();

}  // namespace flowkernels
