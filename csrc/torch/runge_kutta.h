// What the CPU and CUDA bindings of the Runge-Kutta operators share: states and stages as views.
#pragma once

#include "samples.h"

namespace flowkernels {

using Tensors = std::vector<Tensor>;

// One tensor holds all stages: [n, ...] over the state's shape.
inline bool is_stacked(const Tensors& ks, const Tensor& like) {
  return ks.size() == 1 && ks[0].dim() == like.dim() + 1;
}

// The operands of one call as [batch, elements]: one long sample where nothing asks for more.
class States {
 public:
  States(const Tensor& like, const Tensors& ks, const OptionalTensor& dt,
         std::initializer_list<const Tensor*> others)
      : like_(like), stacked_(is_stacked(ks, like)) {
    is_double = like.scalar_type() == ScalarType::Double;
    const bool per_sample = dt && dt->dim() == 1;
    STD_TORCH_CHECK(
        !dt || dt->dim() == 0 || (per_sample && like.dim() > 0 && dt->size(0) == like.size(0)),
        "dt: need [B] or 0-d");
    flat_ = !per_sample && like.is_contiguous();
    for (const Tensor& k : ks) flat_ = flat_ && k.is_contiguous();
    for (const Tensor* other : others) flat_ = flat_ && other->is_contiguous();
    batch = flat_ ? 1 : batch_of(like);
    elements = flat_ ? like.numel() : elements_of(like);
  }

  View view(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(tensor.dim() == like_.dim(), name, ": need the shape of the state");
    return view(tensor, name, 0);
  }

  // The stages whose weight is not the number 0 (all, where the weights are on the device).
  std::vector<View> stages(const Tensors& ks, const std::vector<double>& weights,
                           const OptionalTensor& weights_tensor) const {
    STD_TORCH_CHECK(!ks.empty(), "ks: need at least one stage");
    const int64_t held = stacked_ ? ks[0].size(0) : static_cast<int64_t>(ks.size());
    const int64_t count =
        weights_tensor ? weights_tensor->numel() : static_cast<int64_t>(weights.size());
    STD_TORCH_CHECK(count <= held, "weights: more than there are stages");
    std::vector<View> views;
    views.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      if (!weights_tensor && weights[i] == 0.) continue;
      if (stacked_) {
        View stage = view(ks[0], "ks", 1);
        stage.data += i * ks[0].stride(0) * ks[0].element_size();
        views.push_back(stage);
      } else {
        views.push_back(view(ks[i], "ks"));
      }
    }
    return views;
  }

  // One number for each element, in the type of the arithmetic.
  const void* tolerance(const Tensor& tensor, const char* name) const {
    STD_TORCH_CHECK(
        tensor.numel() == like_.numel() && tensor.is_contiguous() &&
            tensor.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
        name,
        ": need a contiguous tensor of the state's shape, float32, or float64 like the state");
    return data(tensor);
  }

  int64_t batch, elements;
  bool is_double;

 private:
  // Sizes and strides after the first `skipped` dimensions.
  View view(const Tensor& tensor, const char* name, int64_t skipped) const {
    const auto sizes = tensor.sizes(), strides = tensor.strides(), expected = like_.sizes();
    int64_t step = 1;
    for (int64_t i = like_.dim() - 1; i >= 0; --i) {
      const int64_t size = sizes[i + skipped];
      STD_TORCH_CHECK(size == expected[i], name, ": need the shape of the state");
      STD_TORCH_CHECK(flat_ || i == 0 || size <= 1 || strides[i + skipped] == step || !elements,
                      name, ": need contiguous samples");
      step *= size;
    }
    View view;
    view.data = data(tensor);
    if (is_double) {
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double, name,
                      ": need float64 like the state");
    } else {
      view.dtype = dtype_of(tensor, name);
    }
    if (!flat_) view.batch_stride = batch > 1 ? strides[skipped] : elements;
    return view;
  }

  const Tensor& like_;
  bool stacked_, flat_;
};

// The dtype that the state and the stages promote to.
inline ScalarType promote(ScalarType dtype, const Tensors& ks) {
  for (const Tensor& k : ks) dtype = promote(dtype, k.scalar_type());
  return dtype;
}

}  // namespace flowkernels
