// The loops of a norm's forward pass over bfloat16 rows, in the CPU's own instructions.
#pragma once

#include <cstdint>

namespace flowkernels {

// A row of the norm's input and the affine map after it, `n` float32 each.
struct NormedRow {
  const float *h, *multiplier, *addend;
  int64_t n;
};

// The same bits as the loops of modulate.cpp that they stand in for: sums in the order of its
// `sum`, roundings as in rows.h.
struct NormRows {
  // row = source as float32; its sum.
  float (*widen)(const uint16_t* source, float* row, int64_t n);
  // h = residual + gate * branch, rounded; row = h as float32; its sum.
  float (*gated)(const uint16_t* residual, const uint16_t* branch, const uint16_t* gate,
                 uint16_t* h, float* row, int64_t n);
  // y = (h - mean) * rstd * multiplier + addend, rounded. The memory is asked for `next`, n
  // elements that are read after this row; they need not exist.
  void (*normed)(const NormedRow& row, float mean, float rstd, uint16_t* y, const uint16_t* next);
};

// Null where the CPU or the compiler has no AVX-512 with bfloat16. What g++ 12 makes of the
// portable loops takes some ten instructions to widen and to round sixteen elements.
extern const NormRows* const kNormRows;

}  // namespace flowkernels
