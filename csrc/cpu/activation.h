// Feed-forward activations: gelu_tanh(x + bias) and swiglu.
//
//   gelu_tanh(u) = u * sigmoid(2 z),  z = sqrt(2/pi) (u + 0.044715 u^3)
//   swiglu(a, b) = a * sigmoid(a) * b,  (a, b) the halves of the last dimension
#pragma once

#include "rows.h"

namespace flowkernels {

struct Activation {
  int64_t batch, rows, columns;  // columns of the output
  View x;                        // gelu_tanh: columns wide; swiglu: 2 * columns wide
  View bias;                     // gelu_tanh only; may be empty
  View grad;                     // backward only
  View out;                      // forward: y; backward: grad_x, or empty where not wanted
  float* partial_bias;           // backward: [chunks, columns]; null if not wanted
  int64_t rows_per_chunk;
};

void gelu_tanh_forward(const Activation& a, int64_t begin, int64_t end);   // rows
void gelu_tanh_backward(const Activation& a, int64_t begin, int64_t end);  // chunks of rows
void swiglu_forward(const Activation& a, int64_t begin, int64_t end);      // rows
void swiglu_backward(const Activation& a, int64_t begin, int64_t end);     // rows

}  // namespace flowkernels
