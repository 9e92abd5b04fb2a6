// What the CPU and CUDA bindings of the Runge-Kutta operators share: states and stages as views.
#pragma once

#include "../cpu/step_control.h"
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

// What rk_control decides, with room for its results; limits as flowkernels.ops.step.control has
// them.
class Control {
 public:
  Control(const Tensor& plan, const Tensor& like, const std::vector<double>& nodes,
          const std::vector<double>& limits)
      : double_times_(like.scalar_type() == ScalarType::Double) {
    STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Double && plan.is_contiguous() &&
                        (plan.dim() == 1 || plan.dim() == 2) && plan.size(0) == kPlanRows,
                    "plan: need float64 [6] or [6, B]");
    const bool per_sample = plan.dim() == 2;
    STD_TORCH_CHECK(!per_sample || (like.dim() > 0 && plan.size(1) == like.size(0)),
                    "plan: need a column for each sample");
    STD_TORCH_CHECK(limits.size() == 8, "limits: need 8 numbers");
    STD_TORCH_CHECK(nodes.size() <= kMostNodes, "nodes: more than a plan holds");
    STD_TORCH_CHECK(like.numel() > 0, "y0: need an element");
    columns_ = per_sample ? plan.size(1) : 1;
    const auto made = [&](int64_t rows, ScalarType dtype) {
      std::vector<int64_t> size;
      if (rows) size.push_back(rows);
      if (per_sample) size.push_back(columns_);
      return empty(size, dtype, like);
    };
    record = made(kPlanRows, ScalarType::Double);
    next = made(kPlanRows, ScalarType::Double);
    accepted = made(0, ScalarType::Bool);
    std::vector<int64_t> size{static_cast<int64_t>(nodes.size())};
    if (per_sample) size.push_back(columns_);
    times = empty(size, double_times_ ? ScalarType::Double : ScalarType::Float, like);
    fill(plan, nodes, limits);
  }

  StepControl terms{};
  Tensor record, next, accepted, times;

 private:
  void fill(const Tensor& plan, const std::vector<double>& nodes,
            const std::vector<double>& limits) {
    terms.order = limits[0];
    terms.safety = limits[1];
    terms.ifactor = limits[2];
    terms.dfactor = limits[3];
    terms.min_step = limits[4];
    terms.max_step = limits[5];
    terms.end = limits[6];
    terms.sign = limits[7];
    terms.node_count = static_cast<int32_t>(nodes.size());
    terms.double_times = double_times_;
    std::copy(nodes.begin(), nodes.end(), terms.nodes);
    terms.columns = columns_;
    terms.plan = reinterpret_cast<const double*>(data(plan));
    terms.record = reinterpret_cast<double*>(data(record));
    terms.next = reinterpret_cast<double*>(data(next));
    terms.accepted = reinterpret_cast<bool*>(data(accepted));
    terms.stage_times = data(times);
  }

  bool double_times_;
  int64_t columns_;
};

// Operands of rk_begin: contiguous, of one dtype; accepted and dt a number for each sample, or one.
inline void check_begin(const Tensor& y0, std::initializer_list<const Tensor*> others,
                        const Tensor& accepted, const Tensor& dt) {
  STD_TORCH_CHECK(y0.is_contiguous() && y0.numel() > 0, "y0: need contiguous elements");
  for (const Tensor* other : others)
    STD_TORCH_CHECK(other->is_contiguous() && other->numel() == y0.numel() &&
                        other->scalar_type() == y0.scalar_type(),
                    "operands: need the shape, dtype and layout of y0");
  const int64_t count = accepted.dim() == 0 ? 1 : y0.size(0);
  STD_TORCH_CHECK(accepted.scalar_type() == ScalarType::Bool && accepted.is_contiguous() &&
                      accepted.dim() <= std::min<int64_t>(1, y0.dim()) && accepted.numel() == count,
                  "accepted: need bool [B] or 0-d");
  STD_TORCH_CHECK(dt.scalar_type() == ScalarType::Double && dt.is_contiguous() &&
                      dt.dim() == accepted.dim() && dt.numel() == count,
                  "dt: need float64 like accepted");
}

// The dtype that the state and the stages promote to.
inline ScalarType promote(ScalarType dtype, const Tensors& ks) {
  for (const Tensor& k : ks) dtype = promote(dtype, k.scalar_type());
  return dtype;
}

}  // namespace flowkernels
