// flowkernels::rk_combine_* and rk_error on CPU.
#include "runge_kutta.h"

#include <cmath>

#include "../cpu/runge_kutta.h"

namespace flowkernels {
namespace {

double number_at(const Tensor& tensor, int64_t index, const char* name) {
  if (tensor.scalar_type() == ScalarType::Double)
    return reinterpret_cast<const double*>(data(tensor))[index];
  PerSample one;
  one.data = data(tensor);
  one.dtype = dtype_of(tensor, name);
  one.stride = 1;
  return value_of(one, index);
}

// dt of each sample, or of all.
class StepSizes {
 public:
  StepSizes(const OptionalTensor& dt, double value) : constant_(value) {
    if (!dt) return;
    if (dt->dim() == 0) {
      constant_ = number_at(*dt, 0, "dt");
      return;
    }
    const int64_t step = dt->stride(0);
    for (int64_t b = 0; b < dt->size(0); ++b) values_.push_back(number_at(*dt, b * step, "dt"));
    stride = 1;
  }
  const double* data() const { return stride ? values_.data() : &constant_; }

  int64_t stride = 0;

 private:
  double constant_;
  std::vector<double> values_;
};

// The weights of the stages that States::stages keeps.
std::vector<double> kept_weights(const std::vector<double>& weights,
                                 const OptionalTensor& weights_tensor) {
  std::vector<double> kept;
  if (weights_tensor) {
    STD_TORCH_CHECK(weights_tensor->dim() == 1, "weights: need [n]");
    for (int64_t i = 0; i < weights_tensor->numel(); ++i)
      kept.push_back(number_at(*weights_tensor, i * weights_tensor->stride(0), "weights"));
    return kept;
  }
  kept.reserve(weights.size());
  for (const double weight : weights)
    if (weight != 0.) kept.push_back(weight);
  return kept;
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) with the dtype of all operands, or float for a mix.
template <class F>
void with_type(const States& states, const std::vector<View>& stages,
               std::initializer_list<View> others, const F& f) {
  if (states.is_double) return f(Type<double>{});
  const DType dtype = others.begin()->dtype;
  const auto same = [&](const View& view) { return view.dtype == dtype; };
  const bool all = std::all_of(stages.begin(), stages.end(), same) &&
                   std::all_of(others.begin(), others.end(), same);
  if (all && dtype == DType::bfloat16) return f(Type<BFloat16>{});
  if (all && dtype == DType::float16) return f(Type<Float16>{});
  f(Type<float>{});
}

// What a task of many stages reads grows with them.
int64_t work_of(int64_t elements, size_t stages) {
  return elements * static_cast<int64_t>(stages + 2) / 3;
}

void run(const Tensor& y, const Tensors& ks, const std::vector<double>& weights,
         const OptionalTensor& weights_tensor, const OptionalTensor& dt, double dt_value,
         const Tensor& out) {
  const States states(y, ks, dt, {&out});
  const std::vector<View> stages = states.stages(ks, weights, weights_tensor);
  const std::vector<double> kept = kept_weights(weights, weights_tensor);
  const StepSizes steps(dt, dt_value);
  Combine a{};
  a.batch = states.batch;
  a.elements = states.elements;
  a.y = states.view(y, "y");
  a.ks = stages.data();
  a.weights = kept.data();
  a.count = static_cast<int64_t>(stages.size());
  a.dt = steps.data();
  a.dt_stride = steps.stride;
  a.out = states.view(out, "out");
  parallel(blocks_of(a.batch, a.elements), work_of(kBlock, stages.size()),
           [&](int64_t begin, int64_t end) {
             with_type(states, stages, {a.y, a.out}, [&](auto type) {
               rk_combine<typename decltype(type)::type>(a, begin, end);
             });
           });
}

Tensor rk_combine_forward(const Tensor y, const Tensors ks, const std::vector<double> weights,
                          const OptionalTensor weights_tensor, const OptionalTensor dt,
                          double dt_value) {
  Tensor out = empty_like(y, promote(y.scalar_type(), ks));
  run(y, ks, weights, weights_tensor, dt, dt_value, out);
  return out;
}

void rk_combine_out(const Tensor y, const Tensors ks, const std::vector<double> weights,
                    const OptionalTensor weights_tensor, const OptionalTensor dt, double dt_value,
                    const Tensor out) {
  run(y, ks, weights, weights_tensor, dt, dt_value, out);
}

std::tuple<Tensor, Tensor> rk_error_forward(const Tensors ks, const std::vector<double> weights,
                                            const OptionalTensor weights_tensor,
                                            const OptionalTensor dt, double dt_value,
                                            const Tensor y0, const Tensor y1,
                                            const OptionalTensor rtol, const OptionalTensor atol,
                                            double rtol_value, double atol_value,
                                            bool write_error) {
  const States states(y0, ks, dt, {&y1});
  const std::vector<View> stages = states.stages(ks, weights, weights_tensor);
  const std::vector<double> kept = kept_weights(weights, weights_tensor);
  const StepSizes steps(dt, dt_value);
  const ScalarType dtype = promote(ks[0].scalar_type(), ks);
  Tensor error = write_error ? empty_like(y0, dtype) : empty({0}, dtype, y0);
  StepError a{};
  a.batch = states.batch;
  a.elements = states.elements;
  a.ks = stages.data();
  a.weights = kept.data();
  a.count = static_cast<int64_t>(stages.size());
  a.dt = steps.data();
  a.dt_stride = steps.stride;
  a.y0 = states.view(y0, "y0");
  a.y1 = states.view(y1, "y1");
  a.rtol = rtol ? states.tolerance(*rtol, "rtol") : nullptr;
  a.atol = atol ? states.tolerance(*atol, "atol") : nullptr;
  a.rtol_value = rtol_value;
  a.atol_value = atol_value;
  if (write_error) a.error = states.view(error, "error");

  // A norm for each sample where dt is a vector; else the samples' sums are one.
  const int64_t chunks = chunks_of(a.elements), norms = steps.stride ? a.batch : 1;
  std::vector<double> partial(a.batch * chunks);
  a.partial = partial.data();
  parallel(a.batch * chunks, work_of(std::min(kChunk, a.elements), stages.size() + 1),
           [&](int64_t begin, int64_t end) {
             with_type(states, stages, {a.y0, a.y1},
                       [&](auto type) { rk_error<typename decltype(type)::type>(a, begin, end); });
           });
  const ScalarType norm_dtype = states.is_double ? ScalarType::Double : ScalarType::Float;
  Tensor norm = steps.stride ? empty({norms}, norm_dtype, y0) : empty({}, norm_dtype, y0);
  const int64_t each = norms ? a.batch * chunks / norms : 0;
  for (int64_t b = 0; b < norms; ++b) {
    double total = 0.;
    for (int64_t i = 0; i < each; ++i) total += partial[b * each + i];
    const double value = std::sqrt(total / static_cast<double>(a.batch / norms * a.elements));
    if (states.is_double)
      reinterpret_cast<double*>(data(norm))[b] = value;
    else
      reinterpret_cast<float*>(data(norm))[b] = static_cast<float>(value);
  }
  return {error, norm};
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("rk_combine_forward", TORCH_BOX(&rk_combine_forward));
  m.impl("rk_combine_out", TORCH_BOX(&rk_combine_out));
  m.impl("rk_error", TORCH_BOX(&rk_error_forward));
}
