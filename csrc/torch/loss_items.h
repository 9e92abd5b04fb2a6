// The extent of a loss over samples and its outputs, as csrc/cpu/loss_items.h has them.
#pragma once

#include "../cpu/loss_items.h"
#include "samples.h"

namespace flowkernels {

inline LossExtent extent_of(const Tensor& x, int64_t reduction) {
  const int64_t elements = elements_of(x);
  return {batch_of(x), elements, chunks_of(elements), static_cast<Reduction>(reduction)};
}

inline int64_t items_of(const LossExtent& extent) { return extent.batch * extent.chunks; }

inline int64_t elements_per_item(const LossExtent& extent) {
  return std::min(extent.elements, kChunk);
}

// Every gradient is right as it was stored.
inline bool is_one(const PerSample& grad_output) {
  return grad_output.stride == 0 && value_of(grad_output, 0) == 1.f;
}

inline Tensor empty_loss(const LossExtent& extent, const Tensor& like) {
  return extent.reduction == Reduction::none ? empty({extent.batch}, ScalarType::Float, like)
                                             : empty({}, ScalarType::Float, like);
}

inline float* float_data(const Tensor& tensor) { return reinterpret_cast<float*>(data(tensor)); }

// The loss (and what else leads the list) before the gradients.
inline std::vector<Tensor> listed(std::initializer_list<Tensor> first,
                                  const std::vector<Tensor>& gradients) {
  std::vector<Tensor> all(first);
  all.insert(all.end(), gradients.begin(), gradients.end());
  return all;
}

}  // namespace flowkernels
