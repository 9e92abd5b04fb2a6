// The loop of a teacher's step over elements of one type, in the CPU's own instructions.
#pragma once

#include "rows.h"

namespace flowkernels {

// now = uncond + guidance (v - uncond), or v where uncond is null
// out = x + dt now, velocity = now, increment = now - previous
template <class T>
struct StepRow {
  const T *x, *v, *uncond;
  float dt, guidance;
  T* out;
  const float* previous;        // with increment, or null
  float *velocity, *increment;  // null where not wanted
  bool stream;                  // past the caches: 64-byte aligned rows alone
};

template <class T>
using StepRows = void (*)(const StepRow<T>& row, int64_t n);

// For float and BFloat16; null where the CPU or the compiler has no AVX-512 with bfloat16.
template <class T>
StepRows<T> step_rows();

}  // namespace flowkernels
