// Heads of one token, copied, converted and cleared.
#pragma once

#include "rows.h"

namespace flowkernels {

// `heads` rows of `n` elements in another dtype, or as they are; strides in elements.
void copy_heads(const void* from, DType from_dtype, int64_t from_stride, void* to, DType to_dtype,
                int64_t to_stride, int64_t heads, int64_t n);

void zero_heads(void* to, DType dtype, int64_t stride, int64_t heads, int64_t n);

}  // namespace flowkernels
