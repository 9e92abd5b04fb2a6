// Packs of elements that a thread reads and writes at once, and conversions to and from float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flowkernels::cuda {
namespace {

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lane[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* data, int64_t at) {
  return *reinterpret_cast<const Pack<T, N>*>(data + at);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* data, int64_t at, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(data + at) = pack;
}

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}

}  // namespace
}  // namespace flowkernels::cuda
