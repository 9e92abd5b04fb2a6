// Means of a function over a tensor, with its gradient in the same pass: the adversarial losses.
//
//   softplus_minus: softplus(-x)      real logits, and those of a generator's samples
//   softplus_plus:  softplus(x)       fake logits
//   square:         x²                the input gradient of R1
//
// An operand is [batch, elements] with contiguous samples; a contiguous one is given as one sample.
// Cut into items, and summed, as the losses over samples are.
#pragma once

#include "loss_items.h"

namespace flowkernels {

enum class Pointwise { softplus_minus, softplus_plus, square };

struct PointwiseSum {
  Pointwise function;
  LossExtent extent;
  View x, grad;     // grad: output; empty where not wanted
  float factor;     // of the slope in the gradient
  double* partial;  // [batch, chunks]: sums of the function
};

// Reads x once and writes the gradient once.
void pointwise_sum(const PointwiseSum& a, int64_t begin, int64_t end);

}  // namespace flowkernels
