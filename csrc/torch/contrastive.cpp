// flowkernels::contrastive_* on CPU.
#include "../cpu/contrastive.h"

#include "loss_items.h"

namespace flowkernels {
namespace {

Contrastive describe(const Tensor& v, const Tensor& x0, const Tensor& noise,
                     const Tensor& negatives, const OptionalTensor& weight, double lam,
                     int64_t reduction) {
  STD_TORCH_CHECK(negatives.scalar_type() == ScalarType::Long && negatives.dim() == 1 &&
                      negatives.size(0) == batch_of(v),
                  "negatives: need int64 [B]");
  Contrastive a{};
  a.width = contrastive_width(batch_of(v));
  const int64_t elements = elements_of(v);
  a.extent = {batch_of(v), elements, (elements + a.width - 1) / a.width,
              static_cast<Reduction>(reduction)};
  a.v = samples_view(v, "v", v);
  a.x0 = samples_view(x0, "x0", v);
  a.noise = samples_view(noise, "noise", v);
  a.negatives = reinterpret_cast<const int64_t*>(data(negatives));
  a.negatives_stride = negatives.stride(0);
  a.lam = static_cast<float>(lam);
  a.weight = per_sample(weight, "weight", v, 1.f);
  return a;
}

void run(Contrastive& a, std::vector<double>& partial) {
  partial.resize(items_of(a.extent));
  a.partial = partial.data();
  parallel(items_of(a.extent), std::min(a.extent.elements, a.width),
           [&](int64_t begin, int64_t end) { contrastive(a, begin, end); });
}

std::vector<Tensor> contrastive_forward(const Tensor v, const Tensor x0, const Tensor noise,
                                        const Tensor negatives, const OptionalTensor weight,
                                        double lam, int64_t reduction, int64_t wanted) {
  Contrastive a = describe(v, x0, noise, negatives, weight, lam, reduction);
  WantedOutputs outputs(v, wanted);
  a.grad_v = outputs.next(v.scalar_type());
  std::vector<double> partial;
  run(a, partial);
  Tensor loss = empty_loss(a.extent, v);
  contrastive_total(a, float_data(loss));
  return listed({loss}, outputs.results);
}

Tensor contrastive_backward(const Tensor grad_output, const Tensor v, const Tensor x0,
                            const Tensor noise, const Tensor negatives, const OptionalTensor weight,
                            double lam, int64_t reduction) {
  Contrastive a = describe(v, x0, noise, negatives, weight, lam, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", v, 1.f);
  Tensor gradient = empty_like(v, v.scalar_type());
  a.grad_v = samples_view(gradient, "gradient", v);
  std::vector<double> partial;
  run(a, partial);
  return gradient;
}

void contrastive_rescale(const Tensor gradient, const Tensor grad_output, const Tensor v,
                         const Tensor x0, const Tensor noise, const Tensor negatives,
                         const OptionalTensor weight, double lam, int64_t reduction) {
  Contrastive a = describe(v, x0, noise, negatives, weight, lam, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", v, 1.f);
  if (is_one(a.grad_output)) return;
  STD_TORCH_CHECK(gradient.scalar_type() == v.scalar_type(), "gradient: need the dtype of v");
  a.rescale = true;
  a.grad_v = samples_view(gradient, "gradient", v);
  std::vector<double> partial;
  run(a, partial);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("contrastive_forward", TORCH_BOX(&contrastive_forward));
  m.impl("contrastive_backward", TORCH_BOX(&contrastive_backward));
  m.impl("contrastive_rescale_", TORCH_BOX(&contrastive_rescale));
}
