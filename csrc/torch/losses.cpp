// flowkernels::flow_matching, fgm, scale_gradients_ on CPU.
#include "../cpu/losses.h"

#include "samples.h"

namespace flowkernels {
namespace {

LossExtent extent_of(const Tensor& x, int64_t reduction) {
  const int64_t elements = elements_of(x);
  return {batch_of(x), elements, chunks_of(elements), static_cast<Reduction>(reduction)};
}

int64_t items_of(const LossExtent& extent) { return extent.batch * extent.chunks; }

int64_t elements_per_item(const LossExtent& extent) { return std::min(extent.elements, kChunk); }

Tensor empty_loss(const LossExtent& extent, const Tensor& like) {
  return extent.reduction == Reduction::none ? empty({extent.batch}, ScalarType::Float, like)
                                             : empty({}, ScalarType::Float, like);
}

// The loss (and what else leads the list) before the gradients.
std::vector<Tensor> listed(std::initializer_list<Tensor> first, std::vector<Tensor>& gradients) {
  std::vector<Tensor> all(first);
  all.insert(all.end(), gradients.begin(), gradients.end());
  return all;
}

std::vector<Tensor> flow_matching_cpu(const Tensor v, const Tensor x0, const Tensor noise,
                                      const OptionalTensor weight,
                                      const OptionalTensor grad_output, int64_t reduction,
                                      int64_t wanted) {
  FlowMatching a{};
  a.extent = extent_of(v, reduction);
  a.v = samples_view(v, "v", v);
  a.x0 = samples_view(x0, "x0", v);
  a.noise = samples_view(noise, "noise", v);
  a.weight = per_sample(weight, "weight", v, 1.f);
  a.grad_output = per_sample(grad_output, "grad_output", v, 1.f);
  WantedOutputs outputs(v, wanted);
  a.grad_v = outputs.next(v.scalar_type());
  a.grad_x0 = outputs.next(x0.scalar_type());
  a.grad_noise = outputs.next(noise.scalar_type());
  std::vector<double> partial(items_of(a.extent));
  a.partial = partial.data();
  parallel(items_of(a.extent), elements_per_item(a.extent),
           [&](int64_t begin, int64_t end) { flow_matching(a, begin, end); });
  Tensor loss = empty_loss(a.extent, v);
  flow_matching_total(a, reinterpret_cast<float*>(data(loss)));
  return listed({loss}, outputs.results);
}

void run(FGM& a) {
  const int64_t items = items_of(a.extent), grain = elements_per_item(a.extent);
  if (a.extent.chunks == 1) {
    // One item is one sample: its normaliser and its loss while it is in the cache.
    parallel(items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t sample = begin; sample < end; ++sample) {
        if (a.sid) fgm_size(a, sample, sample + 1);
        fgm_omega(a, sample, sample + 1);
        fgm(a, sample, sample + 1);
      }
    });
    return;
  }
  if (a.sid)
    parallel(items, grain, [&](int64_t begin, int64_t end) { fgm_size(a, begin, end); });
  fgm_omega(a, 0, a.extent.batch);
  parallel(items, grain, [&](int64_t begin, int64_t end) { fgm(a, begin, end); });
}

std::vector<Tensor> fgm_cpu(const Tensor u, const Tensor v, const Tensor x0, const Tensor noise,
                            const OptionalTensor u_uncond, const Tensor t,
                            const OptionalTensor weight, const OptionalTensor grad_output,
                            double lam, double guidance, bool sid, int64_t reduction,
                            int64_t wanted) {
  FGM a{};
  a.extent = extent_of(u, reduction);
  a.u = samples_view(u, "u", u);
  a.v = samples_view(v, "v", u);
  a.x0 = samples_view(x0, "x0", u);
  a.noise = samples_view(noise, "noise", u);
  a.u_uncond = samples_view(u_uncond, "u_uncond", u);
  a.t = per_sample(t, "t", u, 0.f);
  a.weight = per_sample(weight, "weight", u, 1.f);
  a.grad_output = per_sample(grad_output, "grad_output", u, 1.f);
  a.lam = static_cast<float>(lam);
  a.guidance = static_cast<float>(guidance);
  a.sid = sid;
  WantedOutputs outputs(u, wanted);
  a.grad_u = outputs.next(u.scalar_type());
  a.grad_v = outputs.next(v.scalar_type());
  a.grad_x0 = outputs.next(x0.scalar_type());
  a.grad_noise = outputs.next(noise.scalar_type());
  if (u_uncond) a.grad_u_uncond = outputs.next(u_uncond->scalar_type());
  std::vector<double> sums(2 * items_of(a.extent));
  std::vector<float> omega(a.extent.batch);
  a.partial = sums.data();
  a.size = sums.data() + items_of(a.extent);
  a.omega = omega.data();
  run(a);
  Tensor loss = empty_loss(a.extent, u);
  Tensor skipped = empty({}, ScalarType::Int, u);
  *static_cast<int32_t*>(skipped.data_ptr()) =
      fgm_total(a, reinterpret_cast<float*>(data(loss)));
  return listed({loss, skipped}, outputs.results);
}

void scale_gradients(const std::vector<Tensor> gradients, const Tensor grad_output) {
  for (const Tensor& gradient : gradients) {
    ScaleGradient a{};
    a.batch = batch_of(gradient);
    a.elements = elements_of(gradient);
    a.gradient = samples_view(gradient, "gradient", gradient);
    a.scale = per_sample(grad_output, "grad_output", gradient, 1.f);
    if (a.scale.stride == 0 && value_of(a.scale, 0) == 1.f) return;
    parallel(blocks_of(a.batch, a.elements), kBlock,
             [&](int64_t begin, int64_t end) { scale_gradient(a, begin, end); });
  }
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("flow_matching", TORCH_BOX(&flow_matching_cpu));
  m.impl("fgm", TORCH_BOX(&fgm_cpu));
  m.impl("scale_gradients_", TORCH_BOX(&scale_gradients));
}
