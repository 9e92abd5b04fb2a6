// Built without contraction to fused multiply-add: products are rounded before they are added, as
// separate operators of PyTorch round them, so that `normed` and `weighted` give their bits.
#include "heads.h"

#include "head_pairs.h"

namespace flowkernels {
namespace {

// What is rounded on the way: nothing; to bfloat16 z, and xhat too where asked; or each to a dtype
// that is known at run time (both roundings are taken and one is chosen: branches would not
// vectorise).
struct Unrounded {
  FK_INLINE_LAMBDA float normed(float value) const { return value; }
  FK_INLINE_LAMBDA float weighted(float value) const { return value; }
};

struct RoundedToBFloat16 {
  bool both;

  FK_INLINE_LAMBDA float normed(float value) const { return both ? weighted(value) : value; }
  FK_INLINE_LAMBDA float weighted(float value) const {
    return bits_to_float(bfloat16_word(value) & 0xffff0000u);
  }
};

struct RoundedToAny {
  DType normed_dtype, weighted_dtype;

  static FK_INLINE_LAMBDA float to(DType dtype, float value) {
    const float bfloat16 = bfloat16_to_float(float_to_bfloat16(value));
    const float float16 = float16_to_float(float_to_float16(value));
    return dtype == DType::bfloat16 ? bfloat16 : (dtype == DType::float16 ? float16 : value);
  }
  FK_INLINE_LAMBDA float normed(float value) const { return to(normed_dtype, value); }
  FK_INLINE_LAMBDA float weighted(float value) const { return to(weighted_dtype, value); }
};

template <Pairs kPairs, class T, class Rounding>
FK_INLINE void forward_head(const T* x, T* y, float rstd, const float* table,
                            const Rounding& rounding, int64_t n) {
  const float* weight = table + kWeight * n;
  if constexpr (kPairs == Pairs::none) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      narrow(rounding.weighted(rounding.normed(widen(x[i]) * rstd) * weight[i]), y[i]);
  } else {
    const int64_t half = n / 2;
    const float *cos = table + kCos * n, *sin = table + kSin * n;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      float a, b;
      load_pair<kPairs>(x, i, half, a, b);
      a = rounding.weighted(rounding.normed(a * rstd) * weight[i]);
      b = rounding.weighted(rounding.normed(b * rstd) * weight[half + i]);
      if constexpr (turns(kPairs)) {
        const float turned = a * cos[i] + b * sin[i];
        b = b * cos[half + i] + a * sin[half + i];
        a = turned;
      }
      store_pair<kPairs>(a, b, y, i, half);
    }
  }
}

FK_INLINE Place place_in(const Heads& a, const HeadsPiece& p, int64_t b, int64_t s) {
  return p.packed ? place_of(a.packing, b, p.stream, s) : Place{p.offset + s, true};
}

FK_INLINE float* rstd_of(const Heads& a, const HeadsPiece& p, int64_t b, int64_t s) {
  return p.rstd + (b * p.joint_rows + p.offset + s) * a.heads;
}

FK_INLINE void clear(const HeadView& view, int64_t b, int64_t s, int64_t heads, int64_t n) {
  zero_heads(view.row(b, s), view.dtype, view.head_stride, heads, n);
}

FK_INLINE void copy(const Heads& a, const char* source, const HeadView& from, char* target,
                    const HeadView& to) {
  copy_heads(source, from.dtype, from.head_stride, target, to.dtype, to.head_stride, a.heads,
             a.head_dim);
}

// Heads whose statistics are taken before the first of them is written: they do not wait on one
// another. With a whole token at a time the reads and the writes of memory overlapped less, which
// took up to a third longer at [1, 1536, 24, 128] float32 (one thread, machine under load).
constexpr int64_t kGroup = 4;

