// Norm, modulation and gated residual: the chain between the matrix products of a DiT block.
//
//   h = residual + gate * x                    (where gated; else h is the input)
//   n = normalise(h) * weight + bias           (LayerNorm or RMSNorm over the last dimension)
//   y = n * (1 + scale) + shift
//
// Every operand is a View. Functions work on a range of rows or chunks, so the caller owns the
// threads; what a range computes does not depend on how the ranges were cut.
#pragma once

#include "rows.h"

namespace flowkernels {

struct Extent {
  int64_t batch, rows, columns;
};

struct NormForward {
  Extent extent;
  View input;                       // x, or the residual where gated
  View branch;                      // gated: x of the formula above; else empty
  View gate;                        // gated only
  View h;                           // gated only: output
  View shift, scale, weight, bias;  // each may be empty
  View y;                           // output; empty for gated_residual without a norm
  float* mean;                      // [batch, rows]; null for RMSNorm
  float* rstd;                      // [batch, rows]
  bool rms;
  float eps;
};

// Reads input (+ branch), writes y (+ h): each once. Rows [begin, end) of batch * rows.
void norm_forward(const NormForward& a, int64_t begin, int64_t end);

struct NormBackward {
  Extent extent;
  View grad_y;        // empty: gated residual without a norm
  View grad_h;        // gated only; may be empty
  View h;             // the normalised input (x where not gated)
  View branch, gate;  // gated only
  View scale, weight, bias;
  const float* mean;
  const float* rstd;
  bool rms;
  View grad_input;  // outputs; empty where not wanted
  View grad_branch;
  // Partial sums [chunks, columns] in float32, one row for each chunk of rows; null if not wanted.
  float* partial_gate;
  float* partial_shift;
  float* partial_scale;
  float* partial_weight;
  float* partial_bias;
  int64_t rows_per_chunk;
};

FK_INLINE int64_t elements_of(const Extent& a) { return a.batch * a.rows * a.columns; }

FK_INLINE int64_t chunks_per_batch(int64_t rows, int64_t rows_per_chunk) {
  return (rows + rows_per_chunk - 1) / rows_per_chunk;
}

// Chunks [begin, end) of batch * chunks_per_batch. A chunk never crosses a batch item.
void norm_backward(const NormBackward& a, int64_t begin, int64_t end);

// Second stage: out = sum of partial [batch, chunks, columns] over the dimensions that out lacks,
// in a fixed order. Items [begin, end) of out's leading dimensions.
struct ReducePartials {
  const float* partial;
  int64_t batch, chunks, columns;
  bool keep_batch, keep_chunks;
  char* out;
  DType out_dtype;
};
void reduce_partials(const ReducePartials& a, int64_t begin, int64_t end);

}  // namespace flowkernels
