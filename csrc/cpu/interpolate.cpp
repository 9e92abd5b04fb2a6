#include "interpolate.h"

#include <algorithm>

namespace flowkernels {

static_assert(kBlock == 4 * kPhiloxGroups, "a block of elements is a block of normals");

FK_CLONES void interpolate(const Interpolate& a, int64_t begin, int64_t end) {
  const int64_t total = a.batch * a.elements;
  Scratch scratch(3, kBlock);
  NormalBlock normals;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, last = std::min(total, first + kBlock);
    if (a.seeded) {
      fill_normals(static_cast<uint64_t>(block) * kPhiloxGroups, a.stream, normals);
      round_row(normals.z, a.noise_dtype, kBlock);
      if (a.noise) store_row(normals.z, element(a.noise, 0, first), a.noise_dtype, last - first);
    }
    for (int64_t flat = first; flat < last;) {
      const Segment at = segment_at(flat, last, a.elements);
      const float t = value_of(a.t, at.sample), rest = 1.f - t;
      const float* x0 = load(a.x0, at.sample, at.first, scratch[0], at.count);
      const float* noise = a.seeded ? normals.z + (flat - first)
                                    : load(a.noise, at.sample, at.first, scratch[1], at.count);
      char* target = element(a.x_t, at.sample, at.first);
      float* x_t = target_row(target, a.x_t.dtype, scratch[2]);
#pragma omp simd
      for (int64_t i = 0; i < at.count; ++i) x_t[i] = rest * x0[i] + t * noise[i];
      store_row(x_t, target, a.x_t.dtype, at.count);
      flat += at.count;
    }
  }
}

FK_CLONES void interpolate_backward(const ScaledGradient& a, int64_t begin, int64_t end) {
  scale_gradient(a, begin, end,
                 [](float t, int output) FK_INLINE_LAMBDA { return output == 0 ? 1.f - t : t; });
}

FK_CLONES void philox_words(const int64_t* groups, const PhiloxStream& stream, int64_t* words,
                            int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const PhiloxWords found = philox4x32(static_cast<uint64_t>(groups[n]), stream);
    for (int64_t i = 0; i < 4; ++i) words[4 * n + i] = found.word[i];
  }
}

}  // namespace flowkernels
