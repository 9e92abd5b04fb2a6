// Contrastive flow matching: the loss and the gradient of v in one pass over the operands.
//
//   loss = mean ((v - u)² - lam (v - ũ)²)     u = noise - x0, ũ_b = u of sample negatives_b
//
// A second sample's x0 and noise are read beside a sample's own. Items go through all samples of a
// chunk before the next chunk begins, and a chunk is as wide as leaves all samples' x0 and noise of
// it in the cache: they come from memory once. At 16x16x128x128 samples one after the other take
// 1.1 times as long in float32 and 1.4 times in bfloat16 (CPU time of one thread, a busy machine).
#pragma once

#include "loss_items.h"

namespace flowkernels {

struct Contrastive {
  LossExtent extent;  // with chunks of `width` elements
  int64_t width;
  View v, x0, noise;
  View grad_v;  // output; empty where not wanted
  const int64_t* negatives;
  int64_t negatives_stride;
  float lam;
  PerSample weight, grad_output;
  bool rescale;     // leave alone what grad_output = 1 gave already
  double* partial;  // [batch, chunks]
};

// Elements of a chunk, which depend on the batch alone: results do not depend on threads.
FK_INLINE int64_t contrastive_width(int64_t batch) {
  constexpr int64_t kElements = 131072;  // of all samples: 1 MB of float32 x0 and noise
  const int64_t width = kElements / std::max<int64_t>(batch, 1) / kStep * kStep;
  return std::clamp(width, kStep, kChunk);
}

// Item = chunk * batch + sample. Reads v, x0, noise once from memory and writes grad_v once.
void contrastive(const Contrastive& a, int64_t begin, int64_t end);

// loss = Σ weight Σ partial, or [batch] of them.
void contrastive_total(const Contrastive& a, float* loss);

}  // namespace flowkernels
