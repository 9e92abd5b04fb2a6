// The losses of SCFlow: the loss and its gradients in one pass over the operands.
//
//   self_corrected: mean rho(d_con), mean rho(d_bi)          rho(d) = sqrt(d² + c²) - c
//                   d_con = t' (v' - v) + (t - t') (v_teacher - v), or t (noise - x0 - v) where
//                   t' < trunc; d_bi = t'' (v'' - v) - (t'' - t) (v_teacher - v)
//   self_reflow:    mean t² (x - y)²
//   pseudo_huber:   mean rho(x - y)
//
// t', v' are t_post, v_post; t'', v'' are t_prev, v_prev. Items are those of loss_items.h.
#pragma once

#include "loss_items.h"

namespace flowkernels {

struct SelfCorrected {
  LossExtent extent;
  View v, v_teacher, v_post, v_prev, x0, noise;
  View grad_v;  // output; empty where not wanted
  PerSample t, t_post, t_prev, grad_output;
  float trunc, c, lam_bi;
  bool rescale;                         // leave alone what grad_output = 1 gave already
  double *consistency, *bidirectional;  // [batch, chunks]
};

// Reads v, v_teacher, v_prev once, and of a sample either x0 and noise or v_post; writes grad_v.
void self_corrected(const SelfCorrected& a, int64_t begin, int64_t end);

// Each [batch] or one number.
void self_corrected_total(const SelfCorrected& a, float* total, float* consistency,
                          float* bidirectional);

// self_reflow where there is a t, else pseudo_huber.
struct PairLoss {
  LossExtent extent;
  View x, y;
  View grad_x, grad_y;  // outputs, as above
  PerSample t, grad_output;
  float c;
  bool rescale;
  double* partial;  // [batch, chunks], t² included
};

// Reads x, y once and writes the gradients once.
void pair_loss(const PairLoss& a, int64_t begin, int64_t end);

void pair_loss_total(const PairLoss& a, float* loss);

}  // namespace flowkernels
