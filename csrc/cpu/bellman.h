// A teacher's step: guidance, Euler update, and the increment of the velocity, in one pass.
//
//   velocity = v_uncond + guidance (v - v_uncond), x_next = x + dt velocity,
//   increment = velocity - previous
#pragma once

#include "samples.h"

namespace flowkernels {

struct BellmanStep {
  int64_t batch, elements;
  View x, v;
  View v_uncond;   // may be empty
  View previous;   // may be empty: no increment then
  View x_next;     // may be x
  View velocity;   // float32; may be previous
  View increment;  // float32
  float dt, guidance;
};

// Reads every operand once and writes every result once. Blocks [begin, end) of the contiguous
// order.
void bellman_step(const BellmanStep& a, int64_t begin, int64_t end);

}  // namespace flowkernels
