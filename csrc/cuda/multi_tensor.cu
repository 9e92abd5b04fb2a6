// Fills the tables and launches: norm (partial sums, then one block), step counts, sweeps.
#include <algorithm>
#include <vector>

#include "multi_tensor_kernels.cuh"

namespace flowkernels::cuda {
namespace {

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the C++ type of a dtype.
template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::float32:
      return f(Type<float>{});
    case DType::bfloat16:
      return f(Type<__nv_bfloat16>{});
    case DType::float16:
      return f(Type<__half>{});
  }
}

constexpr DType kDTypes[] = {DType::float32, DType::bfloat16, DType::float16};

// A pack of kLanes elements can be read at this address.
bool is_aligned(const void* data, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % (kLanes * element_size(dtype)) == 0;
}

// ---- norm ---------------------------------------------------------------------------------------

void launch_square_sums(const NormTable& table, DType dtype, double* partial, cudaStream_t stream) {
  with_type(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    square_sums_kernel<T><<<table.first_chunk[table.count], kThreads, 0, stream>>>(table, partial);
  });
}

// ---- sweep --------------------------------------------------------------------------------------

bool item_is_aligned(const SweepItem& item, const Averages& averages, int64_t count, int64_t i) {
  bool aligned =
      is_aligned(item.param, item.param_dtype) && is_aligned(item.grad, item.grad_dtype) &&
      is_aligned(item.exp_avg, DType::float32) && is_aligned(item.exp_avg_sq, DType::float32) &&
      is_aligned(item.copy, item.copy_dtype);
  for (int64_t k = 0; k < averages.count; ++k)
    aligned = aligned && is_aligned(averages.data[k * count + i], DType::float32);
  return aligned;
}

// Fills one table after another with the tensors that `chosen` takes and launches each.
class TableFiller {
 public:
  TableFiller(const SweepItem* items, int64_t count, const Averages& averages)
      : items_(items), count_(count), averages_(averages) {}

  // The averages of this sweep, at most kAverages of them.
  void use_averages(int64_t first, int64_t count) {
    first_average_ = first;
    table.averages = static_cast<int32_t>(count);
    for (int64_t k = 0; k < count; ++k) table.ema_weight[k] = averages_.weights[first + k];
  }

  template <typename Chosen, typename Launch>
  void run(const Chosen& chosen, const Launch& launch) {
    table.count = 0;
    for (int64_t i = 0; i < count_; ++i) {
      if (items_[i].numel == 0 || !chosen(items_[i])) continue;
      add(i);
      if (table.count == kTensors) flush(launch);
    }
    flush(launch);
  }

  SweepTable table{};

 private:
  void add(int64_t i) {
    const SweepItem& item = items_[i];
    const int at = table.count++;
    table.first_chunk[0] = 0;
    table.first_chunk[at + 1] =
        table.first_chunk[at] + static_cast<int32_t>(chunks_of(item.numel, kSweepChunk));
    table.index[at] = static_cast<int32_t>(i);
    table.numel[at] = item.numel;
    table.param[at] = item.param;
    table.grad[at] = item.grad;
    table.exp_avg[at] = item.exp_avg;
    table.exp_avg_sq[at] = item.exp_avg_sq;
    table.copy[at] = item.copy;
    table.copy_dtype[at] = static_cast<uint8_t>(item.copy_dtype);
    table.aligned[at] = item_is_aligned(item, averages_, count_, i);
    for (int32_t k = 0; k < table.averages; ++k)
      table.ema[k][at] = averages_.data[(first_average_ + k) * count_ + i];
  }

  template <typename Launch>
  void flush(const Launch& launch) {
    if (table.count > 0) launch(table, table.first_chunk[table.count]);
    table.count = 0;
  }

  const SweepItem* items_;
  int64_t count_;
  Averages averages_;
  int64_t first_average_ = 0;
};

// Averages [first, averages.count), kAverages a sweep.
void launch_averages(TableFiller& filler, int64_t first, const Averages& averages,
                     const float* skip, Scalar norm, cudaStream_t stream) {
  for (; first < averages.count; first += kAverages) {
    filler.use_averages(first, std::min<int64_t>(kAverages, averages.count - first));
    for (const DType dtype : kDTypes)
      filler.run([&](const SweepItem& item) { return item.param_dtype == dtype; },
                 [&](const SweepTable& table, int blocks) {
                   with_type(dtype, [&](auto type) {
                     using P = typename decltype(type)::type;
                     ema_kernel<P><<<blocks, kThreads, 0, stream>>>(table, skip, norm);
                   });
                 });
  }
}

