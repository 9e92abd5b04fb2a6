// What every binding needs: tensors to raw views, dtypes, allocation, and chunked parallel loops.
// Bindings check and dispatch; arithmetic lives in csrc/cpu and csrc/cuda, which know no torch.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/rows.h"

namespace flowkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, ": need float32, bfloat16 or float16");
      return {};
  }
}

inline ScalarType promote(ScalarType a, ScalarType b) { return a == b ? a : ScalarType::Float; }

inline ScalarType promote(ScalarType a, const OptionalTensor& b) {
  return b ? promote(a, b->scalar_type()) : a;
}

// Asks for huge pages under a result that malloc mostly maps anew, as it does from 32 MiB on: its
// first touch then faults once in 2 MiB, not once in 4 KiB. Smaller ones mostly keep their pages.
inline void ask_for_huge_pages([[maybe_unused]] const Tensor& result) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr int64_t kMapped = int64_t{32} << 20;
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(result.get(), &bytes));
  if (bytes < kMapped) return;
  const auto address = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a refusal changes nothing
#endif
}

// A contiguous tensor on the device of `like`. By the C shim: a boxed call of aten::new_empty costs
// several times as much, and small operators are made of allocations.
inline Tensor empty(const int64_t* size, int64_t dim, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> stride(dim);
  int64_t step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    stride[i] = step;
    step *= std::max<int64_t>(size[i], 1);
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, size, stride.data(), type, device_type, device_index, &handle));
  Tensor result(handle);
  if (device_type == aoti_torch_device_type_cpu()) ask_for_huge_pages(result);
  return result;
}

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype, const Tensor& like) {
  return empty(size.begin(), static_cast<int64_t>(size.size()), dtype, like);
}

inline Tensor empty(const std::vector<int64_t>& size, ScalarType dtype, const Tensor& like) {
  return empty(size.data(), static_cast<int64_t>(size.size()), dtype, like);
}

inline Tensor empty_like(const Tensor& tensor, ScalarType dtype) {
  std::vector<int64_t> size(tensor.dim());
  for (int64_t i = 0; i < tensor.dim(); ++i) size[i] = tensor.size(i);
  return empty(size, dtype, tensor);
}

inline char* data(const Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

// An operand of shape [D], [B, D], [B|1, S|1, D] as a View over [B, S, D]: size 1 broadcasts.
inline View view_of(const Tensor& tensor, const char* name) {
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(dim >= 1 && dim <= 3, name, ": need 1 to 3 dimensions");
  STD_TORCH_CHECK(tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1, name,
                  ": need a unit stride in the last dimension");
  View view;
  view.data = data(tensor);
  view.dtype = dtype_of(tensor, name);
  if (dim >= 2 && tensor.size(0) != 1) view.batch_stride = tensor.stride(0);
  if (dim == 3 && tensor.size(1) != 1) view.row_stride = tensor.stride(1);
  return view;
}

inline View view_of(const OptionalTensor& tensor, const char* name) {
  return tensor ? view_of(*tensor, name) : View{};
}

// The same cut whatever the number of threads: `grain` items of work make a task worth a thread.
template <class F>
void parallel(int64_t items, int64_t elements_per_item, const F& f) {
  if (items == 0) return;
  constexpr int64_t kElementsPerTask = 65536;
  const int64_t grain =
      std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, elements_per_item));
  const auto range = [&](int64_t begin, int64_t end) {
    f(begin, end);
    finish_streams();
  };
  if (items <= grain) return range(0, items);  // the caller's own thread: no barrier
  torch::stable::parallel_for(0, items, grain, range);
}

}  // namespace flowkernels
