// The loops of a norm's forward pass over rows of one dtype, in the CPU's own instructions.
#pragma once

#include <cstdint>

namespace flowkernels {

struct Moments {
  float mean, variance;
};

// h = residual + gate * branch, rounded. Results that no cache would hold are streamed past them
// (64-byte aligned rows alone) and also go to `kept`, unless it is null, to be read back. Where a
// norm follows (`ahead`) the memory is asked for what is read soon after.
struct GatedRow {
  const char *residual, *branch, *gate;
  char *h, *kept;
  bool stream, ahead;
};

// y = (x - mean) * rstd * multiplier + addend. While it is written the memory is asked for rows
// that are read after this one (the second may be null); they need not exist.
struct NormedRow {
  const char *x, *next[2];
  const float *multiplier, *addend;  // arranged
  char* y;
  bool stream;
};

// Rows of n elements, float32 or bfloat16; each table serves one.
struct NormRows {
  void (*gated)(const GatedRow& row, int64_t n);
  // In one sweep of most rows. Where not `centred` the mean is 0 and the variance that about 0.
  Moments (*moments)(const char* row, int64_t n, bool centred);
  // Puts a row of factors into the order in which `normed` reads them.
  void (*arrange)(float* factors, int64_t n);
  void (*normed)(const NormedRow& row, int64_t n, float mean, float rstd);
};

// Null where the CPU or the compiler has no AVX-512 with bfloat16. What g++ 12 makes of the
// portable loops takes some ten instructions to widen and to round sixteen bfloat16 elements.
extern const NormRows *const kFloatNormRows, *const kBFloat16NormRows;

}  // namespace flowkernels
