// What the forward and the backward pass of the norms share: rows of operands, and whether the
// factors made of them still hold.
#pragma once

#include "modulate.h"

namespace flowkernels {

FK_INLINE void fill(float* row, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = value;
}

// The affine map that modulation and norm weights amount to: y = xhat * multiplier + addend.
// It is rebuilt only when an operand's row changes: once per sample for [B, D] operands.
struct Affine {
  const char* key[4] = {nullptr, nullptr, nullptr, nullptr};
  bool ready = false;
};

FK_INLINE bool changed(Affine& affine, const View& shift, const View& scale, const View& weight,
                       const View& bias, int64_t b, int64_t s) {
  const char* key[4] = {shift ? shift.row(b, s) : nullptr, scale ? scale.row(b, s) : nullptr,
                        weight ? weight.row(b, s) : nullptr, bias ? bias.row(b, s) : nullptr};
  if (affine.ready && std::memcmp(key, affine.key, sizeof(key)) == 0) return false;
  std::memcpy(affine.key, key, sizeof(key));
  affine.ready = true;
  return true;
}

FK_INLINE const float* operand_row(const View& view, int64_t b, int64_t s, float* scratch,
                                   int64_t n) {
  return load_row(view.row(b, s), view.dtype, scratch, n);
}

// Whether every row begins with a cache line.
FK_INLINE bool in_lines(const View& view) {
  const int64_t line = 64 / element_size(view.dtype);
  return starts_line(view.data) && view.batch_stride % line == 0 && view.row_stride % line == 0;
}

}  // namespace flowkernels
