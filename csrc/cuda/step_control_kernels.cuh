// Device code between two steps of an adaptive solver; step_control.cu launches it.
//
// The host reads nothing: it learns from the records, later, what was decided.
#pragma once

#include "runge_kutta_kernels.cuh"

namespace flowkernels::cuda {
namespace {

// Whether this block is the last of `count` to come, seen by all its threads; then what the others
// wrote before is visible. The ticket is 0 again after the last.
__device__ __forceinline__ bool comes_last(unsigned* ticket, unsigned count) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(ticket, 1u) == count - 1;
    if (last) *ticket = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// One block a chunk of a sample; `each` blocks share a column of the plan. The sums are added in
// the order of the chunks, whichever block is last: the same bits each time.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    rk_control_kernel(const __grid_constant__ Table<Compute<T>> table,
                      const __grid_constant__ Operand y0, const __grid_constant__ Operand y1,
                      const __grid_constant__ Tolerances<Compute<T>> tolerances, int32_t chunks,
                      int64_t each, double count, double* partial, unsigned* tickets,
                      const __grid_constant__ StepControl control) {
  double total = chunk_squares<T, N>(table, y0, y1, Operand{}, tolerances, chunks);
  const int64_t column = each == 1 ? blockIdx.x : blockIdx.x / each;
  if (each != 1) {
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
    if (!comes_last(tickets + column, static_cast<unsigned>(each))) return;
    const double* own = partial + column * each;
    total = 0.;
    for (int64_t i = threadIdx.x; i < each; i += blockDim.x) total += __ldcg(own + i);
    total = sum_of_block(total);
  }
  if (threadIdx.x == 0) control_step(control, column, static_cast<Compute<T>>(sqrt(total / count)));
}

// ---- begin --------------------------------------------------------------------------------------

template <typename T, int N>
__device__ __forceinline__ void begin(const StepBegin& a, bool accepted, double dt, int64_t at) {
  using C = Compute<T>;
  const Pack<T, N> y = load<N>(static_cast<const T*>(accepted ? a.y1 : a.y0), at);
  const Pack<T, N> slope = load<N>(static_cast<const T*>(accepted ? a.last : a.first), at);
  const C weight = static_cast<C>(a.weight), step = static_cast<C>(dt);
  Pack<C, N> sum;
#pragma unroll
  for (int i = 0; i < N; ++i)
    sum.lane[i] = widen(y.lane[i]) + step * (weight * widen(slope.lane[i]));
  store(static_cast<T*>(a.y), at, y);
  store(static_cast<T*>(a.slope), at, slope);
  write_pack<T, N>(a.at, DType::float32, at, sum);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) rk_begin_kernel(const __grid_constant__ StepBegin a) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (int64_t sample = blockIdx.y; sample < a.batch; sample += gridDim.y) {
    const bool accepted = a.accepted[sample];
    const double dt = a.dt[sample];
    const int64_t base = sample * a.elements;
    if (first + N <= a.elements) {
      begin<T, N>(a, accepted, dt, base + first);
    } else if constexpr (N > 1) {
      for (int64_t single = first; single < a.elements; ++single)
        begin<T, 1>(a, accepted, dt, base + single);
    }
  }
}

}  // namespace
}  // namespace flowkernels::cuda
