#include "modulate.h"

#include <algorithm>

namespace flowkernels {
namespace {

FK_INLINE void fill(float* row, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = value;
}

// The affine map that modulation and norm weights amount to: y = xhat * multiplier + addend.
// It is rebuilt only when an operand's row changes: once per sample for [B, D] operands.
struct Affine {
  const char* key[4] = {nullptr, nullptr, nullptr, nullptr};
  bool ready = false;
};

FK_INLINE bool changed(Affine& affine, const View& shift, const View& scale, const View& weight,
                       const View& bias, int64_t b, int64_t s) {
  const char* key[4] = {shift ? shift.row(b, s) : nullptr, scale ? scale.row(b, s) : nullptr,
                        weight ? weight.row(b, s) : nullptr, bias ? bias.row(b, s) : nullptr};
  if (affine.ready && std::memcmp(key, affine.key, sizeof(key)) == 0) return false;
  std::memcpy(affine.key, key, sizeof(key));
  affine.ready = true;
  return true;
}

FK_INLINE const float* operand_row(const View& view, int64_t b, int64_t s, float* scratch,
                                   int64_t n) {
  return load_row(view.row(b, s), view.dtype, scratch, n);
}

FK_INLINE float sum(const float* row, int64_t n) {
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += row[i];
  return total;
}

FK_INLINE float centred_square_sum(const float* row, float mean, int64_t n) {
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += (row[i] - mean) * (row[i] - mean);
  return total;
}

FK_INLINE void build_affine(const View& shift, const View& scale, const View& weight,
                            const View& bias, int64_t b, int64_t s, float* multiplier,
                            float* addend, float* scratch, int64_t n) {
  fill(multiplier, 1.f, n);
  fill(addend, 0.f, n);
  if (weight) std::memcpy(multiplier, operand_row(weight, b, s, scratch, n), n * 4);
  if (bias) std::memcpy(addend, operand_row(bias, b, s, scratch, n), n * 4);
  if (scale) {
    const float* row = operand_row(scale, b, s, scratch, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      multiplier[i] *= 1.f + row[i];
      addend[i] *= 1.f + row[i];
    }
  }
  if (shift) {
    const float* row = operand_row(shift, b, s, scratch, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) addend[i] += row[i];
  }
}

// h = residual + gate * branch, rounded to h's dtype: the norm is of the h that is stored.
FK_INLINE const float* gated_row(const NormForward& a, int64_t b, int64_t s, float* residual_row,
                                 float* branch_row, float* gate_row, float* h_row) {
  const int64_t n = a.extent.columns;
  const float* residual = operand_row(a.input, b, s, residual_row, n);
  const float* branch = operand_row(a.branch, b, s, branch_row, n);
  const float* gate = operand_row(a.gate, b, s, gate_row, n);
  float* h = target_row(a.h.row(b, s), a.h.dtype, h_row);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) h[i] = residual[i] + gate[i] * branch[i];
  store_row(h, a.h.row(b, s), a.h.dtype, n);
  if (a.y) round_row(h, a.h.dtype, n);
  return h;
}

}  // namespace

FK_CLONES void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  const int64_t n = a.extent.columns;
  Scratch scratch(8, n);
  float* multiplier = scratch[0];
  float* addend = scratch[1];
  Affine affine;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / a.extent.rows, s = index % a.extent.rows;
    const float* h = a.branch ? gated_row(a, b, s, scratch[3], scratch[4], scratch[5], scratch[6])
                              : operand_row(a.input, b, s, scratch[3], n);
    if (!a.y) continue;
    const float mean = a.rms ? 0.f : sum(h, n) / n;
    const float rstd = 1.f / std::sqrt(centred_square_sum(h, mean, n) / n + a.eps);
    if (a.mean) a.mean[index] = mean;
    a.rstd[index] = rstd;
    if (changed(affine, a.shift, a.scale, a.weight, a.bias, b, s))
      build_affine(a.shift, a.scale, a.weight, a.bias, b, s, multiplier, addend, scratch[2], n);
    char* target = a.y.row(b, s);
    float* y = target_row(target, a.y.dtype, scratch[7]);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = (h[i] - mean) * rstd * multiplier[i] + addend[i];
    store_row(y, target, a.y.dtype, n);
  }
}

// With g = grad_y, m = weight * (1 + scale), xhat = (h - mean) * rstd:
//   grad_h_total = grad_h + rstd * (g m - mean(g m) - xhat * mean(g m xhat))    (no mean(g m) in RMS)
//   grad_shift = sum g                  grad_scale = sum g * (xhat * weight + bias)
//   grad_weight = sum g (1 + scale) xhat           grad_bias = sum g (1 + scale)
//   gated: grad_residual = grad_h_total, grad_branch = gate * grad_h_total,
//          grad_gate = sum branch * grad_h_total
// Sums over rows go to one float32 row a chunk; reduce_partials adds the chunks in order.
namespace {

struct BackwardScratch {
  float *g, *h, *total, *operand, *one_plus_scale, *weight, *bias, *branch, *gate, *output;
};

FK_INLINE void accumulate_modulation(const NormBackward& a, const BackwardScratch& t,
                                     const float* g, const float* h, float mean, float rstd,
                                     int64_t chunk) {
  const int64_t n = a.extent.columns;
  if (a.partial_shift) {
    float* out = a.partial_shift + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += g[i];
  }
  if (a.partial_scale) {
    float* out = a.partial_scale + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      out[i] += g[i] * ((h[i] - mean) * rstd * t.weight[i] + t.bias[i]);
  }
  if (a.partial_weight) {
    float* out = a.partial_weight + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      out[i] += g[i] * t.one_plus_scale[i] * ((h[i] - mean) * rstd);
  }
  if (a.partial_bias) {
    float* out = a.partial_bias + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += g[i] * t.one_plus_scale[i];
  }
}

FK_INLINE void norm_input_gradient(const NormBackward& a, const BackwardScratch& t, const float* g,
                                   const float* h, float mean, float rstd, float* total) {
  const int64_t n = a.extent.columns;
  float first = 0.f, second = 0.f;
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = g[i] * t.one_plus_scale[i] * t.weight[i];
    first += scaled;
    second += scaled * ((h[i] - mean) * rstd);
  }
  const float c1 = a.rms ? 0.f : first / n, c2 = second / n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = g[i] * t.one_plus_scale[i] * t.weight[i];
    total[i] += rstd * (scaled - c1 - (h[i] - mean) * rstd * c2);
  }
}

