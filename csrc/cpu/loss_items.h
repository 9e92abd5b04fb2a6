// What the loss kernels share: how sums over samples become a loss, and the chunks they work on.
//
// Operands are [batch, elements] with contiguous samples. A work item is one chunk of one sample,
// item = sample * chunks + chunk; it leaves its sum in `partial[item]`, so that the totals, added
// in the order of items, do not depend on threads.
#pragma once

#include <algorithm>

#include "samples.h"

namespace flowkernels {

// How sums over samples become the loss; the codes are those of the Python side.
enum class Reduction : int64_t { none, mean, sum };

struct LossExtent {
  int64_t batch, elements, chunks;
  Reduction reduction;
};

// The factor of a sample's sum in the loss, before its weight.
FK_INLINE double loss_scale(const LossExtent& a) {
  if (a.reduction == Reduction::sum) return 1.0;
  const double mean = 1.0 / static_cast<double>(a.elements);
  return a.reduction == Reduction::none ? mean : mean / static_cast<double>(a.batch);
}

// Elements a loop takes at a time. A block's sum ends in additions one after the other: at 128 a
// step self_reflow in bfloat16 fell from 1.69 to 1.39 times torch.compile at 16x16x128x128. One
// loop over all operands takes a third longer in cache.
constexpr int64_t kStep = 256;
static_assert(kStep <= kBlock && kChunk % kStep == 0);

struct Item {
  int64_t sample, first, last;
};

FK_INLINE Item item_at(const LossExtent& extent, int64_t index) {
  const int64_t sample = index / extent.chunks, chunk = index - sample * extent.chunks;
  return {sample, chunk * kChunk, std::min(extent.elements, (chunk + 1) * kChunk)};
}

// `n` elements of a sample, where they lie or in `scratch` as float32.
template <class T>
FK_INLINE const T* typed(const View& view, int64_t sample, int64_t first, float* scratch,
                         int64_t n) {
  return typed_row<T>(element(view, sample, first), view.dtype, scratch, n);
}

// Whether gradients of this type are too large for the caches.
template <class T>
FK_INLINE bool streamed(const LossExtent& a) {
  return a.batch * a.elements * int64_t{sizeof(T)} >= kStreamedBytes;
}

// target[i] = value(i), rounded to the dtype of `view`, [batch, elements].
template <class T, class F>
FK_INLINE void write(const LossExtent& extent, const View& view, int64_t sample, int64_t first,
                     float* scratch, int64_t n, const F& value) {
  const bool stream = streamed<T>(extent);
  char* target = element(view, sample, first);
  T* out = typed_target<T>(target, view.dtype, scratch, stream);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) narrow(value(i), out[i]);
  store_typed(out, target, view.dtype, n, stream);
}

FK_INLINE double sample_sum(const double* partial, int64_t sample, int64_t chunks) {
  double total = 0.0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[sample * chunks + chunk];
  return total;
}

// loss = Σ weight Σ partial, scaled, or [batch] of them.
FK_INLINE void total_loss(const LossExtent& extent, const PerSample& weight, const double* partial,
                          float* loss) {
  const double scale = loss_scale(extent);
  double total = 0.0;
  for (int64_t sample = 0; sample < extent.batch; ++sample) {
    const double value = scale * static_cast<double>(value_of(weight, sample)) *
                         sample_sum(partial, sample, extent.chunks);
    if (extent.reduction == Reduction::none) loss[sample] = static_cast<float>(value);
    total += value;
  }
  if (extent.reduction == Reduction::none) return;
  // The mean over no sample is 0/0, as torch has it.
  if (extent.reduction == Reduction::mean && extent.batch == 0) total = NAN;
  *loss = static_cast<float>(total);
}

}  // namespace flowkernels
