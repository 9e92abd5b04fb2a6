// flowkernels::grad_norm, adamw_ema_ and ema_ on CPU.
#include "multi_tensor.h"

#include <cmath>

#include "../cpu/multi_tensor.h"

namespace flowkernels {
namespace {

double read_scalar(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return *reinterpret_cast<const float*>(data(tensor));
    case ScalarType::Double:
      return *reinterpret_cast<const double*>(data(tensor));
    default:
      STD_TORCH_CHECK(false, name, ": need float32 or float64");
      return 0.;
  }
}

// Many small tensors make many small chunks: threads are worth waking for elements, not for chunks.
template <class F>
void parallel_chunks(int64_t chunks, int64_t elements, const F& f) {
  parallel(chunks, elements / std::max<int64_t>(1, chunks), f);
}

Tensor grad_norm(const Tensors grads, const OptionalTensor grad_scale) {
  STD_TORCH_CHECK(!grads.empty(), "grads: need at least one tensor");
  check_scalar(grad_scale, grads[0], "grad_scale");
  std::vector<SquareSums::Item> items;
  std::vector<int64_t> first_chunk{0};
  int64_t elements = 0;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(grad.is_cpu() && is_dense(grad), "grads: need dense tensors on one device");
    items.push_back({data(grad), dtype_of(grad, "grads"), grad.numel()});
    first_chunk.push_back(first_chunk.back() + sweep_chunks(grad.numel()));
    elements += grad.numel();
  }
  std::vector<double> partial(first_chunk.back());
  const SquareSums a{items.data(), first_chunk.data(), static_cast<int64_t>(items.size()),
                     partial.data()};
  parallel_chunks(first_chunk.back(), elements,
                  [&](int64_t begin, int64_t end) { square_sums(a, begin, end); });
  double total = 0.;
  for (const double each : partial) total += each;
  const double scale = grad_scale ? std::abs(read_scalar(*grad_scale, "grad_scale")) : 1.;
  Tensor norm = empty({}, ScalarType::Float, grads[0]);
  *reinterpret_cast<float*>(data(norm)) = static_cast<float>(std::sqrt(total) / scale);
  return norm;
}

// Chunks, averages and parameters; what an update adds is filled in by adamw_ema_.
class SweepBuilder {
 public:
  SweepBuilder(const SweepLists& lists, const std::vector<double>& ema_decays) {
    lists.check();
    first_chunk_.push_back(0);
    for (const Tensor& param : lists.params) {
      Sweep::Item item{};
      item.numel = param.numel();
      item.param = data(param);
      item.param_dtype = dtype_of(param, "params");
      items.push_back(item);
      first_chunk_.push_back(first_chunk_.back() + sweep_chunks(item.numel));
      elements_ += item.numel;
    }
    for (const Tensor& ema : lists.emas) emas_.push_back(float_data(ema, "emas"));
    for (const double decay : ema_decays) weights_.push_back(static_cast<float>(1. - decay));
  }

  void run(Sweep& a) const {
    a.items = items.data();
    a.first_chunk = first_chunk_.data();
    a.count = static_cast<int64_t>(items.size());
    a.emas = emas_.data();
    a.ema_weights = weights_.data();
    a.averages = static_cast<int64_t>(weights_.size());
    parallel_chunks(first_chunk_.back(), elements_,
                    [&](int64_t begin, int64_t end) { sweep(a, begin, end); });
  }

  std::vector<Sweep::Item> items;

 private:
  std::vector<int64_t> first_chunk_;
  std::vector<float*> emas_;
  std::vector<float> weights_;
  int64_t elements_ = 0;
};

bool is_skipped(const OptionalTensor& norm, bool skip_nonfinite) {
  return norm && skip_nonfinite && !std::isfinite(read_scalar(*norm, "norm"));
}

