#include "modulate.h"

#include "modulate_operands.h"
#include "norm_rows.h"

namespace flowkernels {
namespace {

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

FK_INLINE Moments moments_of(const float* row, int64_t n, bool centred) {
  float mean = 0.f;
  if (centred) mean = sum(row, n, [](const auto& x) FK_INLINE_LAMBDA { return x; }) / n;
  const auto square = [=](const auto& x) FK_INLINE_LAMBDA { return (x - mean) * (x - mean); };
  return {mean, sum(row, n, square) / n};
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

// Own instructions serve rows of one dtype; operands [D] and [B, D] beside them have any.
FK_INLINE const NormRows* own_rows(const NormForward& a) {
  const DType dtype = a.input.dtype;
  for (const View& view : {a.branch, a.gate, a.h, a.y})
    if (view && view.dtype != dtype) return nullptr;
  return dtype == DType::float32    ? kFloatNormRows
         : dtype == DType::bfloat16 ? kBFloat16NormRows
                                    : nullptr;
}

FK_INLINE bool streamed(const NormForward& a) {
  const int64_t size = element_size(a.input.dtype);
  return elements_of(a.extent) * size >= kStreamedBytes && in_lines(a.y) && in_lines(a.h);
}

// How many rows before it is read a norm asks for one. A norm alone has but one row to read while
// it writes another: it needs more of them on their way where they are short, and where writing
// takes longer (docs/measuring.md).
FK_INLINE int64_t rows_ahead(const NormForward& a, bool stream) {
  if (a.branch) return 1;
  const int64_t row = a.extent.columns * element_size(a.input.dtype);
  const int64_t least = stream ? 9 << 10 : 6 << 10;
  return row > 0 ? (least + row - 1) / row : 1;
}

}  // namespace

FK_CLONES void norm_forward(const NormForward& a, int64_t begin, int64_t end) {
  const int64_t n = a.extent.columns;
  Scratch scratch(7, n);
  float* multiplier = scratch[0];
  float* addend = scratch[1];
  Affine affine;
  const NormRows* own = own_rows(a);
  const bool stream = own && streamed(a);
  const int64_t ahead = rows_ahead(a, stream);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / a.extent.rows, s = index % a.extent.rows;
    const float* h = nullptr;
    const char* source = a.input.row(b, s);
    if (own && a.branch) {
      char* kept = stream && a.y ? reinterpret_cast<char*>(scratch[3]) : nullptr;
      char* sum = a.h.row(b, s);
      own->gated({source, a.branch.row(b, s), a.gate.row(b, s), sum, kept, stream, bool(a.y)}, n);
      source = kept ? kept : sum;
    } else if (a.branch) {
      h = gated_row(a, b, s, scratch[3], scratch[4], scratch[5], scratch[6]);
    } else if (!own) {
      h = operand_row(a.input, b, s, scratch[3], n);
    }
    if (!a.y) continue;
    const Moments moments = own ? own->moments(source, n, !a.rms) : moments_of(h, n, !a.rms);
    const float rstd = 1.f / std::sqrt(moments.variance + a.eps);
    if (a.mean) a.mean[index] = moments.mean;
    a.rstd[index] = rstd;
    if (changed(affine, a.shift, a.scale, a.weight, a.bias, b, s)) {
      build_affine(a.shift, a.scale, a.weight, a.bias, b, s, multiplier, addend, scratch[2], n);
      for (float* factors : {multiplier, addend})
        if (own) own->arrange(factors, n);
    }
    if (own) {
      const char* branch = a.branch ? a.branch.row(b, s + ahead) : nullptr;
      own->normed(
          {source, {a.input.row(b, s + ahead), branch}, multiplier, addend, a.y.row(b, s), stream},
          n, moments.mean, rstd);
    } else {
      write_row(a.y.row(b, s), a.y.dtype, n, [=](int64_t i) FK_INLINE_LAMBDA {
        return (h[i] - moments.mean) * rstd * multiplier[i] + addend[i];
      });
    }
  }
}

}  // namespace flowkernels
