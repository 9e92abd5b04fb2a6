// One Euler step with guidance: x + dt v, v = v_uncond + guidance (v - v_uncond) where v_uncond.
#pragma once

#include "samples.h"

namespace flowkernels {

struct EulerStep {
  int64_t batch, elements;
  View x, v, v_uncond;  // v_uncond may be empty
  View out;             // may be x
  PerSample dt;
  float guidance;
};

// Reads every operand once and writes out once. Blocks [begin, end) of the contiguous order.
void euler_step(const EulerStep& a, int64_t begin, int64_t end);

struct EulerStepBackward {
  int64_t batch, elements;
  View grad;
  View grad_v;         // dt guidance grad; empty where not wanted
  View grad_v_uncond;  // dt (1 - guidance) grad; likewise
  PerSample dt;
  float guidance;
};

void euler_step_backward(const EulerStepBackward& a, int64_t begin, int64_t end);

}  // namespace flowkernels
