// Tensors [B, ...] with contiguous samples, vectors [B] and scalars, as csrc/cpu/samples.h has
// them.
#pragma once

#include "../cpu/samples.h"
#include "common.h"

namespace flowkernels {

inline int64_t batch_of(const Tensor& x) { return x.size(0); }

inline int64_t elements_of(const Tensor& x) {
  int64_t elements = 1;
  for (int64_t i = 1; i < x.dim(); ++i) elements *= x.size(i);
  return elements;
}

// `tensor` as [batch, elements]: of the size of `like`, each sample contiguous.
inline View samples_view(const Tensor& tensor, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(tensor.dim() == like.dim(), name, ": need the shape of the first operand");
  int64_t expected = 1;
  for (int64_t i = tensor.dim() - 1; i > 0; --i) {
    const int64_t size = tensor.size(i);
    STD_TORCH_CHECK(size == like.size(i), name, ": need the shape of the first operand");
    STD_TORCH_CHECK(size <= 1 || tensor.stride(i) == expected || like.numel() == 0, name,
                    ": need contiguous samples");
    expected *= size;
  }
  STD_TORCH_CHECK(tensor.size(0) == like.size(0), name, ": need the shape of the first operand");
  View view;
  view.data = data(tensor);
  view.dtype = dtype_of(tensor, name);
  view.batch_stride = tensor.size(0) > 1 ? tensor.stride(0) : expected;
  return view;
}

inline View samples_view(const OptionalTensor& tensor, const char* name, const Tensor& like) {
  return tensor ? samples_view(*tensor, name, like) : View{};
}

// A [B] or 0-d tensor; `constant` stands in for none.
inline PerSample per_sample(const OptionalTensor& tensor, const char* name, const Tensor& like,
                            float constant) {
  PerSample result;
  result.constant = constant;
  if (!tensor) return result;
  STD_TORCH_CHECK(tensor->dim() == 0 || (tensor->dim() == 1 && tensor->size(0) == like.size(0)),
                  name, ": need [B] or 0-d");
  result.data = data(*tensor);
  result.dtype = dtype_of(*tensor, name);
  result.stride = tensor->dim() == 0 ? 0 : tensor->stride(0);
  return result;
}

// Outputs of the tensors whose bit is set, contiguous, in the order of the bits.
class WantedOutputs {
 public:
  WantedOutputs(const Tensor& like, int64_t wanted) : like_(like), wanted_(wanted) {}

  View next(ScalarType dtype) {
    const bool wants = wanted_ >> bit_++ & 1;
    if (!wants) return View{};
    results.push_back(empty_like(like_, dtype));
    return samples_view(results.back(), "gradient", like_);
  }

  std::vector<Tensor> results;

 private:
  const Tensor& like_;
  int64_t wanted_;
  int bit_ = 0;
};

// The same over tensors that are there already.
class GivenOutputs {
 public:
  GivenOutputs(const std::vector<Tensor>& given, const Tensor& like, int64_t wanted)
      : given_(given), like_(like), wanted_(wanted) {}

  View next(ScalarType dtype) {
    const bool wants = wanted_ >> bit_++ & 1;
    if (!wants) return View{};
    STD_TORCH_CHECK(index_ < given_.size(), "gradients: fewer than are wanted");
    const Tensor& tensor = given_[index_++];
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, "gradients: need the operand's dtype");
    return samples_view(tensor, "gradient", like_);
  }

 private:
  const std::vector<Tensor>& given_;
  const Tensor& like_;
  int64_t wanted_;
  int bit_ = 0;
  size_t index_ = 0;
};

// The gradients of a ScaledGradient that are wanted, in the dtype of grad; `kernel` takes
// (ScaledGradient, begin, end).
template <class F>
std::vector<Tensor> scaled_gradients(const Tensor& grad, const PerSample& number, int64_t wanted,
                                     const F& kernel) {
  WantedOutputs outputs(grad, wanted);
  ScaledGradient a{};
  a.batch = batch_of(grad);
  a.elements = elements_of(grad);
  a.grad = samples_view(grad, "grad", grad);
  a.number = number;
  for (View& output : a.outputs) output = outputs.next(grad.scalar_type());
  parallel(blocks_of(a.batch, a.elements), kBlock,
           [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return std::move(outputs.results);
}

}  // namespace flowkernels
