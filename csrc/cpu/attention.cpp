#include "attention.h"

#include <limits>

#include "vector_math.h"

namespace flowkernels {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kTileRows = 6;  // with one vector each they fit AVX2's registers, and hide a latency
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

FK_INLINE int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
FK_INLINE Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
FK_INLINE const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

// A row-major matrix in scratch.
struct Matrix {
  float* data;
  int64_t stride;

  FK_INLINE_LAMBDA float* row(int64_t i) const { return data + i * stride; }
};

template <int kRows, bool kTransposed>
FK_INLINE void tile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                    int64_t c_stride, int64_t depth) {
  Lanes sum[kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const Lanes row = lanes(b + k * b_stride);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      sum[r] += (kTransposed ? a[k * a_stride + r] : a[r * a_stride + k]) * row;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) lanes(c + r * c_stride) = sum[r];
}

// c = a b, or a^T b: c of `rows` by `columns` (a multiple of the lanes), `depth` products each.
template <bool kTransposed>
FK_INLINE void multiply(const Matrix& a, const Matrix& b, const Matrix& c, int64_t rows,
                        int64_t columns, int64_t depth) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t j = 0; j < columns; j += kLanes) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
      const float* left = kTransposed ? a.data + first : a.row(first);
      const float* right = b.data + j;
      float* target = c.row(first) + j;
#define FK_TILE(n)                                                                  \
  case n:                                                                           \
    tile<n, kTransposed>(left, a.stride, right, b.stride, target, c.stride, depth); \
    break;
      switch (count) {
        FK_TILE(1)
        FK_TILE(2)
        FK_TILE(3)
        FK_TILE(4)
        FK_TILE(5)
        FK_TILE(6)
      }
#undef FK_TILE
    }
  }
}

// One head's operand, in memory.
struct Rows {
  char* data;
  DType dtype;
  int64_t stride;

  FK_INLINE_LAMBDA char* row(int64_t i) const { return data + i * stride; }
};

FK_INLINE Rows head_of(const HeadView& view, int64_t b, int64_t h) {
  const int64_t size = element_size(view.dtype);
  return {view.row(b, 0) + h * view.head_stride * size, view.dtype, view.row_stride * size};
}

// Whether products can read and write it where it lies.
FK_INLINE bool in_place(const Rows& rows, int64_t n) {
  return rows.dtype == DType::float32 && n % kLanes == 0;
}

FK_INLINE Matrix as_matrix(const Rows& rows) {
  return {reinterpret_cast<float*>(rows.data), rows.stride / int64_t{sizeof(float)}};
}

// An operand of a product: in memory, or widened to `scratch`, with zeros up to its stride.
FK_INLINE Matrix load(const Rows& source, const Matrix& scratch, int64_t rows, int64_t n) {
  if (in_place(source, n)) return as_matrix(source);
  for (int64_t i = 0; i < rows; ++i) {
    float* target = scratch.row(i);
    const float* row = load_row(source.row(i), source.dtype, target, n);
    if (row != target) std::memcpy(target, row, n * sizeof(float));
    for (int64_t j = n; j < scratch.stride; ++j) target[j] = 0.f;
  }
  return scratch;
}

FK_INLINE Matrix result(const Rows& target, const Matrix& scratch, int64_t n) {
  return in_place(target, n) ? as_matrix(target) : scratch;
}

FK_INLINE void store(const Matrix& source, const Rows& target, int64_t rows, int64_t n) {
  if (in_place(target, n)) return;
  for (int64_t i = 0; i < rows; ++i) store_row(source.row(i), target.row(i), target.dtype, n);
}

FK_INLINE void clear(const Rows& target, int64_t begin, int64_t end, int64_t n) {
  for (int64_t i = begin; i < end; ++i)
    std::memset(target.row(i), 0, n * element_size(target.dtype));
}

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
#if defined(__clang__)
#define FK_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
typedef int32_t FourIndices __attribute__((vector_size(16)));
#define FK_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, FourIndices{__VA_ARGS__})
#endif

