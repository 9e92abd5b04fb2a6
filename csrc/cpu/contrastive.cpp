#include "contrastive.h"

namespace flowkernels {
namespace {

// Rows of one step: v, and u and ũ as differences of two rows each.
template <class T>
struct Rows {
  const T *v, *x0, *noise, *other_x0, *other_noise;

  FK_INLINE_LAMBDA float residual(int64_t i) const {
    return widen(v[i]) - (widen(noise[i]) - widen(x0[i]));
  }
  FK_INLINE_LAMBDA float other_residual(int64_t i) const {
    return widen(v[i]) - (widen(other_noise[i]) - widen(other_x0[i]));
  }
};

template <class T>
FK_INLINE float sum_step(const Rows<T>& rows, float lam, int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float own = rows.residual(i), other = rows.other_residual(i);
    sum += own * own - lam * other * other;
  }
  return sum;
}

template <class T>
FK_INLINE float sum_and_store_step(const Rows<T>& rows, float lam, float factor, T* out,
                                   int64_t n) {
  float sum = 0.f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float own = rows.residual(i), other = rows.other_residual(i);
    sum += own * own - lam * other * other;
    narrow(factor * (own - lam * other), out[i]);
  }
  return sum;
}

template <class T>
FK_INLINE void contrastive_items(const Contrastive& a, int64_t begin, int64_t end) {
  Scratch scratch(6, kStep);
  const int64_t batch = a.extent.batch;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t chunk = index / batch, sample = index - chunk * batch;
    const float grad_output = value_of(a.grad_output, sample);
    if (a.rescale && grad_output == 1.f) continue;
    const int64_t negative = a.negatives[sample * a.negatives_stride];
    const bool inside = negative >= 0 && negative < batch;
    const int64_t other = inside ? negative : sample;
    const float lam = inside ? a.lam : NAN;  // nothing outside is read, and it shows
    const float factor =
        2.f * static_cast<float>(loss_scale(a.extent)) * value_of(a.weight, sample) * grad_output;
    const int64_t last = std::min(a.extent.elements, (chunk + 1) * a.width);
    double total = 0.0;
    for (int64_t first = chunk * a.width; first < last; first += kStep) {
      const int64_t n = std::min(kStep, last - first);
      const Rows<T> rows{typed<T>(a.v, sample, first, scratch[0], n),
                         typed<T>(a.x0, sample, first, scratch[1], n),
                         typed<T>(a.noise, sample, first, scratch[2], n),
                         typed<T>(a.x0, other, first, scratch[3], n),
                         typed<T>(a.noise, other, first, scratch[4], n)};
      if (!a.grad_v) {
        total += sum_step(rows, lam, n);
        continue;
      }
      char* target = element(a.grad_v, sample, first);
      T* out = typed_target<T>(target, a.grad_v.dtype, scratch[5]);
      total += sum_and_store_step(rows, lam, factor, out, n);
      store_typed(out, target, a.grad_v.dtype, n);
    }
    a.partial[sample * a.extent.chunks + chunk] = total;
  }
}

}  // namespace

// grad_v = 2 · scale · weight · grad_output · ((v - u) - lam (v - ũ))
FK_CLONES void contrastive(const Contrastive& a, int64_t begin, int64_t end) {
  if (all_of<BFloat16>(a.v, a.x0, a.noise, a.grad_v))
    contrastive_items<BFloat16>(a, begin, end);
  else
    contrastive_items<float>(a, begin, end);
}

void contrastive_total(const Contrastive& a, float* loss) {
  total_loss(a.extent, a.weight, a.partial, loss);
}

}  // namespace flowkernels