// Unscaling and clipping as one factor; torch's coefficient max_norm / (norm + 1e-6), at most 1.
// A NaN norm gives a NaN factor, as in torch: only skip_nonfinite guards against it.
double gradient_factor(const OptionalTensor& norm, const OptionalTensor& grad_scale,
                       const std::optional<double>& max_grad_norm) {
  double factor = grad_scale ? 1. / read_scalar(*grad_scale, "grad_scale") : 1.;
  if (max_grad_norm) {
    const double coefficient = *max_grad_norm / (read_scalar(*norm, "norm") + 1e-6);
    factor *= coefficient > 1. ? 1. : coefficient;
  }
  return factor;
}

void adamw_ema_(const Tensors params, const Tensors grads, const Tensors exp_avgs,
                const Tensors exp_avg_sqs, const Tensors emas, const Tensors copies,
                const Tensors steps, const OptionalTensor skipped, const OptionalTensor norm,
                const OptionalTensor grad_scale, const OptionalTensor lr_tensor, double lr,
                double beta1, double beta2, double eps, double weight_decay,
                const std::vector<double> ema_decays, const std::optional<double> max_grad_norm,
                bool skip_nonfinite) {
  if (params.empty()) return;
  const SweepLists lists{params, grads,  exp_avgs, exp_avg_sqs,
                         emas,   copies, steps,    ema_decays.size()};
  STD_TORCH_CHECK(lists.updates(), "grads: need one tensor for each parameter");
  STD_TORCH_CHECK(!max_grad_norm || norm, "max_grad_norm: needs norm");
  SweepBuilder builder(lists, ema_decays);
  for (const auto& [tensor, name] : {std::pair{&skipped, "skipped"},
                                     {&norm, "norm"},
                                     {&grad_scale, "grad_scale"},
                                     {&lr_tensor, "lr"}})
    check_scalar(*tensor, params[0], name);
  if (is_skipped(norm, skip_nonfinite)) {
    if (skipped) ++*reinterpret_cast<int64_t*>(data(*skipped));
    return;
  }
  if (lr_tensor) lr = read_scalar(*lr_tensor, "lr");
  for (size_t i = 0; i < params.size(); ++i) {
    Sweep::Item& item = builder.items[i];
    item.grad = data(grads[i]);
    item.grad_dtype = dtype_of(grads[i], "grads");
    item.exp_avg = exp_avgs.empty() ? nullptr : float_data(exp_avgs[i], "exp_avgs");
    item.exp_avg_sq = float_data(exp_avg_sqs[i], "exp_avg_sqs");
    item.copy = copies.empty() ? nullptr : data(copies[i]);
    item.copy_dtype = copies.empty() ? DType::float32 : dtype_of(copies[i], "copies");
    const double step = *float_data(steps[i], "steps") + 1.;
    item.decay = static_cast<float>(1. - lr * weight_decay);
    item.step_size = static_cast<float>(lr / (1. - std::pow(beta1, step)));
    item.inverse_root = static_cast<float>(1. / std::sqrt(1. - std::pow(beta2, step)));
  }
  // Nothing is written before every tensor has been checked.
  for (const Tensor& step : steps) *reinterpret_cast<float*>(data(step)) += 1.f;
  Sweep a{};
  a.factor = static_cast<float>(gradient_factor(norm, grad_scale, max_grad_norm));
  a.first_weight = static_cast<float>(1. - beta1);
  a.beta2 = static_cast<float>(beta2);
  a.second_weight = static_cast<float>(1. - beta2);
  a.eps = static_cast<float>(eps);
  builder.run(a);
}

void ema_(const Tensors params, const Tensors emas, const std::vector<double> ema_decays,
          const OptionalTensor norm) {
  if (params.empty()) return;
  const Tensors none;
  const SweepLists lists{params, none, none, none, emas, none, none, ema_decays.size()};
  const SweepBuilder builder(lists, ema_decays);
  check_scalar(norm, params[0], "norm");
  if (is_skipped(norm, true)) return;
  Sweep a{};
  builder.run(a);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_));
  m.impl("ema_", TORCH_BOX(&ema_));
}
