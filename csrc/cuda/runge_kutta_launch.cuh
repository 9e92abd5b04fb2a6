// What the launchers of the Runge-Kutta kernels share: operands as the kernels take them.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "runge_kutta_kernels.cuh"

namespace flowkernels::cuda {
namespace {

template <typename T>
struct Type {
  using type = T;
};

inline int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

// Whole warps, no more than there is work for.
inline int threads_for(int64_t items) {
  return static_cast<int>(std::min<int64_t>(kThreads, (items + 31) / 32 * 32));
}

inline Operand operand_of(const View& view) { return {view.data, view.batch_stride, view.dtype}; }

template <typename C>
Table<C> table_of(const StageList& stages) {
  Table<C> table{};
  table.batch = stages.batch;
  table.elements = stages.elements;
  table.count = static_cast<int32_t>(stages.count);
  table.dt = stages.dt;
  table.device_weights = stages.device_weights;
  for (int64_t s = 0; s < stages.count; ++s) {
    table.k[s] = stages.ks[s].data;
    table.stride[s] = stages.ks[s].batch_stride;
    table.dtype[s] = static_cast<uint8_t>(stages.ks[s].dtype);
    if (stages.device_weights.data == nullptr) table.weight[s] = static_cast<C>(stages.weights[s]);
  }
  return table;
}

// Every operand of a call: what its dtype and its alignment are judged by.
class Operands {
 public:
  Operands(const StageList& stages, std::initializer_list<const View*> others) : stages_(stages) {
    for (int64_t s = 0; s < stages.count; ++s) add(stages.ks[s]);
    for (const View* view : others)
      if (*view) add(*view);
  }

  // Calls f(Type<T>{}) with the dtype of all, or Mixed.
  template <typename F>
  void with_type(const F& f) const {
    if (stages_.is_double) return f(Type<double>{});
    if (mixed_) return f(Type<Mixed>{});
    switch (dtype_) {
      case DType::float32:
        return f(Type<float>{});
      case DType::bfloat16:
        return f(Type<__nv_bfloat16>{});
      case DType::float16:
        return f(Type<__half>{});
    }
  }

  // Packs of 16 bytes lie aligned in every sample of every operand.
  template <typename T>
  bool packed() const {
    if constexpr (std::is_same_v<T, Mixed>) return false;
    return addresses_ % 16 == 0 && (stages_.batch == 1 || strides_ % kLanes<T> == 0);
  }

 private:
  void add(const View& view) {
    if (addresses_ == 0) dtype_ = view.dtype;
    mixed_ = mixed_ || view.dtype != dtype_;
    addresses_ |= reinterpret_cast<uintptr_t>(view.data);
    strides_ |= view.batch_stride;
  }

  const StageList& stages_;
  DType dtype_ = DType::float32;
  bool mixed_ = false;
  uintptr_t addresses_ = 0;  // their bits together: aligned where all are
  int64_t strides_ = 0;
};

template <typename C>
Tolerances<C> tolerances_of(const ErrorTerms& terms) {
  return {static_cast<const C*>(terms.rtol), static_cast<const C*>(terms.atol),
          static_cast<C>(terms.rtol_value), static_cast<C>(terms.atol_value)};
}

inline int threads_for_chunk(int64_t elements, int lanes) {
  return threads_for((std::min(kChunk, elements) + lanes - 1) / lanes);
}

}  // namespace
}  // namespace flowkernels::cuda
