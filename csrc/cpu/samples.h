// Operands [batch, elements] with contiguous samples, and one number a sample beside them.
#pragma once

#include <algorithm>

#include "rows.h"

namespace flowkernels {

// Elements that a kernel holds in L1 as float32 at a time at most, a few operands of them.
constexpr int64_t kBlock = 1024;
// Elements whose sum is one partial sum: fixed, so that results do not depend on threads.
constexpr int64_t kChunk = 8 * kBlock;

// A number for each sample: a vector of any stride, a 0-d tensor (stride 0), or a constant.
struct PerSample {
  const char* data = nullptr;
  DType dtype = DType::float32;
  int64_t stride = 0;
  float constant = 1.f;

  explicit operator bool() const { return data != nullptr; }
};

FK_INLINE float value_of(const PerSample& a, int64_t sample) {
  if (!a.data) return a.constant;
  const char* at = a.data + sample * a.stride * element_size(a.dtype);
  if (a.dtype == DType::float32) return *reinterpret_cast<const float*>(at);
  const uint16_t half = *reinterpret_cast<const uint16_t*>(at);
  return a.dtype == DType::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half);
}

FK_INLINE char* element(const View& view, int64_t sample, int64_t index) {
  return view.data + (sample * view.batch_stride + index) * element_size(view.dtype);
}

// `n` elements of a sample as float32, in place or in `scratch`.
FK_INLINE const float* load(const View& view, int64_t sample, int64_t index, float* scratch,
                            int64_t n) {
  return load_row(element(view, sample, index), view.dtype, scratch, n);
}

// Elements of a sample where they lie; null where there is no tensor.
template <class T>
FK_INLINE T* in_place(const View& view, int64_t sample, int64_t first) {
  return view ? reinterpret_cast<T*>(element(view, sample, first)) : nullptr;
}

// What a range of the contiguous order holds of one sample: many small ones share a block.
struct Segment {
  int64_t sample, first, count;
};

FK_INLINE Segment segment_at(int64_t flat, int64_t end, int64_t elements) {
  const int64_t sample = flat / elements, first = flat - sample * elements;
  const int64_t left = elements - first;
  return {sample, first, end - flat < left ? end - flat : left};
}

// Blocks of the contiguous order.
FK_INLINE int64_t blocks_of(int64_t batch, int64_t elements) {
  return (batch * elements + kBlock - 1) / kBlock;
}

FK_INLINE int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

// Gradients that are the gradient of the result, each times a number of its sample's.
struct ScaledGradient {
  int64_t batch, elements;
  View grad;
  View outputs[2];  // empty where not wanted
  PerSample number;
};

// outputs[i] = factor(number, i) grad: each read and written once. Blocks [begin, end) of the
// contiguous order.
template <class F>
FK_INLINE void scale_gradient(const ScaledGradient& a, int64_t begin, int64_t end,
                              const F& factor) {
  const int64_t total = a.batch * a.elements;
  Scratch scratch(2, kBlock);
  for (int64_t flat = begin * kBlock; flat < std::min(total, end * kBlock);) {
    const int64_t last = std::min(total, (flat / kBlock + 1) * kBlock);
    const Segment at = segment_at(flat, last, a.elements);
    const float number = value_of(a.number, at.sample);
    const float* grad = load(a.grad, at.sample, at.first, scratch[0], at.count);
    for (int index = 0; index < 2; ++index) {
      const View& output = a.outputs[index];
      if (!output) continue;
      const float scale = factor(number, index);
      char* target = element(output, at.sample, at.first);
      float* result = target_row(target, output.dtype, scratch[1]);
#pragma omp simd
      for (int64_t i = 0; i < at.count; ++i) result[i] = scale * grad[i];
      store_row(result, target, output.dtype, at.count);
    }
    flat += at.count;
  }
}

}  // namespace flowkernels