void launch_update(TableFiller& filler, DType param, DType grad, const float* scratch,
                   cudaStream_t stream) {
  filler.run(
      [&](const SweepItem& item) { return item.param_dtype == param && item.grad_dtype == grad; },
      [&](const SweepTable& table, int blocks) {
        with_type(param, [&](auto param_type) {
          with_type(grad, [&](auto grad_type) {
            using P = typename decltype(param_type)::type;
            using G = typename decltype(grad_type)::type;
            adamw_ema_kernel<P, G><<<blocks, kThreads, 0, stream>>>(table, scratch);
          });
        });
      });
}

void launch_advance(const SweepItem* items, int64_t count, const Hyperparameters& hyper,
                    int64_t* skipped, float* scratch, cudaStream_t stream) {
  StepTable table;
  for (int64_t first = 0; first < count; first += kStepTensors) {
    table.first = static_cast<int32_t>(first);
    table.count = static_cast<int32_t>(std::min<int64_t>(kStepTensors, count - first));
    for (int i = 0; i < table.count; ++i) table.step[i] = items[first + i].step;
    const int blocks = static_cast<int>(chunks_of(table.count, 32));
    advance_kernel<<<blocks, 32, 0, stream>>>(table, hyper, skipped, scratch);
  }
}

}  // namespace

int64_t norm_chunks(const NormItem* items, int64_t count) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += chunks_of(items[i].numel, kNormChunk);
  return chunks;
}

cudaError_t grad_norm(const NormItem* items, int64_t count, double* partial, Scalar scale,
                      float* norm, cudaStream_t stream) {
  NormTable table;
  int64_t chunks = 0;
  for (const DType dtype : kDTypes) {
    table.count = 0;
    table.first_chunk[0] = 0;
    table.first_partial = chunks;
    const auto flush = [&] {
      if (table.count == 0) return;
      launch_square_sums(table, dtype, partial, stream);
      chunks += table.first_chunk[table.count];
      table.first_partial = chunks;
      table.count = 0;
    };
    for (int64_t i = 0; i < count; ++i) {
      if (items[i].numel == 0 || items[i].dtype != dtype) continue;
      const int at = table.count++;
      table.first_chunk[at + 1] =
          table.first_chunk[at] + static_cast<int32_t>(chunks_of(items[i].numel, kNormChunk));
      table.numel[at] = items[i].numel;
      table.data[at] = items[i].data;
      table.aligned[at] = is_aligned(items[i].data, dtype);
      if (table.count == kNormTensors) flush();
    }
    flush();
  }
  norm_kernel<<<1, 1024, 0, stream>>>(partial, chunks, scale, norm);
  return cudaGetLastError();
}

int64_t scratch_floats(int64_t count) { return kHeader + 4 * count; }

cudaError_t adamw_ema(const SweepItem* items, int64_t count, const Averages& averages,
                      const Hyperparameters& hyper, int64_t* skipped, float* scratch,
                      cudaStream_t stream) {
  launch_advance(items, count, hyper, skipped, scratch, stream);
  TableFiller filler(items, count, averages);
  filler.table.first_weight = static_cast<float>(1. - hyper.beta1);
  filler.table.beta2 = static_cast<float>(hyper.beta2);
  filler.table.second_weight = static_cast<float>(1. - hyper.beta2);
  filler.table.eps = static_cast<float>(hyper.eps);
  const int64_t first = std::min<int64_t>(kAverages, averages.count);
  filler.use_averages(0, first);
  for (const DType param : kDTypes)
    for (const DType grad : kDTypes) launch_update(filler, param, grad, scratch, stream);
  launch_averages(filler, first, averages, scratch, Scalar{}, stream);
  return cudaGetLastError();
}

cudaError_t ema(const SweepItem* items, int64_t count, const Averages& averages, Scalar norm,
                cudaStream_t stream) {
  TableFiller filler(items, count, averages);
  launch_averages(filler, 0, averages, nullptr, norm, stream);
  return cudaGetLastError();
}

}  // namespace flowkernels::cuda
