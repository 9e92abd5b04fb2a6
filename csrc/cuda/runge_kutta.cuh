// Runge-Kutta combinations and errors on a GPU: the interface between kernels and binding. No
// torch.
//
// The formulas stand in csrc/cpu/runge_kutta.h. The list of stages travels by value as a kernel
// parameter, so any number of them is one launch that needs no copy and that a graph can capture;
// dt, and the weights where the device alone knows them, are read on the device.
//
// Bytes an element, n stages with a weight: combine reads n + 1 operands and writes one; error
// reads n + 2 and writes one where the error is wanted.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../cpu/rows.h"  // DType, View
#include "../cpu/step_control.h"

namespace flowkernels::cuda {

// Stages of one launch: their table is 1.6 KB of the 4 KB that parameters may take.
constexpr int kMostStages = 64;

// A number, or a device vector of them at a stride (0: one for all).
struct Numbers {
  const void* data = nullptr;
  bool is_double = false;
  DType dtype = DType::float32;  // where it is not double
  int64_t stride = 0;
  double value = 0.;
};

// Operands [batch, elements] with contiguous samples. All float64 where is_double; else their
// dtypes are in the views, and arithmetic is float32.
struct StageList {
  int64_t batch, elements;
  bool is_double;
  const View* ks;         // [count]
  const double* weights;  // [count], used where device_weights has no data
  Numbers device_weights;
  int64_t count;  // at most kMostStages
  Numbers dt;
};

// out = y + dt sum_i weights_i k_i; out may be y or a stage.
cudaError_t rk_combine(const StageList& stages, const View& y, const View& out,
                       cudaStream_t stream);

struct ErrorTerms {
  View y0, y1;
  const void* rtol;  // float32 or float64 as the arithmetic, [batch * elements]; null: rtol_value
  const void* atol;
  double rtol_value, atol_value;
  View error;  // empty where it is not wanted
};

// Doubles of scratch memory that rk_error needs.
int64_t error_chunks(const StageList& stages);

// norm (float32, or float64 where is_double): one, or one for each sample. Sums of fixed chunks, in
// double, then the chunks' in a fixed order: the same bits each time, and no host sync.
cudaError_t rk_error(const StageList& stages, const ErrorTerms& terms, bool per_sample,
                     double* partial, void* norm, cudaStream_t stream);

// The same norm and what is decided from it, in one launch: the last block of a column reads the
// others' sums. `tickets` [columns] are 0 before and after; partial has error_chunks doubles.
cudaError_t rk_control(const StageList& stages, const ErrorTerms& terms, const StepControl& control,
                       double* partial, unsigned* tickets, cudaStream_t stream);

// The state and slope to go on from, and the first stage sum:
//   y, slope = (y1, last) where accepted, else (y0, first);   at = y + dt weight slope
// [batch, elements], contiguous, of one dtype. Reads and writes: five tensors.
struct StepBegin {
  int64_t batch, elements;
  bool is_double;
  DType dtype;  // where it is not double
  const void *y0, *y1, *first, *last;
  void *y, *slope, *at;
  const bool* accepted;  // [batch]
  const double* dt;      // [batch]
  double weight;
};

cudaError_t rk_begin(const StepBegin& a, cudaStream_t stream);

}  // namespace flowkernels::cuda
