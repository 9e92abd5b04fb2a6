// The loops of the losses over bfloat16 elements, in the CPU's own instructions.
#pragma once

#include "rows.h"

namespace flowkernels {

// A gradient: of_d d + of_e e, rounded.
struct GradientRow {
  BFloat16* out;
  float of_d, of_e;
};

// d = v - (noise - x0) * inverse; where there is a teacher u (guided by uncond, unless that is
// null), e is that d with inverse 1, and d = u - v.
struct LossRow {
  const BFloat16 *v, *x0, *noise;
  float inverse;
  const BFloat16 *u, *uncond;
  float guidance, lam;
  GradientRow gradients[5];
  int64_t wanted;  // gradients
  bool stream;     // past the caches: 64-byte aligned rows alone
};

struct LossRows {
  float (*flow_matching)(const LossRow& row, int64_t n);  // Σ d²
  float (*fgm)(const LossRow& row, int64_t n);            // Σ d (2 e + lam d)
};

// Null where the CPU or the compiler has no AVX-512 with bfloat16.
extern const LossRows* const kLossRows;

}  // namespace flowkernels
