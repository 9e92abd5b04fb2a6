#include "runge_kutta.h"

#include <algorithm>
#include <cmath>

#include "runge_kutta_rows.h"

namespace flowkernels {

FK_INLINE double widen(double value) { return value; }
FK_INLINE void narrow(double value, double& out) { out = value; }

namespace {

// The type of the arithmetic on elements stored as T.
template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
FK_INLINE char* at(const View& view, int64_t sample, int64_t index) {
  if constexpr (std::is_same_v<T, double>)
    return view.data + (sample * view.batch_stride + index) * 8;
  return element(view, sample, index);
}

// With T = float other dtypes pass through `scratch`; else operands are read where they lie.
template <class T>
FK_INLINE const T* read(const View& view, int64_t sample, int64_t index, float* scratch,
                        int64_t n) {
  return typed_row<T>(at<T>(view, sample, index), view.dtype, scratch, n);
}

// Rows of kBlock elements of the arithmetic in L1.
template <class C>
class Rows {
 public:
  explicit Rows(int64_t count) : scratch_(count * (sizeof(C) / 4), kBlock) {}
  C* operator[](int64_t index) const {
    return reinterpret_cast<C*>(scratch_[index * (sizeof(C) / 4)]);
  }
  float* floats(int64_t index) const { return scratch_[index]; }

 private:
  Scratch scratch_;
};

constexpr int kGroup = 4;

// The stages [first, first + N) of a block and their weights.
template <class T, int N>
struct Group {
  const T* k[N];
  Compute<T> weight[N];
};

template <class T, int N, class A>
FK_INLINE Group<T, N> group_at(const A& a, int64_t first, const Segment& s,
                               const Rows<Compute<T>>& rows) {
  Group<T, N> group;
  for (int j = 0; j < N; ++j) {
    group.k[j] = read<T>(a.ks[first + j], s.sample, s.first, rows.floats(j), s.count);
    group.weight[j] = static_cast<Compute<T>>(a.weights[first + j]);
  }
  return group;
}

template <class T, int N>
FK_INLINE Compute<T> sum_at(const Group<T, N>& group, int64_t i) {
  Compute<T> sum = group.weight[0] * widen(group.k[0][i]);
  for (int j = 1; j < N; ++j) sum += group.weight[j] * widen(group.k[j][i]);
  return sum;
}

// sum[i] (+)= the stages of one group.
template <class T, class A>
FK_INLINE void add_group(const A& a, int64_t first, const Segment& s, const Rows<Compute<T>>& rows,
                         Compute<T>* sum) {
  const auto group = group_at<T, kGroup>(a, first, s, rows);
  if (first == 0) {
#pragma omp simd
    for (int64_t i = 0; i < s.count; ++i) sum[i] = sum_at(group, i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < s.count; ++i) sum[i] += sum_at(group, i);
  }
}

// Calls each(i, sum of all stages at i) for the elements of a block. The last 1..kGroup stages are
// added as their sum is used, those before them in passes over `sum`.
template <class T, int N, class A, class F>
FK_INLINE void for_each_sum(const A& a, int64_t first, const Segment& s,
                            const Rows<Compute<T>>& rows, const Compute<T>* sum, const F& each) {
  const auto group = group_at<T, N>(a, first, s, rows);
  if (first == 0) {
#pragma omp simd
    for (int64_t i = 0; i < s.count; ++i) each(i, sum_at(group, i));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < s.count; ++i) each(i, sum[i] + sum_at(group, i));
  }
}

template <class T, class A, class F>
FK_INLINE void for_each_sum(const A& a, const Segment& s, const Rows<Compute<T>>& rows,
                            Compute<T>* sum, const F& each) {
  int64_t first = 0;
  for (; a.count - first > kGroup; first += kGroup) add_group<T>(a, first, s, rows, sum);
  switch (a.count - first) {
    case 0:  // every weight is 0
      for (int64_t i = 0; i < s.count; ++i) each(i, Compute<T>{0});
      return;
    case 1:
      return for_each_sum<T, 1>(a, first, s, rows, sum, each);
    case 2:
      return for_each_sum<T, 2>(a, first, s, rows, sum, each);
    case 3:
      return for_each_sum<T, 3>(a, first, s, rows, sum, each);
    case 4:
      return for_each_sum<T, 4>(a, first, s, rows, sum, each);
  }
}

// The CPU's own loops where there are some for T (of which every operand then is), else null.
template <class T>
FK_INLINE const RungeKuttaRows* own_rows(int64_t stages) {
  return std::is_same_v<T, BFloat16> && stages <= kMostStages ? runge_kutta_rows() : nullptr;
}

// The stages of a block, for those loops.
template <class A>
FK_INLINE StageRow stages_at(const A& a, const Segment& s) {
  StageRow stages;
  stages.count = a.count;
  stages.dt = static_cast<float>(a.dt[s.sample * a.dt_stride]);
  for (int64_t j = 0; j < a.count; ++j) {
    stages.ks[j] = in_place<BFloat16>(a.ks[j], s.sample, s.first);
    stages.weights[j] = static_cast<float>(a.weights[j]);
  }
  return stages;
}

template <class T>
FK_INLINE void combine_range(const Combine& a, int64_t begin, int64_t end) {
  using C = Compute<T>;
  const int64_t total = a.batch * a.elements;
  const RungeKuttaRows* own = own_rows<T>(a.count);
  const Rows<C> rows(kGroup + 3);
  for (int64_t flat = begin * kBlock; flat < std::min(total, end * kBlock);) {
    const Segment s = segment_at(flat, std::min(total, (flat / kBlock + 1) * kBlock), a.elements);
    flat += s.count;
    if (own) {
      own->combine(stages_at(a, s), in_place<BFloat16>(a.y, s.sample, s.first),
                   in_place<BFloat16>(a.out, s.sample, s.first), s.count);
      continue;
    }
    const C dt = static_cast<C>(a.dt[s.sample * a.dt_stride]);
    const T* y = read<T>(a.y, s.sample, s.first, rows.floats(kGroup), s.count);
    char* target = at<T>(a.out, s.sample, s.first);
    T* out = typed_target<T>(target, a.out.dtype, rows.floats(kGroup + 1));
    for_each_sum<T>(a, s, rows, rows[kGroup + 2], [&](int64_t i, C sum) FK_INLINE_LAMBDA {
      narrow(widen(y[i]) + dt * sum, out[i]);
    });
    store_typed(out, target, a.out.dtype, s.count);
  }
}

// A tolerance row: as given, or a constant one.
template <class C>
struct Tolerance {
  const C* row;
  C value;
  FK_INLINE_LAMBDA C operator[](int64_t i) const { return row ? row[i] : value; }
};

// Sum of squares of error / tolerance over one block; the error is built in `error`.
template <class T, class C = Compute<T>>
FK_INLINE C square_sum(const C* error, const T* y0, const T* y1, const Tolerance<C>& rtol,
                       const Tolerance<C>& atol, int64_t n) {
  C total = 0;
  if (!rtol.row && !atol.row) {
    const C relative = rtol.value, absolute = atol.value;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) {
      // Not std::max: a NaN in either state must reach the norm.
      const C before = std::abs(widen(y0[i])), after = std::abs(widen(y1[i]));
      const C largest = before > after || before != before ? before : after;
      const C ratio = error[i] / (absolute + relative * largest);
      total += ratio * ratio;
    }
  } else {
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) {
      const C before = std::abs(widen(y0[i])), after = std::abs(widen(y1[i]));
      const C largest = before > after || before != before ? before : after;
      const C ratio = error[i] / (atol[i] + rtol[i] * largest);
      total += ratio * ratio;
    }
  }
  return total;
}

