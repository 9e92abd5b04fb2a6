// Many tensors in one sweep: the gradient norm, the AdamW update and exponential moving averages.
//
//   norm:   partial[chunk] = sum over the chunk of g^2, in double; the caller adds them in order
//   update: g  = factor * grad                        (unscaling and clipping, one multiplication)
//           m  = lerp(m, g, 1 - beta1)                (no m where beta1 = 0: then m = g)
//           v  = beta2 v + (1 - beta2) g^2
//           p  = p (1 - lr wd) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//           ema_k = lerp(ema_k, p, 1 - decay_k)       p as stored, after rounding
//           copy = p rounded to copy's dtype
//
// Reads p, g, m, v, ema_k and writes p, m, v, ema_k, copy: each once. The tensors of one parameter
// are walked linearly in memory, so they must share one dense layout.
// Work is cut into chunks that do not depend on the number of threads; a chunk never crosses
// tensors. Functions take a range of chunks, so the caller owns the threads.
#pragma once

#include "rows.h"

namespace flowkernels {

// Small enough that the five to seven rows of a chunk stay in L1 between the loops over it.
constexpr int64_t kSweepChunk = 1024;

FK_INLINE int64_t sweep_chunks(int64_t numel) { return (numel + kSweepChunk - 1) / kSweepChunk; }

struct SquareSums {
  struct Item {
    const char* data;
    DType dtype;
    int64_t numel;
  };
  const Item* items;
  const int64_t* first_chunk;  // [count + 1]: chunks before each item, and in all
  int64_t count;
  double* partial;  // [chunks]
};
void square_sums(const SquareSums& a, int64_t begin, int64_t end);

struct Sweep {
  struct Item {
    int64_t numel;
    char* param;
    const char* grad;  // null: the averages alone are updated
    float* exp_avg;    // null where beta1 = 0
    float* exp_avg_sq;
    char* copy;  // may be null
    DType param_dtype, grad_dtype, copy_dtype;
    float decay;         // 1 - lr * weight_decay
    float step_size;     // lr / (1 - beta1^t)
    float inverse_root;  // 1 / sqrt(1 - beta2^t)
  };
  const Item* items;
  const int64_t* first_chunk;  // [count + 1]
  int64_t count;
  float* const* emas;        // [averages * count], one average after the other
  const float* ema_weights;  // [averages]: 1 - decay
  int64_t averages;
  float factor, first_weight, beta2, second_weight, eps;  // weights: 1 - beta
};
void sweep(const Sweep& a, int64_t begin, int64_t end);

}  // namespace flowkernels