// Normed, rotated or both. Each head is read from memory once, and again from L1.
template <Pairs kPairs, class T, class Rounding, class Width>
FK_INLINE void forward_rows(const Heads& a, const HeadsPiece& p, const Rounding& rounding,
                            int64_t begin, int64_t end, const Width& width) {
  const int64_t n = width, heads = a.heads;
  Scratch scratch(1, kRows * n), wide(2, heads * n), statistics(1, heads);
  float* table = scratch[0];
  load_weight<kPairs>(p.weight, table, n);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / p.rows, s = index % p.rows;
    const Place place = place_in(a, p, b, s);
    float* rstd = p.rstd ? rstd_of(a, p, b, s) : statistics[0];
    if (!place.valid) {
      for (int64_t h = 0; h < heads; ++h) rstd[h] = 0.f;
      clear(p.joint, b, place.row, heads, n);
      continue;
    }
    const HeadRows<T> x = head_rows<T>(p.input, b, s, heads, n, wide[0]);
    if constexpr (turns(kPairs)) load_turn<kPairs>(a.rope, p.position + s, table, n);
    const HeadTargets<T> y = head_targets<T>(p.joint, b, place.row, n, wide[1]);
    for (int64_t first = 0; first < heads; first += kGroup) {
      const int64_t last = std::min(first + kGroup, heads);
      for (int64_t h = first; h < last; ++h)
        rstd[h] = p.norm ? 1.f / std::sqrt(sum_of_squares(x[h], n) / n + a.eps) : 1.f;
      for (int64_t h = first; h < last; ++h)
        forward_head<kPairs>(x[h], y[h], rstd[h], table, rounding, n);
    }
    store_heads(y, p.joint, b, place.row, heads, n);
  }
}

FK_INLINE void copy_rows(const Heads& a, const HeadsPiece& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / p.rows, s = index % p.rows;
    const Place place = place_in(a, p, b, s);
    if (p.rstd)
      for (int64_t h = 0; h < a.heads; ++h) rstd_of(a, p, b, s)[h] = 1.f;
    if (place.valid)
      copy(a, p.input.row(b, s), p.input, p.joint.row(b, place.row), p.joint);
    else
      clear(p.joint, b, place.row, a.heads, a.head_dim);
  }
}

template <class T>
constexpr Pairs kStill = std::is_same_v<T, float> ? Pairs::none : Pairs::still;

template <class T, class Rounding, class Width>
FK_INLINE void forward_piece(const Heads& a, const HeadsPiece& p, const Rounding& rounding,
                             int64_t begin, int64_t end, const Width& width) {
  if (!p.rope)
    forward_rows<kStill<T>, T>(a, p, rounding, begin, end, width);
  else if (a.rope.interleaved)
    forward_rows<Pairs::neighbours, T>(a, p, rounding, begin, end, width);
  else
    forward_rows<Pairs::halves, T>(a, p, rounding, begin, end, width);
}

// Elements go two by two in bfloat16: heads of an odd width go through float32.
FK_INLINE bool in_bfloat16(const Heads& a, const HeadsPiece& p) {
  return a.head_dim % 2 == 0 && all_of<BFloat16>(p.input, p.joint, p.grad);
}

// f(piece, begin, end) for the part of [begin, end) that falls on each piece's items.
template <class Count, class F>
FK_INLINE void each_piece(const Heads& a, int64_t begin, int64_t end, const Count& count,
                          const F& f) {
  int64_t base = 0;
  for (int i = 0; i < a.count; ++i) {
    const int64_t items = count(i);
    const int64_t from = std::max(begin - base, int64_t{0}), to = std::min(end - base, items);
    if (from < to) f(a.pieces[i], from, to);
    base += items;
  }
}

}  // namespace

FK_CLONES void heads_forward(const Heads& a, int64_t begin, int64_t end) {
  const auto forward = [&](const HeadsPiece& p, int64_t from, int64_t to) FK_INLINE_LAMBDA {
    const bool rounds = p.normed != DType::float32 || p.weighted != DType::float32;
    if (!p.norm && !p.rope) return copy_rows(a, p, from, to);
    if (rounds && !in_bfloat16(a, p))
      return forward_piece<float>(a, p, RoundedToAny{p.normed, p.weighted}, from, to,
                                  AnyWidth{a.head_dim});
    with_width(a.head_dim, [&](const auto& width) FK_INLINE_LAMBDA {
      if (!in_bfloat16(a, p))
        forward_piece<float>(a, p, Unrounded{}, from, to, width);
      else if (!rounds)
        forward_piece<BFloat16>(a, p, Unrounded{}, from, to, width);
      else
        forward_piece<BFloat16>(a, p, RoundedToBFloat16{p.normed != DType::float32}, from, to,
                                width);
    });
  };
  each_piece(a, begin, end, [&](int i) { return piece_rows(a, i); }, forward);
}

