#include "head_rows.h"

#include <algorithm>

namespace flowkernels {
namespace {

FK_INLINE void convert(const char* from, DType from_dtype, char* to, DType to_dtype, int64_t n) {
  if (from_dtype == to_dtype) {
    std::memcpy(to, from, n * element_size(to_dtype));
  } else if (to_dtype == DType::float32) {
    load_row(from, from_dtype, reinterpret_cast<float*>(to), n);
  } else if (from_dtype == DType::float32) {
    store_row(reinterpret_cast<const float*>(from), to, to_dtype, n);
  } else {
    float part[256];
    for (int64_t i = 0; i < n; i += 256) {
      const int64_t count = std::min<int64_t>(256, n - i);
      store_row(load_row(from + 2 * i, from_dtype, part, count), to + 2 * i, to_dtype, count);
    }
  }
}

}  // namespace

FK_CLONES void copy_heads(const void* from, DType from_dtype, int64_t from_stride, void* to,
                          DType to_dtype, int64_t to_stride, int64_t heads, int64_t n) {
  if (from_stride == n && to_stride == n) {
    n *= heads;
    heads = 1;
  }
  for (int64_t h = 0; h < heads; ++h)
    convert(static_cast<const char*>(from) + h * from_stride * element_size(from_dtype), from_dtype,
            static_cast<char*>(to) + h * to_stride * element_size(to_dtype), to_dtype, n);
}

void zero_heads(void* to, DType dtype, int64_t stride, int64_t heads, int64_t n) {
  const int64_t size = element_size(dtype);
  for (int64_t h = 0; h < heads; ++h)
    std::memset(static_cast<char*>(to) + h * stride * size, 0, n * size);
}

}  // namespace flowkernels
