// Fills the table of stages and launches: combinations, and errors with their norm in two stages.
#include <algorithm>

#include "runge_kutta_kernels.cuh"

namespace flowkernels::cuda {
namespace {

template <typename T>
struct Type {
  using type = T;
};

int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

// Whole warps, no more than there is work for.
int threads_for(int64_t items) {
  return static_cast<int>(std::min<int64_t>(kThreads, (items + 31) / 32 * 32));
}

Operand operand_of(const View& view) { return {view.data, view.batch_stride, view.dtype}; }

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

template <typename T, int N>
void launch_combine(const StageList& stages, const View& y, const View& out, cudaStream_t stream) {
  const int64_t packs = (stages.elements + N - 1) / N;
  const int threads = threads_for(packs);
  const dim3 blocks(static_cast<unsigned>((packs + threads - 1) / threads),
                    static_cast<unsigned>(std::min<int64_t>(stages.batch, 65535)));
  rk_combine_kernel<T, N><<<blocks, threads, 0, stream>>>(table_of<Compute<T>>(stages),
                                                          operand_of(y), operand_of(out));
}

template <typename T, int N>
void launch_error(const StageList& stages, const ErrorTerms& terms, double* partial, void* norm,
                  cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t chunks = chunks_of(stages.elements);
  const int threads = threads_for((std::min(kChunk, stages.elements) + N - 1) / N);
  const Tolerances<C> tolerances{
      static_cast<const C*>(terms.rtol), static_cast<const C*>(terms.atol),
      static_cast<C>(terms.rtol_value), static_cast<C>(terms.atol_value)};
  const unsigned blocks = static_cast<unsigned>(stages.batch * chunks);
  rk_error_kernel<T, N><<<blocks, threads, 0, stream>>>(
      table_of<C>(stages), operand_of(terms.y0), operand_of(terms.y1), operand_of(terms.error),
      tolerances, static_cast<int32_t>(chunks), partial, norm);
}

void launch_norm(bool is_double, const double* partial, int64_t norms, int64_t each, double count,
                 void* norm, cudaStream_t stream) {
  const int threads = static_cast<int>(std::clamp<int64_t>((each + 31) / 32 * 32, 32, 1024));
  const unsigned blocks = static_cast<unsigned>(norms);
  if (is_double)
    rk_norm_kernel<double><<<blocks, threads, 0, stream>>>(partial, each, count, norm);
  else
    rk_norm_kernel<float><<<blocks, threads, 0, stream>>>(partial, each, count, norm);
}

}  // namespace

cudaError_t rk_combine(const StageList& stages, const View& y, const View& out,
                       cudaStream_t stream) {
  if (stages.batch * stages.elements == 0) return cudaSuccess;
  const Operands operands(stages, {&y, &out});
  operands.with_type([&](auto type) {
    using T = typename decltype(type)::type;
    operands.packed<T>() ? launch_combine<T, kLanes<T>>(stages, y, out, stream)
                         : launch_combine<T, 1>(stages, y, out, stream);
  });
  return cudaGetLastError();
}

int64_t error_chunks(const StageList& stages) { return stages.batch * chunks_of(stages.elements); }

cudaError_t rk_error(const StageList& stages, const ErrorTerms& terms, bool per_sample,
                     double* partial, void* norm, cudaStream_t stream) {
  const int64_t norms = per_sample ? stages.batch : 1;
  if (norms == 0) return cudaSuccess;
  const int64_t total = stages.batch * stages.elements, each = error_chunks(stages) / norms;
  double* sums = each == 1 ? nullptr : partial;
  if (total > 0) {
    const Operands operands(stages, {&terms.y0, &terms.y1, &terms.error});
    operands.with_type([&](auto type) {
      using T = typename decltype(type)::type;
      operands.packed<T>() ? launch_error<T, kLanes<T>>(stages, terms, sums, norm, stream)
                           : launch_error<T, 1>(stages, terms, sums, norm, stream);
    });
  }
  if (each != 1)
    launch_norm(stages.is_double, partial, norms, each, static_cast<double>(total / norms), norm,
                stream);
  return cudaGetLastError();
}

}  // namespace flowkernels::cuda
