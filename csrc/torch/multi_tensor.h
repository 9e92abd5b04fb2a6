// What the CPU and CUDA bindings of the multi-tensor operators share: the checks that make a linear
// walk over several tensors right, and the layout of the lists.
#pragma once

#include "common.h"

namespace flowkernels {

using Tensors = std::vector<Tensor>;

// Same sizes, and same strides wherever a dimension has more than one element.
inline bool same_layout(const Tensor& a, const Tensor& b) {
  const auto a_sizes = a.sizes(), b_sizes = b.sizes();
  if (a_sizes.size() != b_sizes.size()) return false;
  const auto a_strides = a.strides(), b_strides = b.strides();
  for (size_t i = 0; i < a_sizes.size(); ++i) {
    if (a_sizes[i] != b_sizes[i]) return false;
    if (a_sizes[i] > 1 && a_strides[i] != b_strides[i]) return false;
  }
  return true;
}

// Every element once and no gap: strides, sorted, are the products of the sizes before them.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous() || tensor.numel() == 0) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (size_t found = 0; found < sizes.size(); ++found) {
    bool advanced = false;
    for (size_t i = 0; i < sizes.size() && !advanced; ++i)
      if (sizes[i] > 1 && strides[i] == expected) {
        expected *= sizes[i];
        advanced = true;
      }
    if (!advanced) break;
  }
  return expected == tensor.numel();
}

// `tensor` can be walked together with `like`: same device and layout, that of `like` dense.
inline void check_walks_with(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(
      tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(),
      name, ": not on the device of its parameter");
  STD_TORCH_CHECK(same_layout(tensor, like), name,
                  ": sizes or strides differ from those of its parameter");
}

inline void check_length(const Tensors& list, size_t count, const char* name) {
  STD_TORCH_CHECK(list.size() == count, name, ": wrong number of tensors");
}

inline void check_scalar(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor) return;
  STD_TORCH_CHECK(tensor->numel() == 1 && tensor->is_cuda() == like.is_cuda() &&
                      tensor->get_device_index() == like.get_device_index(),
                  name, ": need one element on the device of the parameters");
}

inline float* float_data(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, name, ": need float32");
  return reinterpret_cast<float*>(data(tensor));
}

// The lists of adamw_ema_ (and, with the update's lists empty, of ema_), one element a parameter;
// `emas` holds one average after the other.
struct SweepLists {
  const Tensors& params;
  const Tensors& grads;
  const Tensors& exp_avgs;  // empty where beta1 = 0
  const Tensors& exp_avg_sqs;
  const Tensors& emas;
  const Tensors& copies;  // empty where there are none
  const Tensors& steps;
  size_t averages;

  bool updates() const { return !grads.empty(); }

  void check() const {
    const size_t count = params.size();
    check_length(emas, averages * count, "emas");
    if (updates()) {
      check_length(grads, count, "grads");
      check_length(exp_avg_sqs, count, "exp_avg_sqs");
      check_length(steps, count, "steps");
      if (!exp_avgs.empty()) check_length(exp_avgs, count, "exp_avgs");
      if (!copies.empty()) check_length(copies, count, "copies");
    }
    for (size_t i = 0; i < count; ++i) check_parameter(i);
  }

 private:
  void check_parameter(size_t i) const {
    const Tensor& param = params[i];
    STD_TORCH_CHECK(param.is_cuda() == params[0].is_cuda() &&
                        param.get_device_index() == params[0].get_device_index(),
                    "params: need one device");
    STD_TORCH_CHECK(is_dense(param), "params: need tensors that are dense in memory");
    for (size_t k = 0; k < averages; ++k)
      check_walks_with(emas[k * params.size() + i], param, "emas");
    if (!updates()) return;
    check_walks_with(grads[i], param, "grads");
    check_walks_with(exp_avg_sqs[i], param, "exp_avg_sqs");
    if (!exp_avgs.empty()) check_walks_with(exp_avgs[i], param, "exp_avgs");
    if (!copies.empty()) check_walks_with(copies[i], param, "copies");
    check_scalar(steps[i], param, "steps");
  }
};

}  // namespace flowkernels
