#include <algorithm>

#include "modulate.h"
#include "modulate_operands.h"
#include "norm_backward_rows.h"

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

// Shift and scale and no norm weights: both gradients come with the sweep.
FK_INLINE bool swept_shares(const NormBackward& a) {
  return a.partial_shift && a.partial_scale && !a.weight && !a.bias;
}

// The portable form of NormBackwardRows::sweep: two rows share the reading and writing of the sums.
template <int kRows, class T>
FK_INLINE void sweep(const BackwardSweep<T>& s, int64_t n) {
  const NormRow<T> p = s.rows[0], q = s.rows[kRows - 1];
  const float* multiplier = s.multiplier;
  float *shift = s.shift, *scale = s.scale;
  float p1 = 0.f, p2 = 0.f, q1 = 0.f, q2 = 0.f;
  const auto loop = [&](auto shares) FK_INLINE_LAMBDA {
#pragma omp simd reduction(+ : p1, p2, q1, q2)
    for (int64_t i = 0; i < n; ++i) {
      float g = p.g_at(i), gx = g * p.xhat_at(i);
      p1 += g * multiplier[i];
      p2 += gx * multiplier[i];
      if constexpr (kRows == 2) {
        const float q_g = q.g_at(i), q_gx = q_g * q.xhat_at(i);
        q1 += q_g * multiplier[i];
        q2 += q_gx * multiplier[i];
        g += q_g;
        gx += q_gx;
      }
      if constexpr (shares) {
        shift[i] += g;
        scale[i] += gx;
      }
    }
  };
  shift ? loop(std::true_type{}) : loop(std::false_type{});
  s.rows[0].c1 = p1;
  s.rows[0].c2 = p2;
  if constexpr (kRows == 2) {
    s.rows[1].c1 = q1;
    s.rows[1].c2 = q2;
  }
}

// The portable form of NormBackwardRows::distribute: all wanted gradients in one loop, else one
// loop for each.
template <class T>
FK_INLINE void distribute(const BackwardRow<T>& row, int64_t n) {
  const auto from = [=](auto total) FK_INLINE_LAMBDA {
    const auto loop = [=](auto to_input, auto to_branch, auto to_gate) FK_INLINE_LAMBDA {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float gradient = total(i);
        if constexpr (to_input) narrow(gradient, row.grad_input[i]);
        if constexpr (to_branch) narrow(widen(row.gate[i]) * gradient, row.grad_branch[i]);
        if constexpr (to_gate) row.gate_sums[i] += widen(row.branch[i]) * gradient;
      }
    };
    constexpr std::true_type yes;
    constexpr std::false_type no;
    if (row.grad_input && row.grad_branch && row.gate_sums) return loop(yes, yes, yes);
    if (row.grad_input) loop(yes, no, no);
    if (row.grad_branch) loop(no, yes, no);
    if (row.gate_sums) loop(no, no, yes);
  };
  const auto carried = [=](int64_t i) FK_INLINE_LAMBDA { return widen(row.grad_h[i]); };
  const auto through_norm = [=](int64_t i) FK_INLINE_LAMBDA {
    const NormRow<T>& norm = row.norm;
    return norm.rstd * (norm.g_at(i) * row.multiplier[i] - norm.c1 - norm.xhat_at(i) * norm.c2);
  };
  if (!row.norm.g)
    from(carried);
  else if (!row.grad_h)
    from(through_norm);
  else
    from([=](int64_t i) FK_INLINE_LAMBDA { return carried(i) + through_norm(i); });
}

// What a range of chunks works with; `own` is null where the portable loops serve.
template <class T>
struct Range {
  const NormBackward& a;
  const NormBackwardRows<T>* own;
  Factors factors;
  const Scratch& scratch;  // rows 0 to 3 hold g and h of two rows, 4 grad_h, 5 to 8 the outputs'
  bool stream, lines;      // results past the caches; from registers, a cache line at a time
};

template <int kRows, class T>
FK_INLINE void sweep(const Range<T>& range, NormRow<T>* rows, int64_t chunk) {
  const NormBackward& a = range.a;
  const int64_t n = a.extent.columns;
  const bool shares = swept_shares(a);
  const BackwardSweep<T> swept{rows, kRows, range.factors.multiplier,
                               shares ? a.partial_shift + chunk * n : nullptr,
                               shares ? a.partial_scale + chunk * n : nullptr};
  range.own ? range.own->sweep(swept, n) : sweep<kRows>(swept, n);
  for (int r = 0; r < kRows; ++r) {
    if (!shares) add_shares(a, range.factors, rows[r], chunk);
    rows[r].c1 = a.rms ? 0.f : rows[r].c1 / n;
    rows[r].c2 /= n;
  }
}