// Four by four; the last row stands in for those that are missing, and fills lanes nobody reads.
FK_INLINE void transpose(const Matrix& source, const Matrix& target, int64_t rows, int64_t n) {
  for (int64_t i = 0; i < rows; i += 4) {
    const float* row[4];
    for (int64_t t = 0; t < 4; ++t) row[t] = source.row(std::min(i + t, rows - 1));
    for (int64_t j = 0; j < n; j += 4) {
      const auto at = [&](int t)
                          FK_INLINE_LAMBDA { return *reinterpret_cast<const Four*>(row[t] + j); };
      const Four a = at(0), b = at(1), c = at(2), d = at(3);
      const Four ab = FK_SHUFFLE(a, b, 0, 4, 1, 5), cd = FK_SHUFFLE(c, d, 0, 4, 1, 5);
      const Four AB = FK_SHUFFLE(a, b, 2, 6, 3, 7), CD = FK_SHUFFLE(c, d, 2, 6, 3, 7);
      const auto to = [&](int t) FK_INLINE_LAMBDA -> Four& {
        return *reinterpret_cast<Four*>(target.row(j + t) + i);
      };
      to(0) = FK_SHUFFLE(ab, cd, 0, 1, 4, 5);
      to(1) = FK_SHUFFLE(ab, cd, 2, 3, 6, 7);
      to(2) = FK_SHUFFLE(AB, CD, 0, 1, 4, 5);
      to(3) = FK_SHUFFLE(AB, CD, 2, 3, 6, 7);
    }
  }
}

FK_INLINE int64_t keys_of(const Attention& a, int64_t b) {
  return a.lengths ? std::clamp<int64_t>(a.lengths[b], 0, a.keys) : a.keys;
}

// Maxima, exponentials and their sums over the keys, of `rows` queries side by side.
FK_INLINE void softmax(const Matrix& p, int64_t keys, int64_t columns, float scale, float* maximum,
                       float* sum) {
  // The largest score is that of the largest product, or of the least one.
  const float sign = scale < 0.f ? -1.f : 1.f;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Lanes top = lanes(p.data + j) * sign;
    for (int64_t s = 1; s < keys; ++s) {
      const Lanes x = lanes(p.row(s) + j) * sign;
      top = x > top ? x : top;
    }
    lanes(maximum + j) = top * sign;
    lanes(sum + j) = Lanes{};
  }
  for (int64_t s = 0; s < keys; ++s) {
    float* row = p.row(s);
#pragma omp simd
    for (int64_t r = 0; r < columns; ++r) {
      // Products are subtracted, then scaled. A difference of scores, fused with the scaling of
      // one, is off by the other's rounding: beyond 88 where they are large.
      row[r] = vector_exp((row[r] - maximum[r]) * scale);
      sum[r] += row[r];
    }
  }
#pragma omp simd
  for (int64_t r = 0; r < columns; ++r) maximum[r] *= scale;
}

// Where a worker keeps one head.
struct Workspace {
  Workspace(const Attention& a, int64_t elements, int64_t lines)
      : width(padded(a.head_dim)),
        columns(padded(a.rows)),
        memory(1, elements * width + (width + lines) * columns),
        next(memory[0]) {}

  // Rows of a head's elements, and lines of queries side by side.
  Matrix elements(int64_t rows) { return take(rows, width); }
  Matrix queries(int64_t rows) { return take(rows, columns); }
  // The transpose of elements: its lines past the last element, and lanes past the last query,
  // are written and read, but say nothing.
  Matrix turned() {
    const Matrix made = take(width, columns);
    std::memset(made.data, 0, width * columns * sizeof(float));
    return made;
  }

  int64_t width, columns;

 private:
  Matrix take(int64_t rows, int64_t stride) {
    float* data = next;
    next += rows * stride;
    return {data, stride};
  }

  Scratch memory;
  float* next;
};

}  // namespace

