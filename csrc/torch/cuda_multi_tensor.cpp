// flowkernels::grad_norm, adamw_ema_ and ema_ on CUDA.
#include "../cuda/multi_tensor.cuh"
#include "cuda_common.h"
#include "multi_tensor.h"

namespace flowkernels {
namespace {

cuda::Scalar scalar_of(const OptionalTensor& tensor, const Tensor& like, const char* name) {
  if (!tensor) return {};
  check_scalar(tensor, like, name);
  const ScalarType dtype = tensor->scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  ": need float32 or float64");
  return {data(*tensor), dtype == ScalarType::Double};
}

Tensor grad_norm(const Tensors grads, const OptionalTensor grad_scale) {
  STD_TORCH_CHECK(!grads.empty(), "grads: need at least one tensor");
  const DeviceGuard guard(grads[0].get_device_index());
  std::vector<cuda::NormItem> items;
  for (const Tensor& grad : grads) {
    STD_TORCH_CHECK(
        grad.is_cuda() && is_dense(grad) && grad.get_device_index() == grads[0].get_device_index(),
        "grads: need dense tensors on one device");
    items.push_back({data(grad), grad.numel(), dtype_of(grad, "grads")});
  }
  const int64_t count = static_cast<int64_t>(items.size());
  Tensor partial = empty({cuda::norm_chunks(items.data(), count)}, ScalarType::Double, grads[0]);
  Tensor norm = empty({}, ScalarType::Float, grads[0]);
  check_launch(cuda::grad_norm(items.data(), count, reinterpret_cast<double*>(data(partial)),
                               scalar_of(grad_scale, grads[0], "grad_scale"),
                               float_data(norm, "norm"), stream_of(grads[0])));
  return norm;
}

// The averages' pointers and weights, in the kernels' order.
struct AverageLists {
  std::vector<float*> pointers;
  std::vector<float> weights;

  AverageLists(const Tensors& emas, const std::vector<double>& decays) {
    for (const Tensor& ema : emas) pointers.push_back(float_data(ema, "emas"));
    for (const double decay : decays) weights.push_back(static_cast<float>(1. - decay));
  }
  cuda::Averages view() const {
    return {pointers.data(), weights.data(), static_cast<int64_t>(weights.size())};
  }
};

std::vector<cuda::SweepItem> items_of(const SweepLists& lists) {
  lists.check();
  std::vector<cuda::SweepItem> items;
  for (size_t i = 0; i < lists.params.size(); ++i) {
    cuda::SweepItem item{};
    item.numel = lists.params[i].numel();
    item.param = data(lists.params[i]);
    item.param_dtype = dtype_of(lists.params[i], "params");
    if (lists.updates()) {
      item.grad = data(lists.grads[i]);
      item.grad_dtype = dtype_of(lists.grads[i], "grads");
      item.exp_avg = lists.exp_avgs.empty() ? nullptr : float_data(lists.exp_avgs[i], "exp_avgs");
      item.exp_avg_sq = float_data(lists.exp_avg_sqs[i], "exp_avg_sqs");
      item.step = float_data(lists.steps[i], "steps");
      if (!lists.copies.empty()) {
        item.copy = data(lists.copies[i]);
        item.copy_dtype = dtype_of(lists.copies[i], "copies");
      }
    }
    items.push_back(item);
  }
  return items;
}

void adamw_ema_(const Tensors params, const Tensors grads, const Tensors exp_avgs,
                const Tensors exp_avg_sqs, const Tensors emas, const Tensors copies,
                const Tensors steps, const OptionalTensor skipped, const OptionalTensor norm,
                const OptionalTensor grad_scale, const OptionalTensor lr_tensor, double lr,
                double beta1, double beta2, double eps, double weight_decay,
                const std::vector<double> ema_decays, const std::optional<double> max_grad_norm,
                bool skip_nonfinite) {
  if (params.empty()) return;
  const DeviceGuard guard(params[0].get_device_index());
  const SweepLists lists{params, grads,  exp_avgs, exp_avg_sqs,
                         emas,   copies, steps,    ema_decays.size()};
  STD_TORCH_CHECK(lists.updates(), "grads: need one tensor for each parameter");
  STD_TORCH_CHECK(!max_grad_norm || norm, "max_grad_norm: needs norm");
  const std::vector<cuda::SweepItem> items = items_of(lists);
  const AverageLists averages(emas, ema_decays);
  const int64_t count = static_cast<int64_t>(items.size());
  cuda::Hyperparameters hyper{};
  hyper.norm = scalar_of(norm, params[0], "norm");
  hyper.grad_scale = scalar_of(grad_scale, params[0], "grad_scale");
  hyper.lr = scalar_of(lr_tensor, params[0], "lr");
  hyper.lr_value = lr;
  hyper.beta1 = beta1;
  hyper.beta2 = beta2;
  hyper.eps = eps;
  hyper.weight_decay = weight_decay;
  hyper.max_grad_norm = max_grad_norm.value_or(0.);
  hyper.clip = max_grad_norm.has_value();
  hyper.skip_nonfinite = skip_nonfinite;
  check_scalar(skipped, params[0], "skipped");
  Tensor scratch = empty({cuda::scratch_floats(count)}, ScalarType::Float, params[0]);
  check_launch(cuda::adamw_ema(items.data(), count, averages.view(), hyper,
                               skipped ? reinterpret_cast<int64_t*>(data(*skipped)) : nullptr,
                               float_data(scratch, "scratch"), stream_of(params[0])));
}

void ema_(const Tensors params, const Tensors emas, const std::vector<double> ema_decays,
          const OptionalTensor norm) {
  if (params.empty()) return;
  const DeviceGuard guard(params[0].get_device_index());
  const Tensors none;
  const SweepLists lists{params, none, none, none, emas, none, none, ema_decays.size()};
  const std::vector<cuda::SweepItem> items = items_of(lists);
  const AverageLists averages(emas, ema_decays);
  check_launch(cuda::ema(items.data(), static_cast<int64_t>(items.size()), averages.view(),
                         scalar_of(norm, params[0], "norm"), stream_of(params[0])));
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CUDA, m) {
  using namespace flowkernels;
  m.impl("grad_norm", TORCH_BOX(&grad_norm));
  m.impl("adamw_ema_", TORCH_BOX(&adamw_ema_));
  m.impl("ema_", TORCH_BOX(&ema_));
}
