// The loop of an Euler step over elements of one type, in the CPU's own instructions.
#pragma once

#include "rows.h"

namespace flowkernels {

// out = x + dt v, v = uncond + guidance (v - uncond) unless uncond is null.
template <class T>
struct StepRow {
  const T *x, *v, *uncond;
  float dt, guidance;
  T* out;
  bool stream;  // past the caches: 64-byte aligned rows alone
};

template <class T>
using StepRows = void (*)(const StepRow<T>& row, int64_t n);

// For float and BFloat16; null where the CPU or the compiler has no AVX-512 with bfloat16.
template <class T>
StepRows<T> step_rows();

}  // namespace flowkernels
