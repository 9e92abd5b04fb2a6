// flowkernels::modulated_norm_*, gated_residual_*, gated_residual_norm_* on CPU.
#include "../cpu/modulate.h"

#include "common.h"

namespace flowkernels {
namespace {

// Rows whose partial sums share one float32 row. Fixed, so results do not depend on threads.
constexpr int64_t kRowsPerChunk = 32;

Extent extent_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

void run_forward(const NormForward& a) {
  parallel(a.extent.batch * a.extent.rows, a.extent.columns,
           [&](int64_t begin, int64_t end) { norm_forward(a, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> modulated_norm_forward(
    const Tensor x, const OptionalTensor shift, const OptionalTensor scale,
    const OptionalTensor weight, const OptionalTensor bias, bool rms, double eps) {
  const Extent extent = extent_of(x);
  ScalarType dtype = promote(promote(x.scalar_type(), shift), scale);
  dtype = promote(promote(dtype, weight), bias);
  Tensor y = empty({extent.batch, extent.rows, extent.columns}, dtype, x);
  Tensor mean = rms ? empty({0}, ScalarType::Float, x)
                    : empty({extent.batch, extent.rows}, ScalarType::Float, x);
  Tensor rstd = empty({extent.batch, extent.rows}, ScalarType::Float, x);
  NormForward a{};
  a.extent = extent;
  a.input = view_of(x, "x");
  a.shift = view_of(shift, "shift");
  a.scale = view_of(scale, "scale");
  a.weight = view_of(weight, "weight");
  a.bias = view_of(bias, "bias");
  a.y = view_of(y, "y");
  a.mean = rms ? nullptr : reinterpret_cast<float*>(data(mean));
  a.rstd = reinterpret_cast<float*>(data(rstd));
  a.rms = rms;
  a.eps = static_cast<float>(eps);
  run_forward(a);
  return {y, mean, rstd};
}

Tensor gated_residual_forward(const Tensor residual, const Tensor x, const Tensor gate) {
  const Extent extent = extent_of(x);
  const ScalarType dtype =
      promote(promote(residual.scalar_type(), x.scalar_type()), gate.scalar_type());
  Tensor h = empty({extent.batch, extent.rows, extent.columns}, dtype, x);
  NormForward a{};
  a.extent = extent;
  a.input = view_of(residual, "residual");
  a.branch = view_of(x, "x");
  a.gate = view_of(gate, "gate");
  a.h = view_of(h, "h");
  run_forward(a);
  return h;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_residual_norm_forward(
    const Tensor residual, const Tensor x, const Tensor gate, const OptionalTensor shift,
    const OptionalTensor scale, bool rms, double eps) {
  const Extent extent = extent_of(x);
  const ScalarType h_dtype =
      promote(promote(residual.scalar_type(), x.scalar_type()), gate.scalar_type());
  const ScalarType y_dtype = promote(promote(h_dtype, shift), scale);
  Tensor h = empty({extent.batch, extent.rows, extent.columns}, h_dtype, x);
  Tensor y = empty({extent.batch, extent.rows, extent.columns}, y_dtype, x);
  Tensor mean = rms ? empty({0}, ScalarType::Float, x)
                    : empty({extent.batch, extent.rows}, ScalarType::Float, x);
  Tensor rstd = empty({extent.batch, extent.rows}, ScalarType::Float, x);
  NormForward a{};
  a.extent = extent;
  a.input = view_of(residual, "residual");
  a.branch = view_of(x, "x");
  a.gate = view_of(gate, "gate");
  a.h = view_of(h, "h");
  a.shift = view_of(shift, "shift");
  a.scale = view_of(scale, "scale");
  a.y = view_of(y, "y");
  a.mean = rms ? nullptr : reinterpret_cast<float*>(data(mean));
  a.rstd = reinterpret_cast<float*>(data(rstd));
  a.rms = rms;
  a.eps = static_cast<float>(eps);
  run_forward(a);
  return {h, y, mean, rstd};
}

// Gradients wanted by the caller, in the order of `wanted`'s bits: outputs and partial sums.
class Gradients {
 public:
  Gradients(const Extent& extent, const Tensor& like, int64_t wanted)
      : extent_(extent), like_(like), wanted_(wanted) {}

  bool wants(int bit) const { return wanted_ >> bit & 1; }

  // A gradient with a row of its own for each row of the input.
  View full(int bit, ScalarType dtype, const char* name) {
    if (!wants(bit)) return View{};
    results_.push_back(empty({extent_.batch, extent_.rows, extent_.columns}, dtype, like_));
    return view_of(results_.back(), name);
  }

  // A gradient summed over rows; `operand` gives its shape and dtype.
  void reduced(int bit, const OptionalTensor& operand, float* NormBackward::* partial) {
    if (!wants(bit)) return;
    results_.push_back(empty_like(*operand, operand->scalar_type()));
    reductions_.push_back({results_.back(), partial});
    const bool per_row = operand->dim() == 3 && operand->size(1) > 1;
    if (per_row) rows_per_chunk_ = 1;
  }

  std::vector<Tensor> run(NormBackward& a) {
    a.extent = extent_;
    a.rows_per_chunk = rows_per_chunk_;
    const int64_t per_batch = chunks_per_batch(extent_.rows, rows_per_chunk_);
    const int64_t chunks = extent_.batch * per_batch;
    std::vector<Tensor> partials;
    for (const auto& reduction : reductions_) {
      partials.push_back(empty({chunks, extent_.columns}, ScalarType::Float, like_));
      a.*(reduction.partial) = reinterpret_cast<float*>(data(partials.back()));
    }
    parallel(chunks, rows_per_chunk_ * extent_.columns,
             [&](int64_t begin, int64_t end) { norm_backward(a, begin, end); });
    for (size_t i = 0; i < reductions_.size(); ++i)
      reduce(reductions_[i].result, partials[i], per_batch);
    return std::move(results_);
  }

 private:
  struct Reduction {
    Tensor result;
    float* NormBackward::* partial;
  };

  void reduce(const Tensor& result, const Tensor& partial, int64_t per_batch) const {
    ReducePartials a{};
    a.partial = reinterpret_cast<const float*>(data(partial));
    a.batch = extent_.batch;
    a.chunks = per_batch;
    a.columns = extent_.columns;
    a.keep_batch = result.dim() >= 2 && result.size(0) > 1;
    a.keep_chunks = result.dim() == 3 && result.size(1) > 1;
    a.out = data(result);
    a.out_dtype = dtype_of(result, "gradient");
    const int64_t items = result.numel() == 0 ? 0 : result.numel() / extent_.columns;
    const int64_t terms = extent_.batch * per_batch / std::max<int64_t>(1, items);
    parallel(items, terms * extent_.columns,
             [&](int64_t begin, int64_t end) { reduce_partials(a, begin, end); });
  }

  Extent extent_;
  Tensor like_;
  int64_t wanted_;
  int64_t rows_per_chunk_ = kRowsPerChunk;
  std::vector<Tensor> results_;
  std::vector<Reduction> reductions_;
};

std::vector<Tensor> modulated_norm_backward(const Tensor grad_y, const Tensor x,
                                            const OptionalTensor shift, const OptionalTensor scale,
                                            const OptionalTensor weight, const OptionalTensor bias,
                                            const Tensor mean, const Tensor rstd, bool rms,
                                            int64_t wanted) {
  Gradients gradients(extent_of(x), x, wanted);
  NormBackward a{};
  a.grad_y = view_of(grad_y, "grad_y");
  a.h = view_of(x, "x");
  a.scale = view_of(scale, "scale");
  a.weight = view_of(weight, "weight");
  a.bias = view_of(bias, "bias");
  a.mean = rms ? nullptr : reinterpret_cast<const float*>(data(mean));
  a.rstd = reinterpret_cast<const float*>(data(rstd));
  a.rms = rms;
  a.grad_input = gradients.full(0, x.scalar_type(), "grad_x");
  gradients.reduced(1, shift, &NormBackward::partial_shift);
  gradients.reduced(2, scale, &NormBackward::partial_scale);
  gradients.reduced(3, weight, &NormBackward::partial_weight);
  gradients.reduced(4, bias, &NormBackward::partial_bias);
  return gradients.run(a);
}

std::vector<Tensor> gated_residual_backward(const Tensor grad_h, const Tensor residual,
                                            const Tensor x, const Tensor gate, int64_t wanted) {
  Gradients gradients(extent_of(x), x, wanted);
  NormBackward a{};
  a.grad_h = view_of(grad_h, "grad_h");
  a.branch = view_of(x, "x");
  a.gate = view_of(gate, "gate");
  a.grad_input = gradients.full(0, residual.scalar_type(), "grad_residual");
  a.grad_branch = gradients.full(1, x.scalar_type(), "grad_x");
  gradients.reduced(2, gate, &NormBackward::partial_gate);
  return gradients.run(a);
}

std::vector<Tensor> gated_residual_norm_backward(const OptionalTensor grad_h, const Tensor grad_y,
                                                 const Tensor h, const Tensor residual,
                                                 const Tensor x, const Tensor gate,
                                                 const OptionalTensor shift,
                                                 const OptionalTensor scale, const Tensor mean,
                                                 const Tensor rstd, bool rms, int64_t wanted) {
  Gradients gradients(extent_of(x), x, wanted);
  NormBackward a{};
  a.grad_y = view_of(grad_y, "grad_y");
  a.grad_h = view_of(grad_h, "grad_h");
  a.h = view_of(h, "h");
  a.branch = view_of(x, "x");
  a.gate = view_of(gate, "gate");
  a.scale = view_of(scale, "scale");
  a.mean = rms ? nullptr : reinterpret_cast<const float*>(data(mean));
  a.rstd = reinterpret_cast<const float*>(data(rstd));
  a.rms = rms;
  a.grad_input = gradients.full(0, residual.scalar_type(), "grad_residual");
  a.grad_branch = gradients.full(1, x.scalar_type(), "grad_x");
  gradients.reduced(2, gate, &NormBackward::partial_gate);
  gradients.reduced(3, shift, &NormBackward::partial_shift);
  gradients.reduced(4, scale, &NormBackward::partial_scale);
  return gradients.run(a);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("modulated_norm_forward", TORCH_BOX(&modulated_norm_forward));
  m.impl("modulated_norm_backward", TORCH_BOX(&modulated_norm_backward));
  m.impl("gated_residual_forward", TORCH_BOX(&gated_residual_forward));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward));
  m.impl("gated_residual_norm_forward", TORCH_BOX(&gated_residual_norm_forward));
  m.impl("gated_residual_norm_backward", TORCH_BOX(&gated_residual_norm_backward));
}
