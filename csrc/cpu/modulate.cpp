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

// sum of f(row[i]) in four chains of sixteen lanes: one chain of additions would wait on its own
// latency. The row is walked in order: its four quarters side by side took about twice the time
// (docs/measuring.md).
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

template <class F>
FK_INLINE float sum(const float* row, int64_t n, const F& f) {
  Lanes chains[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int64_t chain = 0; chain < 4; ++chain) {
      Lanes x;  // by memcpy: rows are aligned to their elements alone
      std::memcpy(&x, row + i + chain * kLanes, sizeof(x));
      chains[chain] += f(x);
    }
  const Lanes lanes = (chains[0] + chains[1]) + (chains[2] + chains[3]);
  float total = 0.f;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  for (; i < n; ++i) total += f(row[i]);
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

// The common case of gated_row, one dtype throughout: widened and rounded in registers
// (docs/measuring.md says what that bought). `rounded` gets h as float32; null if nobody asks.
template <class T>
FK_INLINE void gated_sum(const char* residual_row, const char* branch_row, const char* gate_row,
                         char* h_row, float* rounded, int64_t n) {
  const T* residual = reinterpret_cast<const T*>(residual_row);
  const T* branch = reinterpret_cast<const T*>(branch_row);
  const T* gate = reinterpret_cast<const T*>(gate_row);
  T* h = reinterpret_cast<T*>(h_row);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    narrow(widen(residual[i]) + widen(gate[i]) * widen(branch[i]), h[i]);
  if (!rounded) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) rounded[i] = widen(h[i]);
}

// h = residual + gate * branch, rounded to h's dtype: the norm is of the h that is stored.
FK_INLINE const float* gated_row(const NormForward& a, int64_t b, int64_t s, float* residual_row,
                                 float* branch_row, float* gate_row, float* h_row) {
  const int64_t n = a.extent.columns;
  char* target = a.h.row(b, s);
  if (a.h.dtype == DType::bfloat16 && a.input.dtype == a.h.dtype && a.branch.dtype == a.h.dtype &&
      a.gate.dtype == a.h.dtype) {
    gated_sum<BFloat16>(a.input.row(b, s), a.branch.row(b, s), a.gate.row(b, s), target,
                        a.y ? h_row : nullptr, n);
    return h_row;
  }
  const float* residual = operand_row(a.input, b, s, residual_row, n);
  const float* branch = operand_row(a.branch, b, s, branch_row, n);
  const float* gate = operand_row(a.gate, b, s, gate_row, n);
  float* h = target_row(target, a.h.dtype, h_row);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) h[i] = residual[i] + gate[i] * branch[i];
  store_row(h, target, a.h.dtype, n);
  if (a.y) round_row(h, a.h.dtype, n);
  return h;
}

}  // namespace

FK_CLONES void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  const int64_t n = a.extent.columns;
  Scratch scratch(7, n);
  float* multiplier = scratch[0];
  float* addend = scratch[1];
  Affine affine;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / a.extent.rows, s = index % a.extent.rows;
    const float* h = a.branch ? gated_row(a, b, s, scratch[3], scratch[4], scratch[5], scratch[6])
                              : operand_row(a.input, b, s, scratch[3], n);
    if (!a.y) continue;
    const float mean =
        a.rms ? 0.f : sum(h, n, [](const auto& x) FK_INLINE_LAMBDA { return x; }) / n;
    const auto centred_square = [=](const auto& x)
                                    FK_INLINE_LAMBDA { return (x - mean) * (x - mean); };
    const float variance = sum(h, n, centred_square) / n;
    const float rstd = 1.f / std::sqrt(variance + a.eps);
    if (a.mean) a.mean[index] = mean;
    a.rstd[index] = rstd;
    if (changed(affine, a.shift, a.scale, a.weight, a.bias, b, s))
      build_affine(a.shift, a.scale, a.weight, a.bias, b, s, multiplier, addend, scratch[2], n);
    write_row(a.y.row(b, s), a.y.dtype, n, [=](int64_t i) FK_INLINE_LAMBDA {
      return (h[i] - mean) * rstd * multiplier[i] + addend[i];
    });
  }
}

// With g = grad_y, m = weight * (1 + scale), xhat = (h - mean) * rstd:
//   grad_h_total = grad_h + rstd * (g m - mean(g m) - xhat * mean(g m xhat))
//     where RMSNorm has no mean(g m)
//   grad_shift = sum g, grad_scale = sum g * (xhat * weight + bias)
//   grad_weight = sum g (1 + scale) xhat           grad_bias = sum g (1 + scale)
//   gated: grad_residual = grad_h_total, grad_branch = gate * grad_h_total,
//          grad_gate = sum branch * grad_h_total
// Sums over rows go to one float32 row a chunk; reduce_partials adds the chunks in order.
namespace {

struct BackwardScratch {
  float *g, *h, *total, *operand, *multiplier, *one_plus_scale, *weight, *bias, *branch, *gate;
};

// The factors of a row, rebuilt only when an operand's row changes; absent ones are 1 or 0.
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
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) t.multiplier[i] = t.one_plus_scale[i] * t.weight[i];
}

