// flowkernels::rk_combine_* and rk_error on CUDA.
#include "../cuda/runge_kutta.cuh"
#include "cuda_common.h"
#include "runge_kutta.h"

namespace flowkernels {
namespace {

void check_device(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  ": not on the device of the state");
}

cuda::Numbers numbers_of(const OptionalTensor& tensor, double value, const Tensor& like,
                         const char* name) {
  cuda::Numbers numbers;
  numbers.value = value;
  if (!tensor) return numbers;
  check_device(*tensor, like, name);
  numbers.data = data(*tensor);
  numbers.is_double = tensor->scalar_type() == ScalarType::Double;
  if (!numbers.is_double) numbers.dtype = dtype_of(*tensor, name);
  if (tensor->dim() == 1) numbers.stride = tensor->stride(0);
  return numbers;
}

// The stages of a call, as the kernels' launchers take them; keeps what the list points to.
class Call {
 public:
  Call(const Tensor& like, const Tensors& ks, const std::vector<double>& weights,
       const OptionalTensor& weights_tensor, const OptionalTensor& dt, double dt_value,
       std::initializer_list<const Tensor*> others)
      : states(like, ks, dt, others), views_(states.stages(ks, weights, weights_tensor)) {
    for (const Tensor& k : ks) check_device(k, like, "ks");
    for (const Tensor* other : others) check_device(*other, like, "state");
    STD_TORCH_CHECK(views_.size() <= cuda::kMostStages, "ks: more stages than a launch takes");
    STD_TORCH_CHECK(!weights_tensor || weights_tensor->dim() == 1, "weights: need [n]");
    for (const double weight : weights)
      if (weight != 0.) weights_.push_back(weight);
    list.batch = states.batch;
    list.elements = states.elements;
    list.is_double = states.is_double;
    list.ks = views_.data();
    list.weights = weights_.data();
    list.device_weights = numbers_of(weights_tensor, 0., like, "weights");
    list.count = static_cast<int64_t>(views_.size());
    list.dt = numbers_of(dt, dt_value, like, "dt");
  }

  States states;
  cuda::StageList list;

