// The functions of activation.h in the CPU's own instructions, for operands of one dtype (the bias
// apart). Each says whether it did the work: false where there are none, or dtypes differ.
#pragma once

#include "activation.h"

namespace flowkernels {

bool own_gelu_tanh_forward(const Activation& a, int64_t begin, int64_t end);
bool own_gelu_tanh_backward(const Activation& a, int64_t begin, int64_t end);
bool own_swiglu_forward(const Activation& a, int64_t begin, int64_t end);
bool own_swiglu_backward(const Activation& a, int64_t begin, int64_t end);

}  // namespace flowkernels
