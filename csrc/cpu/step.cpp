#include "step.h"

#include <algorithm>

#include "step_rows.h"

namespace flowkernels {
namespace {

template <class T>
FK_INLINE void own_step(const EulerStep& a, const Segment& at, StepRows<T> own, bool stream) {
  StepRow<T> row{};
  row.x = in_place<T>(a.x, at.sample, at.first);
  row.v = in_place<T>(a.v, at.sample, at.first);
  row.uncond = in_place<T>(a.v_uncond, at.sample, at.first);
  row.out = in_place<T>(a.out, at.sample, at.first);
  row.dt = value_of(a.dt, at.sample);
  row.guidance = a.guidance;
  row.stream = stream && starts_line(row.out);
  own(row, at.count);
}

// The own loop for operands that are all of type T, else null.
template <class T>
FK_INLINE StepRows<T> own_rows(const EulerStep& a) {
  return all_of<T>(a.x, a.v, a.v_uncond, a.out) ? step_rows<T>() : nullptr;
}

}  // namespace

FK_CLONES void euler_step(const EulerStep& a, int64_t begin, int64_t end) {
  const int64_t total = a.batch * a.elements;
  const StepRows<float> of_float = own_rows<float>(a);
  const StepRows<BFloat16> of_bfloat16 = own_rows<BFloat16>(a);
  // What is written twice or in place is in the caches anyway.
  const bool stream =
      total * element_size(a.out.dtype) >= kStreamedBytes && !a.twice && a.out.data != a.x.data;
  Scratch scratch(4, kBlock);
  for (int64_t flat = begin * kBlock; flat < std::min(total, end * kBlock);) {
    const int64_t last = std::min(total, (flat / kBlock + 1) * kBlock);
    const Segment at = segment_at(flat, last, a.elements);
    char* target = element(a.out, at.sample, at.first);
    if (of_float) {
      own_step(a, at, of_float, stream);
    } else if (of_bfloat16) {
      own_step(a, at, of_bfloat16, stream);
    } else {
      const float dt = value_of(a.dt, at.sample), guidance = a.guidance;
      const float* x = load(a.x, at.sample, at.first, scratch[0], at.count);
      const float* v = load(a.v, at.sample, at.first, scratch[1], at.count);
      float* out = target_row(target, a.out.dtype, scratch[2]);
      if (a.v_uncond) {
        const float* uncond = load(a.v_uncond, at.sample, at.first, scratch[3], at.count);
#pragma omp simd
        for (int64_t i = 0; i < at.count; ++i)
          out[i] = x[i] + dt * (uncond[i] + guidance * (v[i] - uncond[i]));
      } else {
#pragma omp simd
        for (int64_t i = 0; i < at.count; ++i) out[i] = x[i] + dt * v[i];
      }
      store_row(out, target, a.out.dtype, at.count);
    }
    for (int64_t half = 0; a.twice && half < 2; ++half)
      std::memcpy(element(a.twice, half * a.batch + at.sample, at.first), target,
                  at.count * element_size(a.out.dtype));
    flat += at.count;
  }
}

FK_CLONES void euler_step_backward(const ScaledGradient& a, float guidance, int64_t begin,
                                   int64_t end) {
  scale_gradient(a, begin, end, [=](float dt, int output) FK_INLINE_LAMBDA {
    return dt * (output == 0 ? guidance : 1.f - guidance);
  });
}

}  // namespace flowkernels
