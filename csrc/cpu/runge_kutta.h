// Combinations of Runge-Kutta stages, and the error of a step with its weighted root mean square.
//
//   combine: out = y + dt sum_i weights_i k_i
//   error:   error = dt sum_i weights_i k_i,
//            sums of (|error| / (atol + rtol max(|y0|, |y1|)))^2 over fixed chunks, in double
//
// Operands are [batch, elements] with contiguous samples. T = BFloat16, Float16 or double: every
// operand has that dtype and is read where it lies. T = float: any mix of dtypes but float64.
// Arithmetic is float, or double for double.
#pragma once

#include "samples.h"

namespace flowkernels {

struct Combine {
  int64_t batch, elements;
  View y;
  const View* ks;         // [count]
  const double* weights;  // [count]
  int64_t count;
  const double* dt;   // of sample b: dt[b * dt_stride]
  int64_t dt_stride;  // 0 or 1
  View out;           // may be y or a stage
};

// Reads every operand once and writes out once. Blocks [begin, end) of the contiguous order.
template <class T>
void rk_combine(const Combine& a, int64_t begin, int64_t end);

struct StepError {
  int64_t batch, elements;
  const View* ks;
  const double* weights;
  int64_t count;
  const double* dt;
  int64_t dt_stride;
  View y0, y1;
  const void* rtol;  // [batch * elements], float or double; null: rtol_value
  const void* atol;
  double rtol_value, atol_value;
  View error;       // empty where it is not wanted
  double* partial;  // [batch, chunks_of(elements)]
};

// Chunks [begin, end) of batch * chunks_of(elements).
template <class T>
void rk_error(const StepError& a, int64_t begin, int64_t end);

}  // namespace flowkernels