template <class T>
FK_INLINE void distribute(const Range<T>& range, const NormRow<T>& norm, int64_t b, int64_t s,
                          int64_t chunk) {
  const NormBackward& a = range.a;
  const Scratch& scratch = range.scratch;
  const int64_t n = a.extent.columns;
  const bool staged = range.stream && !range.lines;
  BackwardRow<T> row{};
  row.norm = norm;
  row.multiplier = range.factors.multiplier;
  row.stream = range.lines;
  if (a.grad_h) row.grad_h = typed_row<T>(a.grad_h.row(b, s), a.grad_h.dtype, scratch[4], n);
  if (a.grad_input)
    row.grad_input =
        typed_target<T>(a.grad_input.row(b, s), a.grad_input.dtype, scratch[5], staged);
  if (a.grad_branch) {
    row.gate = typed_row<T>(a.gate.row(b, s), a.gate.dtype, scratch[6], n);
    row.grad_branch =
        typed_target<T>(a.grad_branch.row(b, s), a.grad_branch.dtype, scratch[7], staged);
  }
  if (a.partial_gate) {
    row.branch = typed_row<T>(a.branch.row(b, s), a.branch.dtype, scratch[8], n);
    row.gate_sums = a.partial_gate + chunk * n;
  }
  if (range.own)
    for (const View& view : {a.grad_y, a.h, a.grad_h, a.branch})
      if (view) row.next[row.nexts++] = reinterpret_cast<const T*>(view.row(b, s + 2));
  range.own ? range.own->distribute(row, n) : distribute(row, n);
  if (row.grad_input)
    store_typed(row.grad_input, a.grad_input.row(b, s), a.grad_input.dtype, n, staged);
  if (row.grad_branch)
    store_typed(row.grad_branch, a.grad_branch.row(b, s), a.grad_branch.dtype, n, staged);
}

template <int kRows, class T>
FK_INLINE void backward_rows(const Range<T>& range, int64_t b, int64_t s, int64_t chunk) {
  const NormBackward& a = range.a;
  NormRow<T> rows[kRows];
  if (a.grad_y) {
    for (int r = 0; r < kRows; ++r)
      rows[r] = norm_row<T>(a, b, s + r, range.scratch[2 * r], range.scratch[2 * r + 1]);
    sweep<kRows>(range, rows, chunk);
  }
  for (int r = 0; r < kRows; ++r) distribute(range, rows[r], b, s + r, chunk);
}

template <class T>
FK_INLINE void backward_chunks(const NormBackward& a, int64_t begin, int64_t end) {
  const int64_t n = a.extent.columns;
  const int64_t per_batch = chunks_per_batch(a.extent.rows, a.rows_per_chunk);
  // Rows of other dtypes go through float32 scratch, which the portable loops serve.
  const bool alike =
      all_of<T>(a.grad_y, a.grad_h, a.h, a.branch, a.gate, a.grad_input, a.grad_branch);
  const NormBackwardRows<T>* own = alike ? norm_backward_rows<T>() : nullptr;
  Scratch scratch(14, n);
  const Factors factors{scratch[9], scratch[10], scratch[11], scratch[12]};
  const bool stream = elements_of(a.extent) * int64_t{sizeof(T)} >= kStreamedBytes;
  const bool lines = own && stream && in_lines(a.grad_input) && in_lines(a.grad_branch);
  const Range<T> range{a, own, factors, scratch, stream, lines};
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
      if (a.grad_y && changed(affine, View{}, a.scale, a.weight, a.bias, b, s)) {
        load_factors(a, factors, b, s, scratch[13]);
        if (own) own->arrange(factors.multiplier, n);
      }
      if (pairs && s + 2 <= last) {
        backward_rows<2>(range, b, s, chunk);
        s += 2;
      } else {
        backward_rows<1>(range, b, s, chunk);
        s += 1;
      }
    }
    if (!own) continue;
    if (a.partial_gate) own->restore(a.partial_gate + chunk * n, n);
    if (swept_shares(a))
      for (float* partial : {a.partial_shift, a.partial_scale})
        own->restore(partial + chunk * n, n);
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
