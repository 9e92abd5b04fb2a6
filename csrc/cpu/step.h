// One Euler step with guidance: x + dt v, v = v_uncond + guidance (v - v_uncond) where v_uncond.
#pragma once

#include "samples.h"

namespace flowkernels {

struct EulerStep {
  int64_t batch, elements;
  View x, v, v_uncond;  // v_uncond may be empty
  View out;             // may be x
  View twice;           // 2·batch samples, or empty: out after out
  PerSample dt;
  float guidance;
};

// Reads every operand once and writes out once. Blocks [begin, end) of the contiguous order.
void euler_step(const EulerStep& a, int64_t begin, int64_t end);

// Gradients to v and to v_uncond, dt guidance grad and dt (1 - guidance) grad; the number is dt.
void euler_step_backward(const ScaledGradient& a, float guidance, int64_t begin, int64_t end);

}  // namespace flowkernels
