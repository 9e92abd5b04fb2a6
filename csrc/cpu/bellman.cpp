#include "bellman.h"

#include <algorithm>

namespace flowkernels {

FK_CLONES void bellman_step(const BellmanStep& a, int64_t begin, int64_t end) {
  const int64_t total = a.batch * a.elements;
  Scratch scratch(6, kBlock);
  for (int64_t flat = begin * kBlock; flat < std::min(total, end * kBlock);) {
    const int64_t last = std::min(total, (flat / kBlock + 1) * kBlock);
    const Segment at = segment_at(flat, last, a.elements);
    const float dt = a.dt, guidance = a.guidance;
    const float* x = load(a.x, at.sample, at.first, scratch[0], at.count);
    const float* v = load(a.v, at.sample, at.first, scratch[1], at.count);
    // Results are built in L1 and stored at the end: velocity may be previous, x_next may be x.
    float* now = scratch[2];
    if (a.v_uncond) {
      const float* uncond = load(a.v_uncond, at.sample, at.first, scratch[3], at.count);
#pragma omp simd
      for (int64_t i = 0; i < at.count; ++i) now[i] = uncond[i] + guidance * (v[i] - uncond[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < at.count; ++i) now[i] = v[i];
    }
    if (a.previous) {
      const float* before = load(a.previous, at.sample, at.first, scratch[4], at.count);
      float* increment = reinterpret_cast<float*>(element(a.increment, at.sample, at.first));
#pragma omp simd
      for (int64_t i = 0; i < at.count; ++i) increment[i] = now[i] - before[i];
    }
    char* target = element(a.x_next, at.sample, at.first);
    float* next = target_row(target, a.x_next.dtype, scratch[5]);
#pragma omp simd
    for (int64_t i = 0; i < at.count; ++i) next[i] = x[i] + dt * now[i];
    store_row(next, target, a.x_next.dtype, at.count);
    store_row(now, element(a.velocity, at.sample, at.first), DType::float32, at.count);
    flat += at.count;
  }
}

}  // namespace flowkernels
