// Per-head RMSNorm and rotation: what stands between the QKV projections and the attention core.
//
//   xhat = x * rstd,  rstd = 1 / sqrt(mean(x^2) + eps)     over the E elements of a head
//   z    = xhat * weight
//   y    = z * cos + turn(z) * sin          turn takes each pair (a, b) of elements to (-b, a)
//
// A pair is (2i, 2i + 1) where interleaved, (i, i + E/2) where split in halves. Each of up to six
// tensors [B, S, H, E] (q, k, v of two streams) is read once where it lies and written once,
// straight into its rows of the joint tensor [B, S1 + S2, H, E]; the backward pass goes the other
// way.
#pragma once

#include <algorithm>

#include "rows.h"

namespace flowkernels {

// A [batch, rows, heads, head_dim] operand with a unit last stride.
struct HeadView {
  char* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch_stride = 0, row_stride = 0, head_stride = 0;

  explicit operator bool() const { return data != nullptr; }
  char* row(int64_t batch, int64_t row_index) const {
    return data + (batch * batch_stride + row_index * row_stride) * element_size(dtype);
  }
};

// [positions, head_dim] float32 each; empty where nothing is rotated.
struct Rope {
  const float* cos = nullptr;
  const float* sin = nullptr;
  int64_t cos_stride = 0, sin_stride = 0;
  bool interleaved = true;
};

// Packed keys: of sample b the first lengths[b][i] rows of stream i are valid, and the valid rows
// of both streams lie one behind the other at the start of the joint tensor. Each invalid row owns
// one of the rows that remain, which hold zeros: every row of the joint tensor has one writer.
struct Packing {
  const int32_t* lengths = nullptr;  // null: every row is valid, and nothing moves
  int64_t batch_stride = 0, stream_stride = 0;
  int64_t rows[2] = {0, 0};  // of each stream; rows[1] is 0 where there is one stream

  int64_t length(int64_t batch, int stream) const {
    if (rows[stream] == 0) return 0;
    const int64_t given = lengths[batch * batch_stride + stream * stream_stride];
    return std::clamp<int64_t>(given, 0, rows[stream]);
  }
};

struct Place {
  int64_t row;
  bool valid;
};

// The joint row that row s of a stream's keys has.
FK_INLINE Place place_of(const Packing& packing, int64_t b, int stream, int64_t s) {
  const int64_t first = packing.length(b, 0), second = packing.length(b, 1);
  if (stream == 0) return s < first ? Place{s, true} : Place{s + second, false};
  return s < second ? Place{first + s, true} : Place{packing.rows[0] + s, false};
}

// One tensor of one stream.
struct HeadsPiece {
  HeadView input;
  HeadView joint;            // forward: the output; backward: the gradient that came
  HeadView grad;             // backward: the input's gradient, contiguous; empty where not wanted
  View weight;               // [E]; may be empty
  float* rstd = nullptr;     // [B, joint rows, H], by the row before packing; null: not normed
  float* partial = nullptr;  // backward: [chunks, E] shares of weight's gradient; null: not wanted
  int64_t rows = 0, joint_rows = 0;
  int64_t offset = 0;    // row 0's in the joint tensor, before packing
  int64_t position = 0;  // row 0's in the rope
  int stream = 0;
  bool norm = false, rope = false, packed = false;
  // What a reader of separate operators would see: xhat and z after rounding to these dtypes.
  DType normed = DType::float32, weighted = DType::float32;
};

struct Heads {
  int64_t batch, heads, head_dim;
  Rope rope;
  Packing packing;
  float eps;
  int count;  // of pieces
  HeadsPiece pieces[6];
  int64_t rows_per_chunk;  // backward
};

FK_INLINE int64_t piece_rows(const Heads& a, int piece) { return a.batch * a.pieces[piece].rows; }
FK_INLINE int64_t piece_chunks(const Heads& a, int piece) {
  return (piece_rows(a, piece) + a.rows_per_chunk - 1) / a.rows_per_chunk;
}

// Rows [begin, end) of all pieces' rows, one piece behind the other.
void heads_forward(const Heads& a, int64_t begin, int64_t end);

// Chunks [begin, end) of all pieces' chunks: gradients of their rows, and one row of partial sums.
void heads_backward(const Heads& a, int64_t begin, int64_t end);

}  // namespace flowkernels
