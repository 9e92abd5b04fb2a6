// Many tensors in one sweep on a GPU: the interface between the kernels and their binding. No
// torch.
//
// The formula stands in csrc/cpu/multi_tensor.h. Everything that decides a step (norm, scale, rate,
// step counts, whether to skip) is read on the device, so a step waits for nothing and a captured
// graph sees new values at each replay.
//
// Bytes for a float32 parameter with two averages: 4 for the norm pass; the sweep reads p, g, m, v,
// two averages (24) and writes all but g (20): 48.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cpu/rows.h"  // DType

namespace flowkernels::cuda {

// A scalar on the device, float32 or float64; null where it was not given.
struct Scalar {
  const void* data = nullptr;
  bool is_double = false;
};

struct NormItem {
  const void* data;
  int64_t numel;
  DType dtype;
};

// Elements of `partial` that grad_norm needs.
int64_t norm_chunks(const NormItem* items, int64_t count);

// *norm = sqrt(sum of squares) / |scale|: fixed chunks summed in double, then the chunks by one
// block in a fixed order. No atomics: the same bits each time.
cudaError_t grad_norm(const NormItem* items, int64_t count, double* partial, Scalar scale,
                      float* norm, cudaStream_t stream);

struct SweepItem {
  int64_t numel;
  void* param;
  const void* grad;  // null in ema
  float* exp_avg;    // null where beta1 = 0
  float* exp_avg_sq;
  void* copy;  // may be null
  float* step;
  DType param_dtype, grad_dtype, copy_dtype;
};

struct Averages {
  float* const* data;    // [averages * count], one average after the other
  const float* weights;  // [averages]: 1 - decay
  int64_t count;
};

struct Hyperparameters {
  Scalar norm, grad_scale, lr;
  double lr_value;  // used where lr is null
  double beta1, beta2, eps, weight_decay;
  double max_grad_norm;
  bool clip, skip_nonfinite;
};

// Floats of scratch memory that adamw_ema needs.
int64_t scratch_floats(int64_t count);

cudaError_t adamw_ema(const SweepItem* items, int64_t count, const Averages& averages,
                      const Hyperparameters& hyper, int64_t* skipped, float* scratch,
                      cudaStream_t stream);

// The averages alone; nothing changes where *norm is given and not finite.
cudaError_t ema(const SweepItem* items, int64_t count, const Averages& averages, Scalar norm,
                cudaStream_t stream);

}  // namespace flowkernels::cuda
