// The loops of Runge-Kutta stages over bfloat16 elements, in the CPU's own instructions. Those over
// float32 gain nothing by it.
#pragma once

#include "rows.h"

namespace flowkernels {

// Explicit methods up to order 8 have 14 stages at most; what has more takes the portable loops.
constexpr int64_t kMostStages = 16;

struct StageRow {
  const BFloat16* ks[kMostStages];
  float weights[kMostStages];
  int64_t count;
  float dt;
};

// error = dt sum_i weights_i k_i
struct ErrorRow {
  const BFloat16 *y0, *y1;
  BFloat16* error;           // null where it is not wanted
  const float *rtol, *atol;  // null: the values
  float rtol_value, atol_value;
};

struct RungeKuttaRows {
  // out = y + dt sum_i weights_i k_i; out may be y or a stage.
  void (*combine)(const StageRow& stages, const BFloat16* y, BFloat16* out, int64_t n);
  // The sum of (error / (atol + rtol max(|y0|, |y1|)))^2.
  float (*error)(const StageRow& stages, const ErrorRow& row, int64_t n);
};

// Null where the CPU or the compiler has no AVX-512 with bfloat16.
const RungeKuttaRows* runge_kutta_rows();

}  // namespace flowkernels
