// Device code of the Runge-Kutta operators; runge_kutta.cu launches it.
//
// A thread takes 16 bytes of every operand where they are aligned for that, else one element.
// Stages are loaded four at a time before the first is used: at the sizes of a small state a launch
// is all latency.
#pragma once

#include <type_traits>

#include "packs.cuh"
#include "runge_kutta.cuh"

namespace flowkernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 2048;  // elements whose squares one block sums

// Stands for a T where operands differ in dtype: each is read by its own.
struct Mixed {};

// The type of the arithmetic on elements of T.
template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of T in 16 bytes.
template <typename T>
constexpr int kLanes = 16 / sizeof(T);
template <>
constexpr int kLanes<Mixed> = 1;

struct Operand {
  void* data;
  int64_t stride;  // between samples
  DType dtype;     // of mixed operands
};

template <typename C>
struct Table {
  int64_t batch, elements;
  int32_t count;
  Numbers dt, device_weights;
  const void* k[kMostStages];
  int64_t stride[kMostStages];
  C weight[kMostStages];
  uint8_t dtype[kMostStages];
};

__device__ __forceinline__ double read_number(const Numbers& a, int64_t index) {
  if (a.data == nullptr) return a.value;
  const int64_t at = index * a.stride;
  if (a.is_double) return static_cast<const double*>(a.data)[at];
  switch (a.dtype) {
    case DType::bfloat16:
      return widen(static_cast<const __nv_bfloat16*>(a.data)[at]);
    case DType::float16:
      return widen(static_cast<const __half*>(a.data)[at]);
    default:
      return static_cast<const float*>(a.data)[at];
  }
}

__device__ __forceinline__ double widen(double value) { return value; }
template <>
__device__ __forceinline__ double narrow<double>(float value) {
  return value;
}

// N elements as the arithmetic takes them.
template <typename T, int N>
__device__ __forceinline__ Pack<Compute<T>, N> read_pack(const void* data, DType dtype,
                                                         int64_t at) {
  Pack<Compute<T>, N> result;
  if constexpr (std::is_same_v<T, Mixed>) {
    static_assert(N == 1);
    switch (dtype) {
      case DType::float32:
        result.lane[0] = static_cast<const float*>(data)[at];
        break;
      case DType::bfloat16:
        result.lane[0] = widen(static_cast<const __nv_bfloat16*>(data)[at]);
        break;
      case DType::float16:
        result.lane[0] = widen(static_cast<const __half*>(data)[at]);
        break;
    }
  } else {
    const Pack<T, N> stored = load<N>(static_cast<const T*>(data), at);
#pragma unroll
    for (int i = 0; i < N; ++i) result.lane[i] = widen(stored.lane[i]);
  }
  return result;
}

template <typename T, int N>
__device__ __forceinline__ void write_pack(void* data, DType dtype, int64_t at,
                                           const Pack<Compute<T>, N>& pack) {
  if constexpr (std::is_same_v<T, Mixed>) {
    switch (dtype) {
      case DType::float32:
        static_cast<float*>(data)[at] = pack.lane[0];
        return;
      case DType::bfloat16:
        static_cast<__nv_bfloat16*>(data)[at] = narrow<__nv_bfloat16>(pack.lane[0]);
        return;
      case DType::float16:
        static_cast<__half*>(data)[at] = narrow<__half>(pack.lane[0]);
        return;
    }
  } else if constexpr (std::is_same_v<T, double>) {
    store(static_cast<double*>(data), at, pack);
  } else {
    Pack<T, N> rounded;
#pragma unroll
    for (int i = 0; i < N; ++i) rounded.lane[i] = narrow<T>(pack.lane[i]);
    store(static_cast<T*>(data), at, rounded);
  }
}

struct Place {
  int64_t sample, index;  // an element of a sample
};

