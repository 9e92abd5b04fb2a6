#include <algorithm>

#include "modulate.h"
#include "modulate_operands.h"

namespace flowkernels {

// With g = grad_y, m = weight * (1 + scale), xhat = (h - mean) * rstd:
//   grad_h_total = grad_h + rstd * (g m - mean(g m) - xhat * mean(g m xhat))
//     where RMSNorm has no mean(g m)
//   grad_shift = sum g, grad_scale = sum g * (xhat * weight + bias)
//   grad_weight = sum g (1 + scale) xhat           grad_bias = sum g (1 + scale)
//   gated: grad_residual = grad_h_total, grad_branch = gate * grad_h_total,
//          grad_gate = sum branch * grad_h_total
// Sums over rows go to one float32 row a chunk; reduce_partials adds the chunks in order.
namespace {

// The factors of a row, rebuilt only when an operand's row changes; absent ones are 1 or 0.
struct Factors {
  float *multiplier, *one_plus_scale, *weight, *bias;
};

FK_INLINE void load_factors(const NormBackward& a, const Factors& t, int64_t b, int64_t s,
                            float* scratch) {
  const int64_t n = a.extent.columns;
  fill(t.one_plus_scale, 1.f, n);
  fill(t.weight, 1.f, n);
  fill(t.bias, 0.f, n);
  if (a.scale) {
    const float* row = operand_row(a.scale, b, s, scratch, n);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) t.one_plus_scale[i] = 1.f + row[i];
  }
  if (a.weight) std::memcpy(t.weight, operand_row(a.weight, b, s, scratch, n), n * 4);
  if (a.bias) std::memcpy(t.bias, operand_row(a.bias, b, s, scratch, n), n * 4);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) t.multiplier[i] = t.one_plus_scale[i] * t.weight[i];
}

// A row's gradient and norm input; c1 and c2 are the means that its own gradient needs.
template <class T>
struct NormRow {
  const T *g = nullptr, *h = nullptr;
  float mean = 0.f, rstd = 0.f, c1 = 0.f, c2 = 0.f;

  FK_INLINE_LAMBDA float g_at(int64_t i) const { return widen(g[i]); }
  FK_INLINE_LAMBDA float xhat_at(int64_t i) const { return (widen(h[i]) - mean) * rstd; }
};

template <class T>
FK_INLINE NormRow<T> norm_row(const NormBackward& a, int64_t b, int64_t s, float* g_scratch,
                              float* h_scratch) {
  const int64_t n = a.extent.columns, index = b * a.extent.rows + s;
  return {typed_row<T>(a.grad_y.row(b, s), a.grad_y.dtype, g_scratch, n),
          typed_row<T>(a.h.row(b, s), a.h.dtype, h_scratch, n), a.rms ? 0.f : a.mean[index],
          a.rstd[index]};
}

// The share of rows in the gradients of shift, scale, weight and bias: one loop for each.
template <class T>
FK_INLINE void add_shares(const NormBackward& a, const Factors& t, const NormRow<T>& row,
                          int64_t chunk) {
  const int64_t n = a.extent.columns;
  const auto add = [=](float* base, auto share) FK_INLINE_LAMBDA {
    if (!base) return;
    float* sums = base + chunk * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sums[i] += share(i);
  };
  add(a.partial_shift, [&](int64_t i) FK_INLINE_LAMBDA { return row.g_at(i); });
  add(a.partial_scale, [&](int64_t i) FK_INLINE_LAMBDA {
    return row.g_at(i) * (row.xhat_at(i) * t.weight[i] + t.bias[i]);
  });
  add(a.partial_weight, [&](int64_t i) FK_INLINE_LAMBDA {
    return row.g_at(i) * t.one_plus_scale[i] * row.xhat_at(i);
  });
  add(a.partial_bias,
      [&](int64_t i) FK_INLINE_LAMBDA { return row.g_at(i) * t.one_plus_scale[i]; });
}

// One sweep over g and h of one row, or of two with the same factors: their c1 and c2, and their
// share of the parameters' gradients. The common case, shift and scale and no norm weights, is one
// loop, in which two rows share the reading and writing of the sums.
template <int kRows, class T>
FK_INLINE void sweep(const NormBackward& a, const Factors& t, NormRow<T>* rows, int64_t chunk) {
  const int64_t n = a.extent.columns;
  const NormRow<T> p = rows[0], q = rows[kRows - 1];
  const bool common = a.partial_shift && a.partial_scale && !a.weight && !a.bias;
  float p1 = 0.f, p2 = 0.f, q1 = 0.f, q2 = 0.f;
  const auto loop = [&](auto shares) FK_INLINE_LAMBDA {
    float* shift = a.partial_shift + chunk * n;
    float* scale = a.partial_scale + chunk * n;
#pragma omp simd reduction(+ : p1, p2, q1, q2)
    for (int64_t i = 0; i < n; ++i) {
      float g = p.g_at(i), gx = g * p.xhat_at(i);
      p1 += g * t.multiplier[i];
      p2 += gx * t.multiplier[i];
      if constexpr (kRows == 2) {
        const float q_g = q.g_at(i), q_gx = q_g * q.xhat_at(i);
        q1 += q_g * t.multiplier[i];
        q2 += q_gx * t.multiplier[i];
        g += q_g;
        gx += q_gx;
      }
      if constexpr (shares) {
        shift[i] += g;
        scale[i] += gx;
      }
    }
  };
  if (common) {
    loop(std::true_type{});
  } else {
    loop(std::false_type{});
    for (int r = 0; r < kRows; ++r) add_shares(a, t, rows[r], chunk);
  }
  rows[0].c1 = a.rms ? 0.f : p1 / n;
  rows[0].c2 = p2 / n;
  if constexpr (kRows == 2) {
    rows[1].c1 = a.rms ? 0.f : q1 / n;
    rows[1].c2 = q2 / n;
  }
}

