// softmax(scale q k^T) v of short sequences: a head at a time, whole, in float32.
//
//   P^T[s][r] = exp(scale k_s . q_r - lse_r),   out_r = sum_s P^T[s][r] v_s
//   dV = P^T dO,   dP^T = V dO^T,   dS^T = scale P^T (dP^T - delta),   delta_r = sum_s P^T dP^T
//   dK = dS^T Q,   dQ = dS K
//
// The backward pass takes maxima and sums anew: from lse, whose rounding grows with the scores, a
// row of P would not sum to 1, and where one key has all the weight dP - delta would be that error.
//
// Scores lie transposed, queries side by side: maxima and sums over the keys are then sums of
// vectors, and every product reads its other operand by rows.
#pragma once

#include "heads.h"

namespace flowkernels {

struct Attention {
  int64_t batch, heads, rows, keys, head_dim;
  float scale;
  const int32_t* lengths = nullptr;  // [batch] valid keys, which lie first; null: all
  HeadView q, k, v;
  float* lse = nullptr;                       // forward: [batch, heads, rows], -inf without a key
  HeadView out;                               // forward
  HeadView grad_out, grad_q, grad_k, grad_v;  // backward; gradients of keys not valid are 0
};

// Heads [begin, end) of the batch * heads.
void attention_forward(const Attention& a, int64_t begin, int64_t end);
void attention_backward(const Attention& a, int64_t begin, int64_t end);

}  // namespace flowkernels
