// A token's heads as rows of one type, and a head's elements as the pairs that a rotation turns.
#pragma once

#include <type_traits>

#include "head_rows.h"
#include "heads.h"

namespace flowkernels {

// How the elements of a head pair up to be rotated, or go two by two and are not (`still`).
enum class Pairs { none, still, neighbours, halves };

constexpr bool turns(Pairs pairs) { return pairs == Pairs::neighbours || pairs == Pairs::halves; }

// A token's heads as rows of T: where they lie, or widened into `scratch` [heads, n].
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;
  const T* operator[](int64_t h) const { return data + h * stride; }
};

template <class T>
FK_INLINE HeadRows<T> head_rows(const HeadView& view, int64_t b, int64_t s, int64_t heads,
                                int64_t n, float* scratch) {
  const char* row = view.row(b, s);
  if constexpr (std::is_same_v<T, float>) {
    if (view.dtype != DType::float32) {
      copy_heads(row, view.dtype, view.head_stride, scratch, DType::float32, n, heads, n);
      return {scratch, n};
    }
  }
  return {reinterpret_cast<const T*>(row), view.head_stride};
}

// Where to build them: in place, else in `scratch`, for store_heads to round.
template <class T>
struct HeadTargets {
  T* data;
  int64_t stride;
  T* operator[](int64_t h) const { return data + h * stride; }
};

template <class T>
FK_INLINE HeadTargets<T> head_targets(const HeadView& view, int64_t b, int64_t s, int64_t n,
                                      float* scratch) {
  if constexpr (std::is_same_v<T, float>)
    if (view.dtype != DType::float32) return {scratch, n};
  return {reinterpret_cast<T*>(view.row(b, s)), view.head_stride};
}

template <class T>
FK_INLINE void store_heads(const HeadTargets<T>& targets, const HeadView& view, int64_t b,
                           int64_t s, int64_t heads, int64_t n) {
  if constexpr (std::is_same_v<T, float>)
    if (view.dtype != DType::float32)
      copy_heads(targets.data, DType::float32, n, view.row(b, s), view.dtype, view.head_stride,
                 heads, n);
}

typedef float Float4 __attribute__((vector_size(16)));
typedef float Float8 __attribute__((vector_size(32)));
typedef uint32_t Word4 __attribute__((vector_size(16)));
typedef uint32_t Word8 __attribute__((vector_size(32)));

template <class To, class From>
FK_INLINE To vector_from(const From* source) {
  To value;  // by memcpy: rows are aligned to their elements alone
  std::memcpy(&value, source, sizeof(value));
  return value;
}

// The sum of squares in four chains of eight lanes: PyTorch's order on CPU for rows of 8 to 256
// elements, so that what is rounded after it has PyTorch's bits.
FK_INLINE float sum_of_squares(const float* row, int64_t n) {
  Float8 chains[4] = {};
  const auto add = [&](int chain, int64_t i) FK_INLINE_LAMBDA {
    const Float8 x = vector_from<Float8>(row + i);
    chains[chain] += x * x;
  };
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int chain = 0; chain < 4; ++chain) add(chain, i + 8 * chain);
  for (; i + 8 <= n; i += 8) add(0, i);
  const Float8 lanes = ((chains[0] + chains[1]) + chains[2]) + chains[3];
  float total = 0.f;
  for (; i < n; ++i) total += row[i] * row[i];
  for (int lane = 0; lane < 8; ++lane) total += lanes[lane];
  return total;
}

// The same sum with the same bits. A word holds two elements, so the even lanes of two chains make
// one vector and the odd ones another: widening takes no shuffle.
FK_INLINE float sum_of_squares(const BFloat16* row, int64_t n) {
  Float8 even[2] = {}, odd[2] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int two = 0; two < 2; ++two) {
      const Word8 words = vector_from<Word8>(row + i + 16 * two);
      const Word8 low = words << 16, high = words & 0xffff0000u;
      const Float8 x = vector_from<Float8>(&low), y = vector_from<Float8>(&high);
      even[two] += x * x;
      odd[two] += y * y;
    }
  Float4 lanes[2][4];  // even and odd lanes of each chain
  std::memcpy(lanes[0], even, sizeof(even));
  std::memcpy(lanes[1], odd, sizeof(odd));
  for (; i + 8 <= n; i += 8) {
    const Word4 words = vector_from<Word4>(row + i);
    const Word4 low = words << 16, high = words & 0xffff0000u;
    const Float4 x = vector_from<Float4>(&low), y = vector_from<Float4>(&high);
    lanes[0][0] += x * x;
    lanes[1][0] += y * y;
  }
  const Float4 x = ((lanes[0][0] + lanes[0][1]) + lanes[0][2]) + lanes[0][3];
  const Float4 y = ((lanes[1][0] + lanes[1][1]) + lanes[1][2]) + lanes[1][3];
  float total = 0.f;
  for (; i < n; ++i) total += widen(row[i]) * widen(row[i]);
  for (int lane = 0; lane < 4; ++lane) {
    total += x[lane];
    total += y[lane];
  }
  return total;
}