FK_CLONES void attention_forward(const Attention& a, int64_t begin, int64_t end) {
  const int64_t n = a.head_dim, rows = a.rows;
  Workspace space(a, rows + 2 * a.keys, a.keys + 2);
  const Matrix q_space = space.elements(rows), k_space = space.elements(a.keys);
  const Matrix v_space = space.elements(a.keys), turned = space.turned();
  const Matrix p = space.queries(a.keys), statistics = space.queries(2);
  float *maximum = statistics.row(0), *sum = statistics.row(1);
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / a.heads, h = index % a.heads, keys = keys_of(a, b);
    const Rows target = head_of(a.out, b, h);
    float* lse = a.lse + index * rows;
    if (keys == 0) {
      clear(target, 0, rows, n);
      for (int64_t r = 0; r < rows; ++r) lse[r] = -std::numeric_limits<float>::infinity();
      continue;
    }
    const Matrix k = load(head_of(a.k, b, h), k_space, keys, n);
    const Matrix v = load(head_of(a.v, b, h), v_space, keys, n);
    transpose(load(head_of(a.q, b, h), q_space, rows, n), turned, rows, n);
    multiply<false>(k, turned, p, keys, space.columns, n);
    softmax(p, keys, space.columns, a.scale, maximum, sum);
    const Matrix out = result(target, q_space, n);
    multiply<true>(p, v, out, rows, padded(n), keys);
    for (int64_t r = 0; r < rows; ++r) {
      const float share = 1.f / sum[r];
      float* row = out.row(r);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) row[i] *= share;
    }
    store(out, target, rows, n);
#pragma omp simd
    for (int64_t r = 0; r < rows; ++r) lse[r] = maximum[r] + vector_log(sum[r]);
  }
}

FK_CLONES void attention_backward(const Attention& a, int64_t begin, int64_t end) {
  const int64_t n = a.head_dim, rows = a.rows;
  Workspace space(a, 2 * rows + 2 * a.keys, 2 * a.keys + 3);
  const Matrix q_space = space.elements(rows), k_space = space.elements(a.keys);
  const Matrix v_space = space.elements(a.keys), grad_space = space.elements(rows);
  const Matrix turned = space.turned(), p = space.queries(a.keys), ds = space.queries(a.keys);
  const Matrix statistics = space.queries(3);
  float *maximum = statistics.row(0), *sum = statistics.row(1), *delta = statistics.row(2);
  const int64_t columns = space.columns, width = space.width;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / a.heads, h = index % a.heads, keys = keys_of(a, b);
    const Rows grad_q = head_of(a.grad_q, b, h), grad_k = head_of(a.grad_k, b, h);
    const Rows grad_v = head_of(a.grad_v, b, h);
    clear(grad_k, keys, a.keys, n);
    clear(grad_v, keys, a.keys, n);
    if (keys == 0) {
      clear(grad_q, 0, rows, n);
      continue;
    }
    const Matrix q = load(head_of(a.q, b, h), q_space, rows, n);
    const Matrix k = load(head_of(a.k, b, h), k_space, keys, n);
    const Matrix v = load(head_of(a.v, b, h), v_space, keys, n);
    const Matrix grad = load(head_of(a.grad_out, b, h), grad_space, rows, n);
    transpose(q, turned, rows, n);
    multiply<false>(k, turned, p, keys, columns, n);
    transpose(grad, turned, rows, n);
    multiply<false>(v, turned, ds, keys, columns, n);
    softmax(p, keys, columns, a.scale, maximum, sum);
#pragma omp simd
    for (int64_t r = 0; r < columns; ++r) {
      sum[r] = 1.f / sum[r];
      delta[r] = 0.f;
    }
    for (int64_t s = 0; s < keys; ++s) {
      float *weight = p.row(s), *change = ds.row(s);
#pragma omp simd
      for (int64_t r = 0; r < columns; ++r) {
        weight[r] *= sum[r];
        delta[r] += weight[r] * change[r];
      }
    }
    for (int64_t s = 0; s < keys; ++s) {
      float *weight = p.row(s), *change = ds.row(s);
#pragma omp simd
      for (int64_t r = 0; r < columns; ++r)
        change[r] = a.scale * weight[r] * (change[r] - delta[r]);
    }
    // Each into the scratch of an operand that is no longer read.
    const Matrix dv = result(grad_v, v_space, n);
    multiply<false>(p, grad, dv, keys, width, rows);
    store(dv, grad_v, keys, n);
    const Matrix dq = result(grad_q, grad_space, n);
    multiply<true>(ds, k, dq, rows, width, keys);
    store(dq, grad_q, rows, n);
    const Matrix dk = result(grad_k, k_space, n);
    multiply<false>(ds, q, dk, keys, width, rows);
    store(dk, grad_k, keys, n);
  }
}

}  // namespace flowkernels