// sum += the stages [first, first + G), loaded before the first is used.
template <typename T, int N, int G, typename Weight>
__device__ __forceinline__ void add_stages(Pack<Compute<T>, N>& sum, const Table<Compute<T>>& table,
                                           const Place& place, int first, const Weight& weight) {
  Pack<Compute<T>, N> k[G];
#pragma unroll
  for (int g = 0; g < G; ++g)
    k[g] = read_pack<T, N>(table.k[first + g], static_cast<DType>(table.dtype[first + g]),
                           place.sample * table.stride[first + g] + place.index);
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const Compute<T> factor = weight(first + g);
#pragma unroll
    for (int i = 0; i < N; ++i) sum.lane[i] += factor * k[g].lane[i];
  }
}

template <typename T, int N, typename Weight>
__device__ __forceinline__ Pack<Compute<T>, N> weighted_sum(const Table<Compute<T>>& table,
                                                            const Place& place,
                                                            const Weight& weight) {
  Pack<Compute<T>, N> sum{};
  constexpr int G = std::is_same_v<T, Mixed> ? 2 : 4;  // what fits the registers
  int s = 0;
#pragma unroll 1
  for (; s + G <= table.count; s += G) add_stages<T, N, G>(sum, table, place, s, weight);
#pragma unroll 1
  for (; s < table.count; ++s) add_stages<T, N, 1>(sum, table, place, s, weight);
  return sum;
}

// dt sum_i weights_i k_i at N elements.
template <typename T, int N>
__device__ __forceinline__ Pack<Compute<T>, N> increment(const Table<Compute<T>>& table,
                                                         const Place& place) {
  using C = Compute<T>;
  const C dt = static_cast<C>(read_number(table.dt, place.sample));
  Pack<C, N> sum;
  if (table.device_weights.data == nullptr)
    sum = weighted_sum<T, N>(table, place, [&](int s) { return table.weight[s]; });
  else
    sum = weighted_sum<T, N>(
        table, place, [&](int s) { return static_cast<C>(read_number(table.device_weights, s)); });
#pragma unroll
  for (int i = 0; i < N; ++i) sum.lane[i] *= dt;
  return sum;
}

template <typename T, int N>
__device__ __forceinline__ Pack<Compute<T>, N> read_operand(const Operand& operand,
                                                            const Place& place) {
  return read_pack<T, N>(operand.data, operand.dtype, place.sample * operand.stride + place.index);
}

// ---- combine ------------------------------------------------------------------------------------

template <typename T, int N>
__device__ __forceinline__ void combine(const Table<Compute<T>>& table, const Operand& y,
                                        const Operand& out, const Place& place) {
  const Pack<Compute<T>, N> state = read_operand<T, N>(y, place);
  Pack<Compute<T>, N> result = increment<T, N>(table, place);
#pragma unroll
  for (int i = 0; i < N; ++i) result.lane[i] += state.lane[i];
  write_pack<T, N>(out.data, out.dtype, place.sample * out.stride + place.index, result);
}

// A thread takes N elements of every gridDim.y-th sample: no division finds its sample.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    rk_combine_kernel(const __grid_constant__ Table<Compute<T>> table,
                      const __grid_constant__ Operand y, const __grid_constant__ Operand out) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  for (int64_t sample = blockIdx.y; sample < table.batch; sample += gridDim.y) {
    if (at + N <= table.elements) {
      combine<T, N>(table, y, out, {sample, at});
    } else if constexpr (N > 1) {
      for (int64_t single = at; single < table.elements; ++single)
        combine<T, 1>(table, y, out, {sample, single});
    }
  }
}

// ---- error --------------------------------------------------------------------------------------

template <typename C>
struct Tolerances {
  const C* rtol;
  const C* atol;
  C rtol_value, atol_value;
};