// The sums of a row that its own gradient needs.
struct RowSums {
  float scaled, projected;  // sum of g m, sum of g m xhat
};

// One sweep over g and h: the row's sums, and its share of grad_shift and grad_scale. The common
// case, both wanted and no norm weights, is one loop; whatever else is asked takes loops of its
// own.
FK_INLINE RowSums sweep(const NormBackward& a, const BackwardScratch& t, const float* g,
                        const float* h, float mean, float rstd, int64_t chunk) {
  const int64_t n = a.extent.columns;
  const float* multiplier = t.multiplier;
  float* shift = a.partial_shift ? a.partial_shift + chunk * n : nullptr;
  float* scale = a.partial_scale ? a.partial_scale + chunk * n : nullptr;
  float first = 0.f, second = 0.f;
  if (shift && scale && !a.weight && !a.bias) {
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = 0; i < n; ++i) {
      const float xhat = (h[i] - mean) * rstd, scaled = g[i] * multiplier[i];
      shift[i] += g[i];
      scale[i] += g[i] * xhat;
      first += scaled;
      second += scaled * xhat;
    }
    return {first, second};
  }
#pragma omp simd reduction(+ : first, second)
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = g[i] * multiplier[i];
    first += scaled;
    second += scaled * ((h[i] - mean) * rstd);
  }
  if (shift) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) shift[i] += g[i];
  }
  if (scale) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      scale[i] += g[i] * ((h[i] - mean) * rstd * t.weight[i] + t.bias[i]);
  }
  if (a.partial_weight) {
    float* out = a.partial_weight + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += g[i] * t.one_plus_scale[i] * ((h[i] - mean) * rstd);
  }
  if (a.partial_bias) {
    float* out = a.partial_bias + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] += g[i] * t.one_plus_scale[i];
  }
  return {first, second};
}

// grad_branch and this row's share of grad_gate, from the gradient of h.
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
    write_row(a.grad_branch.row(b, s), a.grad_branch.dtype, n,
              [=](int64_t i) FK_INLINE_LAMBDA { return gate[i] * total[i]; });
  }
}

FK_INLINE void backward_row(const NormBackward& a, const BackwardScratch& t, Affine& affine,
                            int64_t b, int64_t s, int64_t chunk) {
  const int64_t n = a.extent.columns, index = b * a.extent.rows + s;
  const bool gated = a.grad_branch || a.partial_gate;
  const float* grad_h = a.grad_h ? operand_row(a.grad_h, b, s, t.operand, n) : nullptr;
  if (!a.grad_y) {
    if (a.grad_input)
      write_row(a.grad_input.row(b, s), a.grad_input.dtype, n,
                [=](int64_t i) FK_INLINE_LAMBDA { return grad_h[i]; });
    return gate_gradients(a, t, grad_h, b, s, chunk);
  }
  // load_factors uses the operand scratch that grad_h may lie in.
  if (changed(affine, View{}, a.scale, a.weight, a.bias, b, s)) {
    load_factors(a, t, b, s);
    if (a.grad_h) grad_h = operand_row(a.grad_h, b, s, t.operand, n);
  }
  const float* g = operand_row(a.grad_y, b, s, t.g, n);
  const float* h = operand_row(a.h, b, s, t.h, n);
  const float* multiplier = t.multiplier;
  const float mean = a.rms ? 0.f : a.mean[index], rstd = a.rstd[index];
  const RowSums sums = sweep(a, t, g, h, mean, rstd, chunk);
  if (!a.grad_input && !gated) return;
  const float c1 = a.rms ? 0.f : sums.scaled / n, c2 = sums.projected / n;
  const auto norm_gradient = [=](int64_t i) FK_INLINE_LAMBDA {
    return rstd * (g[i] * multiplier[i] - c1 - (h[i] - mean) * rstd * c2);
  };
  if (!gated && !grad_h)
    return write_row(a.grad_input.row(b, s), a.grad_input.dtype, n, norm_gradient);
  float* total = t.total;
  if (grad_h) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) total[i] = grad_h[i] + norm_gradient(i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) total[i] = norm_gradient(i);
  }
  gate_gradients(a, t, total, b, s, chunk);
  if (a.grad_input)
    write_row(a.grad_input.row(b, s), a.grad_input.dtype, n,
              [=](int64_t i) FK_INLINE_LAMBDA { return total[i]; });
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
    for (float* partial :
         {a.partial_gate, a.partial_shift, a.partial_scale, a.partial_weight, a.partial_bias})
      if (partial) fill(partial + chunk * n, 0.f, n);
    for (int64_t s = first_row; s < last_row; ++s) backward_row(a, t, affine, b, s, chunk);
  }
}

FK_CLONES void reduce_partials(const ReducePartials& a, int64_t begin, int64_t end) {
  const int64_t n = a.columns;
  const int64_t out_chunks = a.keep_chunks ? a.chunks : 1;
  Scratch scratch(1, n);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b0 = a.keep_batch ? item / out_chunks : 0,
                  c0 = a.keep_chunks ? item % out_chunks : 0;
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
