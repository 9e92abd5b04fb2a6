// Device code of the multi-tensor operators; multi_tensor.cu launches it.
//
// Tables of pointers travel by value as kernel parameters (constant memory on the device), so a
// launch needs no copy and a captured graph carries them. One block takes one fixed chunk.
#pragma once

#include <type_traits>

#include "multi_tensor.cuh"
#include "packs.cuh"

namespace flowkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 4;  // elements a thread takes at once: 16 bytes of float32
constexpr int64_t kNormChunk = 32768;
constexpr int64_t kSweepChunk = 8192;
constexpr int kTensors = 96;  // of a sweep's table: 9 KB of the 32 KB that parameters may take
constexpr int kAverages = 4;  // of one sweep; more take sweeps of their own
constexpr int kNormTensors = 240;
constexpr int kStepTensors = 480;
constexpr int kHeader = 4;  // floats of scratch before the tensors' own four

constexpr int64_t chunks_of(int64_t numel, int64_t chunk) { return (numel + chunk - 1) / chunk; }

__device__ __forceinline__ double read(const Scalar& scalar) {
  return scalar.is_double ? *static_cast<const double*>(scalar.data)
                          : static_cast<double>(*static_cast<const float*>(scalar.data));
}

// The tensor that a block's chunk belongs to; every tensor of a table has at least one chunk.
__device__ __forceinline__ int tensor_of(const int32_t* first_chunk, int count, int32_t chunk) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_chunk[middle] <= chunk ? low : high) = middle;
  }
  return low;
}

// Calls each(pack_width, element) for the elements [begin, end): packs where memory is aligned for
// them, then single elements.
template <typename F>
__device__ __forceinline__ void for_each_pack(int64_t begin, int64_t end, bool aligned,
                                              const F& each) {
  int64_t singles = begin;
  if (aligned) {
    singles = begin + (end - begin) / kLanes * kLanes;
    for (int64_t at = begin + threadIdx.x * kLanes; at < singles; at += kThreads * kLanes)
      each(std::integral_constant<int, kLanes>{}, at);
  }
  for (int64_t at = singles + threadIdx.x; at < end; at += kThreads)
    each(std::integral_constant<int, 1>{}, at);
}

// ---- norm ---------------------------------------------------------------------------------------

// The block's sum in thread 0, in a fixed order.
template <int kWarps>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kWarps; ++warp) total += warps[warp];
  return total;
}

struct NormTable {
  int32_t count;
  int32_t first_chunk[kNormTensors + 1];
  int64_t first_partial;
  int64_t numel[kNormTensors];
  const void* data[kNormTensors];
  uint8_t aligned[kNormTensors];
};

// Squares of a pack are added in float32 (conversions to double are the scarce instruction) and in
// double where that overflows, so only a value that is not finite makes the norm so.
template <int N, typename T>
__device__ __forceinline__ double square_sum(const Pack<T, N>& pack) {
  float quick = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) quick = fmaf(widen(pack.lane[i]), widen(pack.lane[i]), quick);
  if (isfinite(quick)) return quick;
  double exact = 0.;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const double value = widen(pack.lane[i]);
    exact += value * value;
  }
  return exact;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    square_sums_kernel(const __grid_constant__ NormTable table, double* partial) {
  const int32_t chunk = blockIdx.x;
  const int index = tensor_of(table.first_chunk, table.count, chunk);
  const T* data = static_cast<const T*>(table.data[index]);
  const int64_t begin = (chunk - table.first_chunk[index]) * kNormChunk;
  const int64_t end = min(begin + kNormChunk, table.numel[index]);
  double total = 0.;
  for_each_pack(begin, end, table.aligned[index], [&](auto width, int64_t at) {
    total += square_sum(load<decltype(width)::value>(data, at));
  });
  total = block_sum<kThreads / 32>(total);
  if (threadIdx.x == 0) partial[table.first_partial + chunk] = total;
}

