// Runs CUDA device code on the CPU: blocks one after the other, a thread of the block at a time or,
// where they wait for each other, each as a thread of the host. Included before the source, whose
// launches the test rewrites to LAUNCH.
#pragma once

#include <cuda_runtime_api.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#undef __global__
#undef __device__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __shared__
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time

struct Index {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;
inline std::barrier<>* block_barrier = nullptr;
inline double exchanged[1024];
inline int launches = 0;
inline bool backwards = false;  // the order of the blocks

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __threadfence() {}
inline double __ldcg(const double* at) { return *at; }

inline double __shfl_down_sync(unsigned, double value, int offset) {
  const int own = threadIdx.x;
  exchanged[own] = value;
  block_barrier->arrive_and_wait();
  const double found = own % 32 + offset < 32 ? exchanged[own + offset] : value;
  block_barrier->arrive_and_wait();
  return found;
}

inline unsigned atomicAdd(unsigned* at, unsigned value) {
  const unsigned before = *at;
  *at += value;
  return before;
}

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename... P>
struct Launcher {
  void (*kernel)(P...);
  dim3 grid;
  unsigned threads;

  template <typename... A>
  void operator()(A... arguments) const {
    ++launches;
    const uint64_t blocks = uint64_t{grid.x} * grid.y;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t block = backwards ? blocks - 1 - i : i;
      const Index place{static_cast<unsigned>(block % grid.x),
                        static_cast<unsigned>(block / grid.x), 0};
      std::barrier<> barrier(threads);
      block_barrier = &barrier;
      std::vector<std::thread> together;
      for (unsigned t = 0; t < threads; ++t)
        together.emplace_back([&, t] {
          threadIdx = {t, 0, 0};
          blockIdx = place;
          blockDim = {threads, 1, 1};
          gridDim = {grid.x, grid.y, 1};
          kernel(arguments...);
          barrier.arrive_and_drop();  // one that returned waits for nobody
        });
      for (std::thread& thread : together) thread.join();
    }
  }
};

template <typename... P>
Launcher<P...> LAUNCH(void (*kernel)(P...), dim3 grid, unsigned threads) {
  return {kernel, grid, threads};
}

#define cudaGetLastError() cudaSuccess