 private:
  std::vector<View> views_;
  std::vector<double> weights_;
};

void run(const Tensor& y, const Tensors& ks, const std::vector<double>& weights,
         const OptionalTensor& weights_tensor, const OptionalTensor& dt, double dt_value,
         const Tensor& out) {
  const DeviceGuard guard(y.get_device_index());
  const Call call(y, ks, weights, weights_tensor, dt, dt_value, {&out});
  check_launch(cuda::rk_combine(call.list, call.states.view(y, "y"), call.states.view(out, "out"),
                                stream_of(y)));
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

const void* tolerance(const OptionalTensor& tensor, const Tensor& like, const States& states,
                      const char* name) {
  if (!tensor) return nullptr;
  check_device(*tensor, like, name);
  return states.tolerance(*tensor, name);
}

std::tuple<Tensor, Tensor> rk_error_forward(const Tensors ks, const std::vector<double> weights,
                                            const OptionalTensor weights_tensor,
                                            const OptionalTensor dt, double dt_value,
                                            const Tensor y0, const Tensor y1,
                                            const OptionalTensor rtol, const OptionalTensor atol,
                                            double rtol_value, double atol_value,
                                            bool write_error) {
  const DeviceGuard guard(y0.get_device_index());
  const Call call(y0, ks, weights, weights_tensor, dt, dt_value, {&y1});
  const States& states = call.states;
  const ScalarType dtype = promote(ks[0].scalar_type(), ks);
  const ScalarType norm_dtype = states.is_double ? ScalarType::Double : ScalarType::Float;
  const bool per_sample = dt && dt->dim() == 1;
  Tensor error = write_error ? empty_like(y0, dtype) : empty({0}, dtype, y0);
  Tensor norm = per_sample ? empty({states.batch}, norm_dtype, y0) : empty({}, norm_dtype, y0);
  Tensor partial = empty({cuda::error_chunks(call.list)}, ScalarType::Double, y0);
  cuda::ErrorTerms terms{};
  terms.y0 = states.view(y0, "y0");
  terms.y1 = states.view(y1, "y1");
  terms.rtol = tolerance(rtol, y0, states, "rtol");
  terms.atol = tolerance(atol, y0, states, "atol");
  terms.rtol_value = rtol_value;
  terms.atol_value = atol_value;
  if (write_error) terms.error = states.view(error, "error");
  check_launch(cuda::rk_error(call.list, terms, per_sample,
                              reinterpret_cast<double*>(data(partial)), data(norm), stream_of(y0)));
  return {error, norm};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rk_control(
    const Tensors ks, const std::vector<double> weights, const Tensor dt, const Tensor plan,
    const Tensor y0, const Tensor y1, double rtol, double atol, const std::vector<double> nodes,
    const std::vector<double> limits, const Tensor tickets) {
  const DeviceGuard guard(y0.get_device_index());
  const Control control(plan, y0, nodes, limits);
  const Call call(y0, ks, weights, {}, dt, 0., {&y1});
  check_device(plan, y0, "plan");
  check_device(tickets, y0, "tickets");
  STD_TORCH_CHECK(dt.dim() + 1 == plan.dim(), "dt: need the plan's row of steps");
  STD_TORCH_CHECK(tickets.scalar_type() == ScalarType::Int && tickets.is_contiguous() &&
                      tickets.numel() == control.terms.columns,
                  "tickets: need int32, one for each column of the plan");
  Tensor partial = empty({cuda::error_chunks(call.list)}, ScalarType::Double, y0);
  cuda::ErrorTerms terms{};
  terms.y0 = call.states.view(y0, "y0");
  terms.y1 = call.states.view(y1, "y1");
  terms.rtol_value = rtol;
  terms.atol_value = atol;
  check_launch(cuda::rk_control(call.list, terms, control.terms,
                                reinterpret_cast<double*>(data(partial)),
                                reinterpret_cast<unsigned*>(data(tickets)), stream_of(y0)));
  return {control.record, control.next, control.accepted, control.times};
}

std::tuple<Tensor, Tensor, Tensor> rk_begin(const Tensor y0, const Tensor y1, const Tensor first,
                                            const Tensor last, const Tensor accepted,
                                            const Tensor dt, double weight) {
  const DeviceGuard guard(y0.get_device_index());
  check_begin(y0, {&y1, &first, &last}, accepted, dt);
  for (const Tensor* other : {&y1, &first, &last, &accepted, &dt})
    check_device(*other, y0, "operand");
  const ScalarType dtype = y0.scalar_type();
  Tensor y = empty_like(y0, dtype), slope = empty_like(y0, dtype), at = empty_like(y0, dtype);
  cuda::StepBegin a{};
  a.batch = accepted.numel();
  a.elements = y0.numel() / a.batch;
  a.is_double = dtype == ScalarType::Double;
  if (!a.is_double) a.dtype = dtype_of(y0, "y0");
  a.y0 = data(y0);
  a.y1 = data(y1);
  a.first = data(first);
  a.last = data(last);
  a.y = data(y);
  a.slope = data(slope);
  a.at = data(at);
  a.accepted = reinterpret_cast<const bool*>(data(accepted));
  a.dt = reinterpret_cast<const double*>(data(dt));
  a.weight = weight;
  check_launch(cuda::rk_begin(a, stream_of(y0)));
  return {y, slope, at};
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CUDA, m) {
  using namespace flowkernels;
  m.impl("rk_combine_forward", TORCH_BOX(&rk_combine_forward));
  m.impl("rk_combine_out", TORCH_BOX(&rk_combine_out));
  m.impl("rk_error", TORCH_BOX(&rk_error_forward));
  m.impl("rk_control", TORCH_BOX(&rk_control));
  m.impl("rk_begin", TORCH_BOX(&rk_begin));
}