__global__ void __launch_bounds__(1024)
    norm_kernel(const double* partial, int64_t count, Scalar scale, float* norm) {
  double total = 0.;
  for (int64_t i = threadIdx.x; i < count; i += 1024) total += partial[i];
  total = block_sum<32>(total);
  if (threadIdx.x == 0)
    *norm = static_cast<float>(sqrt(total) / (scale.data ? fabs(read(scale)) : 1.));
}

// ---- step counts and everything that is one number a tensor -----------------------------------

struct StepTable {
  int32_t count, first;  // of this launch, and before it
  float* step[kStepTensors];
};

// scratch: [skip, gradient factor, -, -], then for each tensor
// [1 - lr weight_decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), -].
__global__ void advance_kernel(const __grid_constant__ StepTable table,
                               const __grid_constant__ Hyperparameters hyper, int64_t* skipped,
                               float* scratch) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const double norm = hyper.norm.data ? read(hyper.norm) : 0.;
  const bool skip = hyper.skip_nonfinite && !isfinite(norm);
  if (table.first == 0 && i == 0) {
    double factor = hyper.grad_scale.data ? 1. / read(hyper.grad_scale) : 1.;
    if (hyper.clip) {
      const double coefficient = hyper.max_grad_norm / (norm + 1e-6);
      factor *= coefficient > 1. ? 1. : coefficient;  // NaN stays NaN, as in torch
    }
    scratch[0] = skip ? 1.f : 0.f;
    scratch[1] = static_cast<float>(factor);
    if (skip && skipped != nullptr) *skipped += 1;
  }
  if (skip || i >= table.count) return;
  const float step = *table.step[i] + 1.f;
  *table.step[i] = step;
  const double lr = hyper.lr.data ? read(hyper.lr) : hyper.lr_value;
  const double first = 1. - pow(hyper.beta1, static_cast<double>(step));
  const double second = 1. - pow(hyper.beta2, static_cast<double>(step));
  float* out = scratch + kHeader + 4 * (table.first + i);
  out[0] = static_cast<float>(1. - lr * hyper.weight_decay);
  out[1] = static_cast<float>(lr / first);
  out[2] = static_cast<float>(1. / sqrt(second));
}

// ---- sweep --------------------------------------------------------------------------------------

struct SweepTable {
  int32_t count, averages;
  int32_t first_chunk[kTensors + 1];
  int32_t index[kTensors];  // of the tensor in the caller's order
  int64_t numel[kTensors];
  void* param[kTensors];
  const void* grad[kTensors];
  float* exp_avg[kTensors];
  float* exp_avg_sq[kTensors];
  void* copy[kTensors];
  float* ema[kAverages][kTensors];
  uint8_t copy_dtype[kTensors], aligned[kTensors];
  float ema_weight[kAverages];
  float first_weight, beta2, second_weight, eps;
};

__device__ __forceinline__ float lerp(float start, float end, float weight) {
  const float difference = end - start;
  return weight < 0.5f ? start + weight * difference : end - (1.f - weight) * difference;
}

// Averages are loaded before the update's arithmetic starts, so that all reads are in flight.
template <int N>
struct AveragePacks {
  Pack<float, N> ema[kAverages];

  __device__ __forceinline__ void load_all(const SweepTable& table, int index, int64_t at) {
#pragma unroll
    for (int k = 0; k < kAverages; ++k)
      if (k < table.averages) ema[k] = load<N>(table.ema[k][index], at);
  }

  __device__ __forceinline__ void update(const SweepTable& table, int index, int64_t at,
                                         const Pack<float, N>& p) {
#pragma unroll
    for (int k = 0; k < kAverages; ++k)
      if (k < table.averages) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          ema[k].lane[i] = lerp(ema[k].lane[i], p.lane[i], table.ema_weight[k]);
        store(table.ema[k][index], at, ema[k]);
      }
  }
};

template <typename T, int N>
__device__ __forceinline__ void store_as(void* data, int64_t at, const Pack<float, N>& p) {
  Pack<T, N> rounded;
#pragma unroll
  for (int i = 0; i < N; ++i) rounded.lane[i] = narrow<T>(p.lane[i]);
  store(static_cast<T*>(data), at, rounded);
}

