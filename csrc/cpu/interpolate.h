// The noising process x_t = (1 - t) x0 + t noise, noise given or from a counter.
//
// Operands are [batch, elements] with contiguous samples. Functions work on ranges of blocks of
// kBlock elements of the contiguous order; what a block holds does not depend on the ranges.
#pragma once

#include "philox.h"
#include "samples.h"

namespace flowkernels {

struct Interpolate {
  int64_t batch, elements;
  View x0;
  View noise;         // input, or where seeded the output, which may be empty
  DType noise_dtype;  // what seeded noise is rounded to before x_t is formed of it
  View x_t;           // output
  PerSample t;
  bool seeded;
  PhiloxStream stream;
};

// Reads x0 (+ noise), writes x_t (+ seeded noise): each once.
void interpolate(const Interpolate& a, int64_t begin, int64_t end);

// Gradients to x0 and to noise, (1 - t) grad and t grad; the number is t.
void interpolate_backward(const ScaledGradient& a, int64_t begin, int64_t end);

// words[n][4] of groups [begin, end), as int64.
void philox_words(const int64_t* groups, const PhiloxStream& stream, int64_t* words, int64_t begin,
                  int64_t end);

}  // namespace flowkernels
