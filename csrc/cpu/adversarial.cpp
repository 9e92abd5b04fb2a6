#include "adversarial.h"

#include "vector_math.h"

namespace flowkernels {
namespace {

template <bool kMinus>
struct Softplus {
  FK_INLINE_LAMBDA float operator()(float x, float& slope) const {
    const float value = vector_softplus(kMinus ? -x : x, slope);
    slope = kMinus ? -slope : slope;
    return value;
  }
};

struct Square {
  FK_INLINE_LAMBDA float operator()(float x, float& slope) const {
    slope = 2.f * x;
    return x * x;
  }
};

template <class T, class F>
FK_INLINE void pointwise_items(const PointwiseSum& a, int64_t begin, int64_t end,
                               const F& function) {
  Scratch scratch(3, kStep);
  float* slope = scratch[1];
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_at(a.extent, index);
    const float factor = a.factor;
    double total = 0.0;
    for (int64_t first = item.first; first < item.last; first += kStep) {
      const int64_t n = std::min(kStep, item.last - first);
      const T* x = typed<T>(a.x, item.sample, first, scratch[0], n);
      float sum = 0.f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += function(widen(x[i]), slope[i]);
      total += sum;
      if (a.grad)
        write<T>(a.extent, a.grad, item.sample, first, scratch[2], n,
                 [=](int64_t i) FK_INLINE_LAMBDA { return factor * slope[i]; });
    }
    a.partial[index] = total;
  }
}

template <class T>
FK_INLINE void pointwise_function(const PointwiseSum& a, int64_t begin, int64_t end) {
  switch (a.function) {
    case Pointwise::softplus_minus:
      return pointwise_items<T>(a, begin, end, Softplus<true>{});
    case Pointwise::softplus_plus:
      return pointwise_items<T>(a, begin, end, Softplus<false>{});
    case Pointwise::square:
      return pointwise_items<T>(a, begin, end, Square{});
  }
}

}  // namespace

FK_CLONES void pointwise_sum(const PointwiseSum& a, int64_t begin, int64_t end) {
  if (all_of<BFloat16>(a.x, a.grad))
    pointwise_function<BFloat16>(a, begin, end);
  else
    pointwise_function<float>(a, begin, end);
}

}  // namespace flowkernels
