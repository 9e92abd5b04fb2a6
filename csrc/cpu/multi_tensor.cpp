#include "multi_tensor.h"

#include <algorithm>

namespace flowkernels {
namespace {

// The item that a chunk belongs to. Empty items have no chunk: it is the last item that starts at
// or before the chunk.
int64_t item_of(const int64_t* first_chunk, int64_t count, int64_t chunk) {
  return std::upper_bound(first_chunk, first_chunk + count + 1, chunk) - first_chunk - 1;
}

FK_INLINE double square_sum(const float* row, int64_t n) {
  double total = 0.;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(row[i]) * row[i];
  return total;
}

// torch.lerp's two forms: the end nearer to the weight is exact, so weight 1 gives `end` itself.
FK_INLINE float lerp(float start, float end, float weight) {
  const float difference = end - start;
  return weight < 0.5f ? start + weight * difference : end - (1.f - weight) * difference;
}

FK_INLINE float stepped(float p, float first, float second, const Sweep::Item& t, float eps) {
  return p * t.decay - t.step_size * (first / (std::sqrt(second) * t.inverse_root + eps));
}

FK_INLINE void adamw(float* p_out, const float* p, const float* grad, float* exp_avg,
                     float* exp_avg_sq, const Sweep::Item& t, const Sweep& a, int64_t n) {
  const float factor = a.factor, beta2 = a.beta2, second_weight = a.second_weight, eps = a.eps;
  if (exp_avg == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float g = factor * grad[i];
      exp_avg_sq[i] = beta2 * exp_avg_sq[i] + second_weight * g * g;
      p_out[i] = stepped(p[i], g, exp_avg_sq[i], t, eps);
    }
    return;
  }
  const float first_weight = a.first_weight;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = factor * grad[i];
    exp_avg[i] = lerp(exp_avg[i], g, first_weight);
    exp_avg_sq[i] = beta2 * exp_avg_sq[i] + second_weight * g * g;
    p_out[i] = stepped(p[i], exp_avg[i], exp_avg_sq[i], t, eps);
  }
}

FK_INLINE void average(float* ema, const float* p, float weight, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) ema[i] = lerp(ema[i], p[i], weight);
}

}  // namespace

FK_CLONES void square_sums(const SquareSums& a, int64_t begin, int64_t end) {
  Scratch scratch(1, kSweepChunk);
  int64_t index = item_of(a.first_chunk, a.count, begin);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (a.first_chunk[index + 1] <= chunk) ++index;
    const SquareSums::Item& item = a.items[index];
    const int64_t offset = (chunk - a.first_chunk[index]) * kSweepChunk;
    const int64_t n = std::min(kSweepChunk, item.numel - offset);
    const char* data = item.data + offset * element_size(item.dtype);
    a.partial[chunk] = square_sum(load_row(data, item.dtype, scratch[0], n), n);
  }
}

FK_CLONES void sweep(const Sweep& a, int64_t begin, int64_t end) {
  Scratch scratch(4, kSweepChunk);
  int64_t index = item_of(a.first_chunk, a.count, begin);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    while (a.first_chunk[index + 1] <= chunk) ++index;
    const Sweep::Item& t = a.items[index];
    const int64_t offset = (chunk - a.first_chunk[index]) * kSweepChunk;
    const int64_t n = std::min(kSweepChunk, t.numel - offset);
    char* param = t.param + offset * element_size(t.param_dtype);
    const float* p = load_row(param, t.param_dtype, scratch[0], n);
    if (t.grad != nullptr) {
      const char* grad = t.grad + offset * element_size(t.grad_dtype);
      const float* g = load_row(grad, t.grad_dtype, scratch[1], n);
      float* result = target_row(param, t.param_dtype, scratch[2]);
      adamw(result, p, g, t.exp_avg ? t.exp_avg + offset : nullptr, t.exp_avg_sq + offset, t, a, n);
      store_row(result, param, t.param_dtype, n);
      round_row(result, t.param_dtype, n);  // what follows sees the parameter as it is stored
      p = result;
    }
    for (int64_t k = 0; k < a.averages; ++k)
      average(a.emas[k * a.count + index] + offset, p, a.ema_weights[k], n);
    if (t.copy != nullptr) {
      char* copy = t.copy + offset * element_size(t.copy_dtype);
      store_row(p, copy, t.copy_dtype, n);
    }
  }
}

}  // namespace flowkernels
