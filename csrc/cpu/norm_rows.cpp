#include "norm_rows.h"

#include "lanes.h"

namespace flowkernels {

#ifdef FK_HAS_LANES
namespace {

// Elements whose mean is the pivot of a row's sums.
constexpr int64_t kPivot = 2 * kPair;

// Further ahead of both operands than the memory's own prefetching, which stops at every page.
constexpr int64_t kGatedAhead = 3072;

template <bool stream, class T>
FK_AVX512 inline void gated_row(const GatedRow& row, int64_t n) {
  const T* residual = reinterpret_cast<const T*>(row.residual);
  const T* branch = reinterpret_cast<const T*>(row.branch);
  const T* gate = reinterpret_cast<const T*>(row.gate);
  T *h = reinterpret_cast<T*>(row.h), *kept = reinterpret_cast<T*>(row.kept);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    if (row.ahead) {
      prefetch(residual + i, kGatedAhead);
      prefetch(branch + i, kGatedAhead);
    }
    const Pair r = load(residual + i), x = load(branch + i), g = load(gate + i);
    const Pair sum{_mm512_fmadd_ps(g.low, x.low, r.low), _mm512_fmadd_ps(g.high, x.high, r.high)};
    store<stream>(sum, h + i);
    if (stream && kept) store<false>(sum, kept + i);
  }
  for (; i < n; ++i) {
    narrow(std::fma(widen(gate[i]), widen(branch[i]), widen(residual[i])), h[i]);
    if (stream && kept) kept[i] = h[i];
  }
}

template <class T>
FK_AVX512 void gated(const GatedRow& row, int64_t n) {
  row.stream ? gated_row<true, T>(row, n) : gated_row<false, T>(row, n);
}

// Of the chains, then of their lanes in order.
FK_AVX512 inline float sum_of(const __m512* chains) {
  alignas(64) float lanes[kLanes];
  _mm512_store_ps(lanes, _mm512_add_ps(_mm512_add_ps(chains[0], chains[1]),
                                       _mm512_add_ps(chains[2], chains[3])));
  float sum = 0.f;
  for (int64_t i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// The mean of the row's first elements.
template <class T>
FK_AVX512 inline float pivot_of(const T* row, int64_t n) {
  if (n >= kPivot) {
    const Pair first = load(row), second = load(row + kPair);
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(first.low, first.high),
                                              _mm512_add_ps(second.low, second.high))) /
           kPivot;
  }
  float sum = 0.f;
  for (int64_t i = 0; i < n; ++i) sum += widen(row[i]);
  return sum / n;
}

struct Sums {
  float first, square;
};

struct Chains {
  __m512 sums[4] = {}, squares[4] = {};
};

FK_AVX512 inline void add(const Pair& x, float pivot, Chains& chains, int64_t k) {
  const __m512 pivots = _mm512_set1_ps(pivot);
  const __m512 low = _mm512_sub_ps(x.low, pivots), high = _mm512_sub_ps(x.high, pivots);
  // By a multiplier's port: those of the additions are the ones in short supply.
  chains.sums[k] = _mm512_fmadd_ps(low, _mm512_set1_ps(1.f), chains.sums[k]);
  chains.sums[k + 1] = _mm512_add_ps(chains.sums[k + 1], high);
  chains.squares[k] = _mm512_fmadd_ps(low, low, chains.squares[k]);
  chains.squares[k + 1] = _mm512_fmadd_ps(high, high, chains.squares[k + 1]);
}

// Sums of x - pivot and of its square.
template <class T>
FK_AVX512 inline Sums sums_about(float pivot, const T* row, int64_t n) {
  Chains chains;
  int64_t i = 0;
  for (; i + 2 * kPair <= n; i += 2 * kPair) {
    add(load(row + i), pivot, chains, 0);
    add(load(row + i + kPair), pivot, chains, 2);
  }
  if (i + kPair <= n) {
    add(load(row + i), pivot, chains, 0);
    i += kPair;
  }
  Sums total{sum_of(chains.sums), sum_of(chains.squares)};
  for (; i < n; ++i) {
    const float x = widen(row[i]) - pivot;
    total.first += x;
    total.square += x * x;
  }
  return total;
}

// A variance taken about a pivot is as good as one about the mean where the two are near. Where
// they are not, a second sweep about the mean found makes it so.
template <class T>
FK_AVX512 Moments moments(const char* source, int64_t n, bool centred) {
  const T* row = reinterpret_cast<const T*>(source);
  float mean = centred ? pivot_of(row, n) : 0.f;
  Sums sums = sums_about(mean, row, n);
  if (!centred) return {0.f, sums.square / n};
  float shift = sums.first / n, variance = sums.square / n - shift * shift;
  mean += shift;
  if (shift * shift > 4.f * variance) {
    sums = sums_about(mean, row, n);
    shift = sums.first / n;
    variance = sums.square / n - shift * shift;
    mean += shift;
  }
  return {mean, variance < 0.f ? 0.f : variance};
}

template <bool stream, class T>
FK_AVX512 inline void normed_row(const NormedRow& row, int64_t n, float mean, float rstd) {
  const T* x = reinterpret_cast<const T*>(row.x);
  const T* next = reinterpret_cast<const T*>(row.next[0]);
  const T* second = reinterpret_cast<const T*>(row.next[1]);
  const float *multiplier = row.multiplier, *addend = row.addend;
  T* y = reinterpret_cast<T*>(row.y);
  const __m512 means = _mm512_set1_ps(mean), rstds = _mm512_set1_ps(rstd);
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    prefetch(next + i);
    if (second) prefetch(second + i);
    const Pair at = load(x + i), m = load(multiplier + i), a = load(addend + i);
    const __m512 low = _mm512_mul_ps(_mm512_sub_ps(at.low, means), rstds);
    const __m512 high = _mm512_mul_ps(_mm512_sub_ps(at.high, means), rstds);
    store<stream>(Pair{_mm512_fmadd_ps(low, m.low, a.low), _mm512_fmadd_ps(high, m.high, a.high)},
                  y + i);
  }
  for (; i < n; ++i) narrow(std::fma((widen(x[i]) - mean) * rstd, multiplier[i], addend[i]), y[i]);
}

template <class T>
FK_AVX512 void normed(const NormedRow& row, int64_t n, float mean, float rstd) {
  row.stream ? normed_row<true, T>(row, n, mean, rstd) : normed_row<false, T>(row, n, mean, rstd);
}

template <class T>
constexpr NormRows kRows{gated<T>, moments<T>, arrange<T>, normed<T>};

}  // namespace

const NormRows* const kFloatNormRows = lanes_supported() ? &kRows<float> : nullptr;
const NormRows* const kBFloat16NormRows = lanes_supported() ? &kRows<BFloat16> : nullptr;
#else
const NormRows *const kFloatNormRows = nullptr, *const kBFloat16NormRows = nullptr;
#endif

}  // namespace flowkernels