// With g the gradient of y, turned back: gz = g cos + (turn's transpose)(g) sin:
//   grad_weight = sum gz * xhat                     over all tokens and heads
//   grad_x = rstd * (gz w - xhat * mean(gz w xhat))
// where nothing is normed, grad_x = gz. Roundings of the forward pass count as the identity.
namespace {

template <Pairs kPairs, class T>
FK_INLINE void turned_back(const T* g, const float* table, int64_t i, int64_t n, float& first,
                           float& second) {
  const float *cos = table + kCos * n, *sin = table + kSin * n;
  const int64_t half = n / 2;
  float a, b;
  load_pair<kPairs>(g, i, half, a, b);
  first = turns(kPairs) ? a * cos[i] + b * sin[half + i] : a;
  second = turns(kPairs) ? b * cos[half + i] + a * sin[i] : b;
}

// gz into its row of the table, the share of the weight's gradient onto another; returns the sum of
// gz w x.
template <Pairs kPairs, class T>
FK_INLINE float backward_sums(const T* g, const T* x, float rstd, float* table, int64_t n) {
  const float* weight = table + kWeight * n;
  float *gz = table + kGradient * n, *sums = table + kSums * n;
  float along = 0.f;
  if constexpr (kPairs == Pairs::none) {
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < n; ++i) {
      const float product = widen(g[i]) * widen(x[i]);
      gz[i] = widen(g[i]);
      along += product * weight[i];
      sums[i] += product * rstd;
    }
  } else {
    const int64_t half = n / 2;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < half; ++i) {
      float g0, g1, x0, x1;
      turned_back<kPairs>(g, table, i, n, g0, g1);
      load_pair<kPairs>(x, i, half, x0, x1);
      gz[i] = g0;
      gz[half + i] = g1;
      x0 *= g0;
      x1 *= g1;
      along += x0 * weight[i] + x1 * weight[half + i];
      sums[i] += x0 * rstd;
      sums[half + i] += x1 * rstd;
    }
  }
  return along;
}

template <Pairs kPairs, class T>
FK_INLINE void backward_head(const T* x, float rstd, float along, const float* table, T* grad,
                             int64_t n) {
  const float *weight = table + kWeight * n, *gz = table + kGradient * n;
  const float pull = along * rstd * rstd / n;  // xhat * mean(gz w xhat) = x * pull
  if constexpr (kPairs == Pairs::none) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      narrow(rstd * (gz[i] * weight[i] - widen(x[i]) * pull), grad[i]);
  } else {
    const int64_t half = n / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      float a, b;
      load_pair<kPairs>(x, i, half, a, b);
      store_pair<kPairs>(rstd * (gz[i] * weight[i] - a * pull),
                         rstd * (gz[half + i] * weight[half + i] - b * pull), grad, i, half);
    }
  }
}

// A token's heads; what they add to the weight's gradient goes onto a row of the table.
template <Pairs kPairs, class T>
FK_INLINE void backward_token(const Heads& a, const HeadsPiece& p, const HeadRows<T>& g,
                              const HeadRows<T>& x, const float* rstd, float* table,
                              const HeadTargets<T>& grad, int64_t n) {
  for (int64_t h = 0; h < a.heads; ++h) {
    if (p.norm) {
      const float along = backward_sums<kPairs>(g[h], x[h], rstd[h], table, n);
      if (p.grad) backward_head<kPairs>(x[h], rstd[h], along, table, grad[h], n);
    } else if constexpr (turns(kPairs)) {
      const int64_t half = n / 2;
      T* out = grad[h];
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        float g0, g1;
        turned_back<kPairs>(g[h], table, i, n, g0, g1);
        store_pair<kPairs>(g0, g1, out, i, half);
      }
    }
  }
}

