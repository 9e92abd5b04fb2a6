#include "bellman.h"

#include <algorithm>

#include "step_rows.h"

namespace flowkernels {
namespace {

template <class T>
FK_INLINE void own_step(const BellmanStep& a, const Segment& at, StepRows<T> own, bool stream) {
  StepRow<T> row{};
  row.x = in_place<T>(a.x, at.sample, at.first);
  row.v = in_place<T>(a.v, at.sample, at.first);
  row.uncond = in_place<T>(a.v_uncond, at.sample, at.first);
  row.out = in_place<T>(a.x_next, at.sample, at.first);
  row.velocity = in_place<float>(a.velocity, at.sample, at.first);
  if (a.previous) {
    row.previous = in_place<float>(a.previous, at.sample, at.first);
    row.increment = in_place<float>(a.increment, at.sample, at.first);
  }
  row.dt = a.dt;
  row.guidance = a.guidance;
  row.stream = stream && starts_line(row.out) && starts_line(row.velocity) &&
               (!row.increment || starts_line(row.increment));
  own(row, at.count);
}

// The own loop for states of type T beside velocities of float32, else null.
template <class T>
FK_INLINE StepRows<T> own_rows(const BellmanStep& a) {
  return all_of<T>(a.x, a.v, a.v_uncond, a.x_next) && all_of<float>(a.previous) ? step_rows<T>()
                                                                                : nullptr;
}

}  // namespace

FK_CLONES void bellman_step(const BellmanStep& a, int64_t begin, int64_t end) {
  const int64_t total = a.batch * a.elements;
  const StepRows<float> of_float = own_rows<float>(a);
  const StepRows<BFloat16> of_bfloat16 = own_rows<BFloat16>(a);
  // What is written in place is in the caches anyway.
  const bool stream = total * element_size(a.x_next.dtype) >= kStreamedBytes &&
                      a.x_next.data != a.x.data && a.velocity.data != a.previous.data;
  Scratch scratch(6, kBlock);
  for (int64_t flat = begin * kBlock; flat < std::min(total, end * kBlock);) {
    const int64_t last = std::min(total, (flat / kBlock + 1) * kBlock);
    const Segment at = segment_at(flat, last, a.elements);
    flat += at.count;
    if (of_float) {
      own_step(a, at, of_float, stream);
      continue;
    }
    if (of_bfloat16) {
      own_step(a, at, of_bfloat16, stream);
      continue;
    }
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
  }
}

}  // namespace flowkernels