template <int N>
__device__ __forceinline__ void store_copy(void* data, uint8_t dtype, int64_t at,
                                           const Pack<float, N>& p) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return store_as<float>(data, at, p);
    case DType::bfloat16:
      return store_as<__nv_bfloat16>(data, at, p);
    case DType::float16:
      return store_as<__half>(data, at, p);
  }
}

struct TensorScalars {
  float factor, decay, step_size, inverse_root;
};

template <typename P, typename G, int N>
__device__ __forceinline__ void adamw(const SweepTable& table, int index, int64_t at,
                                      const TensorScalars& s) {
  P* param = static_cast<P*>(table.param[index]);
  float* exp_avg = table.exp_avg[index];
  const Pack<P, N> param_pack = load<N>(param, at);
  const Pack<G, N> grad_pack = load<N>(static_cast<const G*>(table.grad[index]), at);
  Pack<float, N> v = load<N>(table.exp_avg_sq[index], at);
  Pack<float, N> m{};
  if (exp_avg != nullptr) m = load<N>(exp_avg, at);
  AveragePacks<N> averages;
  averages.load_all(table, index, at);
  Pack<P, N> stored;
  Pack<float, N> p;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = s.factor * widen(grad_pack.lane[i]);
    m.lane[i] = exp_avg != nullptr ? lerp(m.lane[i], g, table.first_weight) : g;
    v.lane[i] = table.beta2 * v.lane[i] + table.second_weight * g * g;
    const float denominator = sqrtf(v.lane[i]) * s.inverse_root + table.eps;
    const float stepped =
        widen(param_pack.lane[i]) * s.decay - s.step_size * (m.lane[i] / denominator);
    stored.lane[i] = narrow<P>(stepped);
    p.lane[i] = widen(stored.lane[i]);  // what follows sees the parameter as it is stored
  }
  if (exp_avg != nullptr) store(exp_avg, at, m);
  store(table.exp_avg_sq[index], at, v);
  store(param, at, stored);
  averages.update(table, index, at, p);
  if (table.copy[index] != nullptr) store_copy(table.copy[index], table.copy_dtype[index], at, p);
}

template <typename P, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ SweepTable table, const float* scratch) {
  if (scratch[0] != 0.f) return;
  const int32_t chunk = blockIdx.x;
  const int index = tensor_of(table.first_chunk, table.count, chunk);
  const float* own = scratch + kHeader + 4 * table.index[index];
  const TensorScalars s{scratch[1], own[0], own[1], own[2]};
  const int64_t begin = (chunk - table.first_chunk[index]) * kSweepChunk;
  const int64_t end = min(begin + kSweepChunk, table.numel[index]);
  for_each_pack(begin, end, table.aligned[index], [&](auto width, int64_t at) {
    adamw<P, G, decltype(width)::value>(table, index, at, s);
  });
}

// The averages alone. `skip` is adamw_ema's decision; `norm` is read where there is none.
template <typename P>
__global__ void __launch_bounds__(kThreads)
    ema_kernel(const __grid_constant__ SweepTable table, const float* skip, Scalar norm) {
  if (skip != nullptr && *skip != 0.f) return;
  if (norm.data != nullptr && !isfinite(read(norm))) return;
  const int32_t chunk = blockIdx.x;
  const int index = tensor_of(table.first_chunk, table.count, chunk);
  const P* param = static_cast<const P*>(table.param[index]);
  const int64_t begin = (chunk - table.first_chunk[index]) * kSweepChunk;
  const int64_t end = min(begin + kSweepChunk, table.numel[index]);
  for_each_pack(begin, end, table.aligned[index], [&](auto width, int64_t at) {
    constexpr int N = decltype(width)::value;
    AveragePacks<N> averages;
    const Pack<P, N> stored = load<N>(param, at);
    averages.load_all(table, index, at);
    Pack<float, N> p;
#pragma unroll
    for (int i = 0; i < N; ++i) p.lane[i] = widen(stored.lane[i]);
    averages.update(table, index, at, p);
  });
}

}  // namespace
}  // namespace flowkernels::cuda