// The bits of a float32 whose upper half is the bfloat16 nearest to `value`.
FK_INLINE uint32_t bfloat16_word(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : rounded;
}

// A pair of elements. bfloat16 neighbours are the halves of one word: no shuffle.
template <Pairs kPairs, class T>
FK_INLINE void load_pair(const T* row, int64_t i, int64_t half, float& first, float& second) {
  if constexpr (kPairs == Pairs::halves) {
    first = widen(row[i]);
    second = widen(row[half + i]);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t word;
    std::memcpy(&word, row + 2 * i, sizeof(word));
    first = bits_to_float(word << 16);
    second = bits_to_float(word & 0xffff0000u);
  } else {
    first = widen(row[2 * i]);
    second = widen(row[2 * i + 1]);
  }
}

template <Pairs kPairs, class T>
FK_INLINE void store_pair(float first, float second, T* row, int64_t i, int64_t half) {
  if constexpr (kPairs == Pairs::halves) {
    narrow(first, row[i]);
    narrow(second, row[half + i]);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const uint32_t word = bfloat16_word(first) >> 16 | (bfloat16_word(second) & 0xffff0000u);
    std::memcpy(row + 2 * i, &word, sizeof(word));
  } else {
    narrow(first, row[2 * i]);
    narrow(second, row[2 * i + 1]);
  }
}

// A float32 row with the first elements of all pairs before the second ones, and back.
template <Pairs kPairs>
FK_INLINE void to_pair_order(const float* row, float* out, int64_t n) {
  const int64_t half = n / 2;
  if constexpr (kPairs == Pairs::neighbours || kPairs == Pairs::still) {
    for (int64_t i = 0; i < half; ++i) load_pair<kPairs>(row, i, half, out[i], out[half + i]);
  } else {
    std::memcpy(out, row, n * sizeof(float));
  }
}

template <Pairs kPairs>
FK_INLINE void from_pair_order(const float* row, float* out, int64_t n) {
  const int64_t half = n / 2;
  if constexpr (kPairs == Pairs::neighbours || kPairs == Pairs::still) {
    for (int64_t i = 0; i < half; ++i) store_pair<kPairs>(row[i], row[half + i], out, i, half);
  } else {
    std::memcpy(out, row, n * sizeof(float));
  }
}

// A head's width: known when compiled, for the widths of real models, or at run time.
template <int64_t kWidth>
using FixedWidth = std::integral_constant<int64_t, kWidth>;

struct AnyWidth {
  int64_t value;
  operator int64_t() const { return value; }
};

template <class F>
FK_INLINE void with_width(int64_t head_dim, const F& f) {
  if (head_dim == 64)
    f(FixedWidth<64>{});
  else if (head_dim == 128)
    f(FixedWidth<128>{});
  else
    f(AnyWidth{head_dim});
}

// What a head's elements are combined with, in pair order, one behind the other: a base and offsets
// that are known when compiled leave the loops their registers. A position turns (a, b) into
// (a cos0 + b sin0, b cos1 + a sin1), where sin0 is negated; the transpose, for gradients, is
// (a cos0 + b sin1, b cos1 + a sin0).
enum Row { kWeight, kCos, kSin, kGradient, kSums, kSpare, kRows };

// Once for a range of rows: not worth a copy in each kernel.
template <Pairs kPairs>
void load_weight(const View& weight, float* table, int64_t n) {
  for (int64_t i = 0; i < n; ++i) table[kWeight * n + i] = 1.f;
  if (!weight) return;
  const float* row = load_row(weight.data, weight.dtype, table + kSpare * n, n);
  to_pair_order<kPairs>(row, table + kWeight * n, n);
}

template <Pairs kPairs>
FK_INLINE void load_turn(const Rope& rope, int64_t position, float* table, int64_t n) {
  const float* from_cos = rope.cos + position * rope.cos_stride;
  const float* from_sin = rope.sin + position * rope.sin_stride;
  float *cos = table + kCos * n, *sin = table + kSin * n;
  const int64_t half = n / 2;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    float sin0;
    load_pair<kPairs>(from_cos, i, half, cos[i], cos[half + i]);
    load_pair<kPairs>(from_sin, i, half, sin0, sin[half + i]);
    sin[i] = -sin0;
  }
}

}  // namespace flowkernels
