// flowkernels::rk_combine_* and rk_error on CPU.
#include "runge_kutta.h"

#include <cmath>
#include <cstring>

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

// The terms of an error but for what it is measured against.
struct ErrorCall {
  ErrorCall(const Tensors& ks, const std::vector<double>& weights,
            const OptionalTensor& weights_tensor, const OptionalTensor& dt, double dt_value,
            const Tensor& y0, const Tensor& y1)
      : states(y0, ks, dt, {&y1}),
        stages(states.stages(ks, weights, weights_tensor)),
        kept(kept_weights(weights, weights_tensor)),
        steps(dt, dt_value) {
    terms.batch = states.batch;
    terms.elements = states.elements;
    terms.ks = stages.data();
    terms.weights = kept.data();
    terms.count = static_cast<int64_t>(stages.size());
    terms.dt = steps.data();
    terms.dt_stride = steps.stride;
    terms.y0 = states.view(y0, "y0");
    terms.y1 = states.view(y1, "y1");
  }

  // A norm for each sample where dt is a vector; else the samples' sums are one.
  std::vector<double> norms() {
    const int64_t chunks = chunks_of(terms.elements), count = steps.stride ? terms.batch : 1;
    std::vector<double> partial(terms.batch * chunks);
    terms.partial = partial.data();
    parallel(terms.batch * chunks, work_of(std::min(kChunk, terms.elements), stages.size() + 1),
             [&](int64_t begin, int64_t end) {
               with_type(states, stages, {terms.y0, terms.y1}, [&](auto type) {
                 rk_error<typename decltype(type)::type>(terms, begin, end);
               });
             });
    std::vector<double> found(count);
    const int64_t each = count ? terms.batch * chunks / count : 0;
    for (int64_t b = 0; b < count; ++b) {
      double total = 0.;
      for (int64_t i = 0; i < each; ++i) total += partial[b * each + i];
      const double norm =
          std::sqrt(total / static_cast<double>(terms.batch / count * terms.elements));
      found[b] = states.is_double ? norm : static_cast<float>(norm);
    }
    return found;
  }

  const States states;
  const std::vector<View> stages;
  const std::vector<double> kept;
  const StepSizes steps;
  StepError terms{};
};

std::tuple<Tensor, Tensor> rk_error_forward(const Tensors ks, const std::vector<double> weights,
                                            const OptionalTensor weights_tensor,
                                            const OptionalTensor dt, double dt_value,
                                            const Tensor y0, const Tensor y1,
                                            const OptionalTensor rtol, const OptionalTensor atol,
                                            double rtol_value, double atol_value,
                                            bool write_error) {
  ErrorCall call(ks, weights, weights_tensor, dt, dt_value, y0, y1);
  const ScalarType dtype = promote(ks[0].scalar_type(), ks);
  Tensor error = write_error ? empty_like(y0, dtype) : empty({0}, dtype, y0);
  call.terms.rtol = rtol ? call.states.tolerance(*rtol, "rtol") : nullptr;
  call.terms.atol = atol ? call.states.tolerance(*atol, "atol") : nullptr;
  call.terms.rtol_value = rtol_value;
  call.terms.atol_value = atol_value;
  if (write_error) call.terms.error = call.states.view(error, "error");
  const std::vector<double> norms = call.norms();
  const int64_t count = static_cast<int64_t>(norms.size());
  const ScalarType norm_dtype = call.states.is_double ? ScalarType::Double : ScalarType::Float;
  Tensor norm = call.steps.stride ? empty({count}, norm_dtype, y0) : empty({}, norm_dtype, y0);
  if (call.states.is_double)
    std::copy(norms.begin(), norms.end(), reinterpret_cast<double*>(data(norm)));
  else
    std::copy(norms.begin(), norms.end(), reinterpret_cast<float*>(data(norm)));
  return {error, norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rk_control(
    const Tensors ks, const std::vector<double> weights, const Tensor dt, const Tensor plan,
    const Tensor y0, const Tensor y1, double rtol, double atol, const std::vector<double> nodes,
    const std::vector<double> limits, const Tensor) {
  const Control control(plan, y0, nodes, limits);
  ErrorCall call(ks, weights, {}, dt, 0., y0, y1);
  STD_TORCH_CHECK(dt.dim() + 1 == plan.dim(), "dt: need the plan's row of steps");
  call.terms.rtol_value = rtol;
  call.terms.atol_value = atol;
  const std::vector<double> norms = call.norms();
  for (size_t column = 0; column < norms.size(); ++column)
    control_step(control.terms, static_cast<int64_t>(column), norms[column]);
  return {control.record, control.next, control.accepted, control.times};
}

std::tuple<Tensor, Tensor, Tensor> rk_begin(const Tensor y0, const Tensor y1, const Tensor first,
                                            const Tensor last, const Tensor accepted,
                                            const Tensor dt, double weight) {
  check_begin(y0, {&y1, &first, &last}, accepted, dt);
  const int64_t batch = accepted.numel();
  const size_t size = y0.numel() * y0.element_size() / batch;
  const bool* took = reinterpret_cast<const bool*>(data(accepted));
  Tensor y = empty_like(y0, y0.scalar_type()), slope = empty_like(y0, y0.scalar_type());
  parallel(batch, y0.numel() / batch, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      std::memcpy(data(y) + b * size, data(took[b] ? y1 : y0) + b * size, size);
      std::memcpy(data(slope) + b * size, data(took[b] ? last : first) + b * size, size);
    }
  });
  Tensor at = empty_like(y0, y0.scalar_type());
  run(y, {slope}, {weight}, {}, dt, 0., at);
  return {y, slope, at};
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("rk_combine_forward", TORCH_BOX(&rk_combine_forward));
  m.impl("rk_combine_out", TORCH_BOX(&rk_combine_out));
  m.impl("rk_error", TORCH_BOX(&rk_error_forward));
  m.impl("rk_control", TORCH_BOX(&rk_control));
  m.impl("rk_begin", TORCH_BOX(&rk_begin));
}