// The gradients of one row from `total(i)`, the gradient of h: all wanted in one loop, else one
// loop for each.
template <class T, class Total>
FK_INLINE void distribute(const NormBackward& a, const Scratch& scratch, int64_t b, int64_t s,
                          int64_t chunk, const Total& total) {
  const int64_t n = a.extent.columns;
  const bool stream = elements_of(a.extent) * int64_t{sizeof(T)} >= kStreamedBytes;
  T *grad_input = nullptr, *grad_branch = nullptr;
  const T *branch = nullptr, *gate = nullptr;
  float* gate_sums = nullptr;
  if (a.grad_input)
    grad_input = typed_target<T>(a.grad_input.row(b, s), a.grad_input.dtype, scratch[5], stream);
  if (a.grad_branch) {
    gate = typed_row<T>(a.gate.row(b, s), a.gate.dtype, scratch[6], n);
    grad_branch = typed_target<T>(a.grad_branch.row(b, s), a.grad_branch.dtype, scratch[7], stream);
  }
  if (a.partial_gate) {
    branch = typed_row<T>(a.branch.row(b, s), a.branch.dtype, scratch[8], n);
    gate_sums = a.partial_gate + chunk * n;
  }
  const auto loop = [=](auto to_input, auto to_branch, auto to_gate) FK_INLINE_LAMBDA {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float gradient = total(i);
      if constexpr (to_input) narrow(gradient, grad_input[i]);
      if constexpr (to_branch) narrow(widen(gate[i]) * gradient, grad_branch[i]);
      if constexpr (to_gate) gate_sums[i] += widen(branch[i]) * gradient;
    }
  };
  constexpr std::true_type yes;
  constexpr std::false_type no;
  if (grad_input && grad_branch && gate_sums) {
    loop(yes, yes, yes);
  } else {
    if (grad_input) loop(yes, no, no);
    if (grad_branch) loop(no, yes, no);
    if (gate_sums) loop(no, no, yes);
  }
  if (grad_input) store_typed(grad_input, a.grad_input.row(b, s), a.grad_input.dtype, n, stream);
  if (grad_branch)
    store_typed(grad_branch, a.grad_branch.row(b, s), a.grad_branch.dtype, n, stream);
}

// `kRows` rows from s on; scratch rows 0 to 3 hold their g and h, 4 grad_h, 5 to 8 the outputs'.
template <int kRows, class T>
FK_INLINE void backward_rows(const NormBackward& a, const Factors& t, const Scratch& scratch,
                             int64_t b, int64_t s, int64_t chunk) {
  const int64_t n = a.extent.columns;
  NormRow<T> rows[kRows];
  if (a.grad_y) {
    for (int r = 0; r < kRows; ++r)
      rows[r] = norm_row<T>(a, b, s + r, scratch[2 * r], scratch[2 * r + 1]);
    sweep<kRows>(a, t, rows, chunk);
  }
  for (int r = 0; r < kRows; ++r) {
    const NormRow<T> row = rows[r];
    const float* multiplier = t.multiplier;
    const T* grad_h = nullptr;
    if (a.grad_h) grad_h = typed_row<T>(a.grad_h.row(b, s + r), a.grad_h.dtype, scratch[4], n);
    const auto through_norm = [=](int64_t i) FK_INLINE_LAMBDA {
      return row.rstd * (row.g_at(i) * multiplier[i] - row.c1 - row.xhat_at(i) * row.c2);
    };
    if (!a.grad_y)
      distribute<T>(a, scratch, b, s + r, chunk,
                    [=](int64_t i) FK_INLINE_LAMBDA { return widen(grad_h[i]); });
    else if (!a.grad_h)
      distribute<T>(a, scratch, b, s + r, chunk, through_norm);
    else
      distribute<T>(a, scratch, b, s + r, chunk,
                    [=](int64_t i) FK_INLINE_LAMBDA { return widen(grad_h[i]) + through_norm(i); });
  }
}

template <class T>
FK_INLINE void backward_chunks(const NormBackward& a, int64_t begin, int64_t end) {
  const int64_t n = a.extent.columns;
  const int64_t per_batch = chunks_per_batch(a.extent.rows, a.rows_per_chunk);
  Scratch scratch(14, n);
  const Factors factors{scratch[9], scratch[10], scratch[11], scratch[12]};
  Affine affine;
  const bool pairs = a.scale.row_stride == 0;  // rows of a batch item share their factors
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t b = chunk / per_batch;
    int64_t s = chunk % per_batch * a.rows_per_chunk;
    const int64_t last = std::min(s + a.rows_per_chunk, a.extent.rows);
    for (float* partial :
         {a.partial_gate, a.partial_shift, a.partial_scale, a.partial_weight, a.partial_bias})
      if (partial) fill(partial + chunk * n, 0.f, n);
    while (s < last) {
      if (a.grad_y && changed(affine, View{}, a.scale, a.weight, a.bias, b, s))
        load_factors(a, factors, b, s, scratch[13]);
      if (pairs && s + 2 <= last) {
        backward_rows<2, T>(a, factors, scratch, b, s, chunk);
        s += 2;
      } else {
        backward_rows<1, T>(a, factors, scratch, b, s, chunk);
        s += 1;
      }
    }
  }
}

}  // namespace

FK_CLONES void norm_backward(const NormBackward& a, int64_t begin, int64_t end) {
  if (all_of<BFloat16>(a.grad_y, a.grad_h, a.h, a.branch, a.gate, a.grad_input, a.grad_branch))
    backward_chunks<BFloat16>(a, begin, end);
  else
    backward_chunks<float>(a, begin, end);
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