FK_INLINE void gate_gradients(const NormBackward& a, const BackwardScratch& t, const float* total,
                              int64_t b, int64_t s, int64_t chunk) {
  const int64_t n = a.extent.columns;
  if (a.partial_gate) {
    const float* branch = operand_row(a.branch, b, s, t.branch, n);
    float* out = a.partial_gate + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += branch[i] * total[i];
  }
  if (a.grad_branch) {
    const float* gate = operand_row(a.gate, b, s, t.gate, n);
    char* target = a.grad_branch.row(b, s);
    float* out = target_row(target, a.grad_branch.dtype, t.output);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = gate[i] * total[i];
    store_row(out, target, a.grad_branch.dtype, n);
  }
}

FK_INLINE void load_factors(const NormBackward& a, const BackwardScratch& t, int64_t b, int64_t s) {
  const int64_t n = a.extent.columns;
  fill(t.one_plus_scale, 1.f, n);
  fill(t.weight, 1.f, n);
  fill(t.bias, 0.f, n);
  if (a.scale) {
    const float* row = operand_row(a.scale, b, s, t.operand, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) t.one_plus_scale[i] = 1.f + row[i];
  }
  if (a.weight) std::memcpy(t.weight, operand_row(a.weight, b, s, t.operand, n), n * 4);
  if (a.bias) std::memcpy(t.bias, operand_row(a.bias, b, s, t.operand, n), n * 4);
}

}  // namespace

FK_CLONES void norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  const int64_t n = a.extent.columns;
  const int64_t per_batch = chunks_per_batch(a.extent.rows, a.rows_per_chunk);
  Scratch scratch(10, n);
  const BackwardScratch t{scratch[0], scratch[1], scratch[2], scratch[3], scratch[4],
                          scratch[5], scratch[6], scratch[7], scratch[8], scratch[9]};
  Affine affine;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t b = chunk / per_batch;
    const int64_t first_row = chunk % per_batch * a.rows_per_chunk;
    const int64_t last_row = std::min(first_row + a.rows_per_chunk, a.extent.rows);
    for (float* partial : {a.partial_gate, a.partial_shift, a.partial_scale, a.partial_weight,
                           a.partial_bias})
      if (partial) fill(partial + chunk * n, 0.f, n);
    for (int64_t s = first_row; s < last_row; ++s) {
      const int64_t index = b * a.extent.rows + s;
      float* total = a.grad_input ? target_row(a.grad_input.row(b, s), a.grad_input.dtype, t.total)
                                  : t.total;
      if (a.grad_h) {
        const float* row = operand_row(a.grad_h, b, s, t.operand, n);
        std::memcpy(total, row, n * 4);
      } else {
        fill(total, 0.f, n);
      }
      if (a.grad_y) {
        if (changed(affine, View{}, a.scale, a.weight, a.bias, b, s)) load_factors(a, t, b, s);
        const float* g = operand_row(a.grad_y, b, s, t.g, n);
        const float* h = operand_row(a.h, b, s, t.h, n);
        const float mean = a.rms ? 0.f : a.mean[index], rstd = a.rstd[index];
        accumulate_modulation(a, t, g, h, mean, rstd, chunk);
        if (a.grad_input || a.grad_branch || a.partial_gate)
          norm_input_gradient(a, t, g, h, mean, rstd, total);
      }
      gate_gradients(a, t, total, b, s, chunk);
      if (a.grad_input) store_row(total, a.grad_input.row(b, s), a.grad_input.dtype, n);
    }
  }
}

FK_CLONES void reduce_partials(const ReducePartials& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  const int64_t out_chunks = a.keep_chunks ? a.chunks : 1;
  Scratch scratch(1, n);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b0 = a.keep_batch ? item / out_chunks : 0, c0 = a.keep_chunks ? item % out_chunks : 0;
    const int64_t b1 = a.keep_batch ? b0 + 1 : a.batch, c1 = a.keep_chunks ? c0 + 1 : a.chunks;
    char* target = a.out + item * n * element_size(a.out_dtype);
    float* out = target_row(target, a.out_dtype, scratch[0]);
    fill(out, 0.f, n);
    for (int64_t b = b0; b < b1; ++b)
      for (int64_t c = c0; c < c1; ++c) {
        const float* row = a.partial + (b * a.chunks + c) * n;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] += row[i];
      }
    store_row(out, target, a.out_dtype, n);
  }
}

}  // namespace flowkernels