// Rows of one chunk. Shares of the weight's gradient are added up for a token first: sums of few
// terms keep the digits.
template <Pairs kPairs, class T, class Width>
FK_INLINE void backward_rows(const Heads& a, const HeadsPiece& p, int64_t begin, int64_t end,
                             float* partial, const Width& width) {
  const int64_t n = width, heads = a.heads;
  Scratch scratch(2, kRows * n), wide(3, heads * n);
  float *table = scratch[0], *token = table + kSums * n, *sums = scratch[1];
  load_weight<kPairs>(p.weight, table, n);
  for (int64_t i = 0; i < n; ++i) sums[i] = 0.f;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / p.rows, s = index % p.rows;
    const Place place = place_in(a, p, b, s);
    if (!place.valid) {
      if (p.grad) clear(p.grad, b, s, heads, n);
      continue;
    }
    for (int64_t i = 0; i < n; ++i) token[i] = 0.f;
    if constexpr (turns(kPairs)) load_turn<kPairs>(a.rope, p.position + s, table, n);
    const HeadRows<T> g = head_rows<T>(p.joint, b, place.row, heads, n, wide[0]);
    const HeadRows<T> x = p.norm ? head_rows<T>(p.input, b, s, heads, n, wide[1]) : HeadRows<T>{};
    const HeadTargets<T> grad =
        p.grad ? head_targets<T>(p.grad, b, s, n, wide[2]) : HeadTargets<T>{};
    backward_token<kPairs>(a, p, g, x, p.norm ? rstd_of(a, p, b, s) : nullptr, table, grad, n);
    if (p.grad) store_heads(grad, p.grad, b, s, heads, n);
    for (int64_t i = 0; i < n; ++i) sums[i] += token[i];
  }
  if (partial) from_pair_order<kPairs>(sums, partial, n);
}

FK_INLINE void copy_back_rows(const Heads& a, const HeadsPiece& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / p.rows, s = index % p.rows;
    const Place place = place_in(a, p, b, s);
    if (place.valid)
      copy(a, p.joint.row(b, place.row), p.joint, p.grad.row(b, s), p.grad);
    else
      clear(p.grad, b, s, a.heads, a.head_dim);
  }
}

template <class T, class Width>
FK_INLINE void backward_piece(const Heads& a, const HeadsPiece& p, int64_t begin, int64_t end,
                              float* partial, const Width& width) {
  if (!p.rope)
    backward_rows<kStill<T>, T>(a, p, begin, end, partial, width);
  else if (a.rope.interleaved)
    backward_rows<Pairs::neighbours, T>(a, p, begin, end, partial, width);
  else
    backward_rows<Pairs::halves, T>(a, p, begin, end, partial, width);
}

}  // namespace

FK_CLONES void heads_backward(const Heads& a, int64_t begin, int64_t end) {
  const auto backward = [&](const HeadsPiece& p, int64_t from, int64_t to) FK_INLINE_LAMBDA {
    for (int64_t chunk = from; chunk < to; ++chunk) {
      const int64_t first = chunk * a.rows_per_chunk;
      const int64_t last = std::min(first + a.rows_per_chunk, a.batch * p.rows);
      float* partial = p.partial ? p.partial + chunk * a.head_dim : nullptr;
      if (!p.norm && !p.rope) {
        copy_back_rows(a, p, first, last);
        continue;
      }
      with_width(a.head_dim, [&](const auto& width) FK_INLINE_LAMBDA {
        if (in_bfloat16(a, p))
          backward_piece<BFloat16>(a, p, first, last, partial, width);
        else
          backward_piece<float>(a, p, first, last, partial, width);
      });
    }
  };
  each_piece(a, begin, end, [&](int i) { return piece_chunks(a, i); }, backward);
}

}  // namespace flowkernels