// Sum of the squares of error / tolerance at N elements; `at` in the contiguous order.
template <typename T, int N>
__device__ __forceinline__ Compute<T> error_squares(const Table<Compute<T>>& table,
                                                    const Operand& y0, const Operand& y1,
                                                    const Operand& error,
                                                    const Tolerances<Compute<T>>& tolerances,
                                                    const Place& place) {
  using C = Compute<T>;
  const Pack<C, N> before = read_operand<T, N>(y0, place);
  const Pack<C, N> after = read_operand<T, N>(y1, place);
  const Pack<C, N> found = increment<T, N>(table, place);
  const int64_t at = place.sample * table.elements + place.index;
  C total = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const C rtol = tolerances.rtol != nullptr ? tolerances.rtol[at + i] : tolerances.rtol_value;
    const C atol = tolerances.atol != nullptr ? tolerances.atol[at + i] : tolerances.atol_value;
    const C a = fabs(before.lane[i]), b = fabs(after.lane[i]);
    const C largest = a > b || a != a ? a : b;  // not max: a NaN must reach the norm
    const C ratio = found.lane[i] / (atol + rtol * largest);
    total += ratio * ratio;
  }
  if (error.data != nullptr)
    write_pack<T, N>(error.data, error.dtype, place.sample * error.stride + place.index, found);
  return total;
}

// The block's sum in thread 0, in a fixed order; whole warps.
__device__ __forceinline__ double sum_of_block(double value) {
  __shared__ double warps[32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += warps[warp];
  return total;
}

template <typename C>
__device__ __forceinline__ void write_norm(void* norm, int64_t index, double sum, double count) {
  static_cast<C*>(norm)[index] = static_cast<C>(sqrt(sum / count));
}

// One block a chunk of a sample: the sum of its squares, in thread 0.
template <typename T, int N>
__device__ __forceinline__ double chunk_squares(const Table<Compute<T>>& table, const Operand& y0,
                                                const Operand& y1, const Operand& error,
                                                const Tolerances<Compute<T>>& tolerances,
                                                int32_t chunks) {
  const int32_t sample = blockIdx.x / chunks;
  const int64_t first = (blockIdx.x - static_cast<int64_t>(sample) * chunks) * kChunk;
  const int64_t last = min(first + kChunk, table.elements);
  double total = 0.;
  for (int64_t at = first + threadIdx.x * N; at < last; at += blockDim.x * N) {
    if (at + N <= last) {
      total += error_squares<T, N>(table, y0, y1, error, tolerances, {sample, at});
    } else if constexpr (N > 1) {
      for (int64_t single = at; single < last; ++single)
        total += error_squares<T, 1>(table, y0, y1, error, tolerances, {sample, single});
    }
  }
  return sum_of_block(total);
}

// `partial` is null where a sample, or all, is one chunk: then its norm is known here.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 2)
    rk_error_kernel(const __grid_constant__ Table<Compute<T>> table,
                    const __grid_constant__ Operand y0, const __grid_constant__ Operand y1,
                    const __grid_constant__ Operand error,
                    const __grid_constant__ Tolerances<Compute<T>> tolerances, int32_t chunks,
                    double* partial, void* norm) {
  const double total = chunk_squares<T, N>(table, y0, y1, error, tolerances, chunks);
  if (threadIdx.x != 0) return;
  if (partial != nullptr)
    partial[blockIdx.x] = total;
  else
    write_norm<Compute<T>>(norm, blockIdx.x, total, static_cast<double>(table.elements));
}

// norm[b] = sqrt(sum of its `each` partial sums / count): a block a norm.
template <typename C>
__global__ void __launch_bounds__(1024)
    rk_norm_kernel(const double* partial, int64_t each, double count, void* norm) {
  const double* own = partial + blockIdx.x * each;
  double total = 0.;
  for (int64_t i = threadIdx.x; i < each; i += blockDim.x) total += own[i];
  total = sum_of_block(total);
  if (threadIdx.x == 0) write_norm<C>(norm, blockIdx.x, total, count);
}

}  // namespace
}  // namespace flowkernels::cuda
