// Losses over samples: the loss and its gradients in one pass over the operands.
//
//   flow_matching: mean (v - w)²                                 w = noise - x0
//   straightening: the same                                      w = (x_end - x_start) / dt
//   fgm:           ω mean (2 d e + lam d²)                       d = u - v, e = v - w
//                  u = u_uncond + guidance (u - u_uncond), ω = weight (t / 2max(mean|u - w|, 1e-5))
//
// Operands are [batch, elements] with contiguous samples, cut into items (loss_items.h).
#pragma once

#include "loss_items.h"

namespace flowkernels {

// x0 and noise stand for x_start and x_end where there is a dt.
struct FlowMatching {
  LossExtent extent;
  View v, x0, noise;
  View grad_v, grad_x0, grad_noise;  // outputs; empty where not wanted
  PerSample dt, weight, grad_output;
  bool rescale;     // leave alone what grad_output = 1 gave already
  double* partial;  // [batch, chunks]
};

// Reads v, x0, noise once and writes the gradients once.
void flow_matching(const FlowMatching& a, int64_t begin, int64_t end);

// loss = Σ weight Σ partial, or [batch] of them.
void flow_matching_total(const FlowMatching& a, float* loss);

struct FGM {
  LossExtent extent;
  View u, v, x0, noise, u_uncond;                           // u_uncond may be empty
  View grad_u, grad_v, grad_x0, grad_noise, grad_u_uncond;  // outputs, as above
  PerSample t, weight, grad_output;
  float lam, guidance;
  bool sid, rescale;
  double* size;     // [batch, chunks]: Σ |u - w|
  float* omega;     // [batch]: ω, NaN for a sample that is left out
  double* partial;  // [batch, chunks]
};

// size[item], then ω of samples [begin, end), then the loss and its gradients. Backward begins at
// the last, with the ω of the forward pass.
void fgm_size(const FGM& a, int64_t begin, int64_t end);
void fgm_omega(const FGM& a, int64_t begin, int64_t end);
void fgm(const FGM& a, int64_t begin, int64_t end);

// The loss over samples that are finite; the gradients of others become zero and their ω NaN.
// Returns the number of those others.
int32_t fgm_total(const FGM& a, float* loss);

}  // namespace flowkernels