template <class C>
FK_INLINE Tolerance<C> tolerance_at(const void* data, double value, int64_t flat) {
  return {data ? static_cast<const C*>(data) + flat : nullptr, static_cast<C>(value)};
}

template <class T>
FK_INLINE Compute<T> error_block(const StepError& a, const Segment& s,
                                 const Rows<Compute<T>>& rows) {
  using C = Compute<T>;
  const C dt = static_cast<C>(a.dt[s.sample * a.dt_stride]);
  char* target = a.error ? at<T>(a.error, s.sample, s.first) : nullptr;
  C* error = rows[kGroup];
  if constexpr (std::is_same_v<T, C>) {
    if (target) error = typed_target<T>(target, a.error.dtype, rows.floats(kGroup));
  }
  for_each_sum<T>(a, s, rows, rows[kGroup + 1],
                  [&](int64_t i, C sum) FK_INLINE_LAMBDA { error[i] = dt * sum; });
  const T* y0 = read<T>(a.y0, s.sample, s.first, rows.floats(kGroup + 2), s.count);
  const T* y1 = read<T>(a.y1, s.sample, s.first, rows.floats(kGroup + 3), s.count);
  const int64_t flat = s.sample * a.elements + s.first;
  const C sum = square_sum(error, y0, y1, tolerance_at<C>(a.rtol, a.rtol_value, flat),
                           tolerance_at<C>(a.atol, a.atol_value, flat), s.count);
  if constexpr (std::is_same_v<C, float>) {
    if (target) store_row(error, target, a.error.dtype, s.count);
  }
  return sum;
}

FK_INLINE float own_error_block(const StepError& a, const Segment& s, const RungeKuttaRows& own) {
  const auto operand = [&](const View& view)
                           FK_INLINE_LAMBDA { return in_place<BFloat16>(view, s.sample, s.first); };
  const auto tolerance = [&](const void* data) FK_INLINE_LAMBDA {
    return data ? static_cast<const float*>(data) + s.sample * a.elements + s.first : nullptr;
  };
  const ErrorRow row{operand(a.y0),
                     operand(a.y1),
                     operand(a.error),
                     tolerance(a.rtol),
                     tolerance(a.atol),
                     static_cast<float>(a.rtol_value),
                     static_cast<float>(a.atol_value)};
  return own.error(stages_at(a, s), row, s.count);
}

template <class T>
FK_INLINE void error_range(const StepError& a, int64_t begin, int64_t end) {
  // The error has the dtype of all stages, of which those without weight are not here.
  const RungeKuttaRows* own = all_of<BFloat16>(a.error) ? own_rows<T>(a.count) : nullptr;
  const Rows<Compute<T>> rows(kGroup + 4);
  const int64_t chunks = chunks_of(a.elements);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t sample = chunk / chunks, first = chunk % chunks * kChunk;
    const int64_t last = std::min(first + kChunk, a.elements);
    double total = 0.;
    for (int64_t at = first; at < last; at += kBlock) {
      const Segment s{sample, at, std::min(kBlock, last - at)};
      total += own ? own_error_block(a, s, *own) : error_block<T>(a, s, rows);
    }
    a.partial[chunk] = total;
  }
}

}  // namespace

#define FK_DEFINE(T)                                                           \
  template <>                                                                  \
  FK_CLONES void rk_combine<T>(const Combine& a, int64_t begin, int64_t end) { \
    combine_range<T>(a, begin, end);                                           \
  }                                                                            \
  template <>                                                                  \
  FK_CLONES void rk_error<T>(const StepError& a, int64_t begin, int64_t end) { \
    error_range<T>(a, begin, end);                                             \
  }

FK_DEFINE(float)
FK_DEFINE(BFloat16)
FK_DEFINE(Float16)
FK_DEFINE(double)

}  // namespace flowkernels
