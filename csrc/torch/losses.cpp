// flowkernels::flow_matching_*, fgm_* on CPU.
#include "../cpu/losses.h"

#include "loss_items.h"

namespace flowkernels {
namespace {

FlowMatching describe(const Tensor& v, const Tensor& x0, const Tensor& noise,
                      const OptionalTensor& dt, const OptionalTensor& weight, int64_t reduction) {
  FlowMatching a{};
  a.extent = extent_of(v, reduction);
  a.v = samples_view(v, "v", v);
  a.x0 = samples_view(x0, "x0", v);
  a.noise = samples_view(noise, "noise", v);
  a.dt = per_sample(dt, "dt", v, 1.f);
  a.weight = per_sample(weight, "weight", v, 1.f);
  return a;
}

template <class Outputs>
void take_gradients(FlowMatching& a, const Tensor& v, const Tensor& x0, const Tensor& noise,
                    Outputs& outputs) {
  a.grad_v = outputs.next(v.scalar_type());
  a.grad_x0 = outputs.next(x0.scalar_type());
  a.grad_noise = outputs.next(noise.scalar_type());
}

void run(FlowMatching& a, std::vector<double>& partial) {
  partial.resize(items_of(a.extent));
  a.partial = partial.data();
  parallel(items_of(a.extent), elements_per_item(a.extent),
           [&](int64_t begin, int64_t end) { flow_matching(a, begin, end); });
}

std::vector<Tensor> flow_matching_forward(const Tensor v, const Tensor x0, const Tensor noise,
                                          const OptionalTensor dt, const OptionalTensor weight,
                                          int64_t reduction, int64_t wanted) {
  FlowMatching a = describe(v, x0, noise, dt, weight, reduction);
  WantedOutputs outputs(v, wanted);
  take_gradients(a, v, x0, noise, outputs);
  std::vector<double> partial;
  run(a, partial);
  Tensor loss = empty_loss(a.extent, v);
  flow_matching_total(a, float_data(loss));
  return listed({loss}, outputs.results);
}

std::vector<Tensor> flow_matching_backward(const Tensor grad_output, const Tensor v,
                                           const Tensor x0, const Tensor noise,
                                           const OptionalTensor dt, const OptionalTensor weight,
                                           int64_t reduction, int64_t wanted) {
  FlowMatching a = describe(v, x0, noise, dt, weight, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", v, 1.f);
  WantedOutputs outputs(v, wanted);
  take_gradients(a, v, x0, noise, outputs);
  std::vector<double> partial;
  run(a, partial);
  return std::move(outputs.results);
}

void flow_matching_rescale(const std::vector<Tensor> gradients, const Tensor grad_output,
                           const Tensor v, const Tensor x0, const Tensor noise,
                           const OptionalTensor dt, const OptionalTensor weight, int64_t reduction,
                           int64_t wanted) {
  FlowMatching a = describe(v, x0, noise, dt, weight, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", v, 1.f);
  if (is_one(a.grad_output)) return;
  a.rescale = true;
  GivenOutputs outputs(gradients, v, wanted);
  take_gradients(a, v, x0, noise, outputs);
  std::vector<double> partial;
  run(a, partial);
}

FGM describe(const Tensor& u, const Tensor& v, const Tensor& x0, const Tensor& noise,
             const OptionalTensor& u_uncond, double lam, double guidance, int64_t reduction) {
  FGM a{};
  a.extent = extent_of(u, reduction);
  a.u = samples_view(u, "u", u);
  a.v = samples_view(v, "v", u);
  a.x0 = samples_view(x0, "x0", u);
  a.noise = samples_view(noise, "noise", u);
  a.u_uncond = samples_view(u_uncond, "u_uncond", u);
  a.lam = static_cast<float>(lam);
  a.guidance = static_cast<float>(guidance);
  return a;
}

template <class Outputs>
void take_gradients(FGM& a, const Tensor& u, const Tensor& v, const Tensor& x0, const Tensor& noise,
                    const OptionalTensor& u_uncond, Outputs& outputs) {
  a.grad_u = outputs.next(u.scalar_type());
  a.grad_v = outputs.next(v.scalar_type());
  a.grad_x0 = outputs.next(x0.scalar_type());
  a.grad_noise = outputs.next(noise.scalar_type());
  if (u_uncond) a.grad_u_uncond = outputs.next(u_uncond->scalar_type());
}

void run_forward(FGM& a) {
  const int64_t items = items_of(a.extent), grain = elements_per_item(a.extent);
  if (a.extent.chunks == 1) {
    // One item is one sample: its normaliser, if any, and its loss while it is in the cache.
    parallel(items, grain, [&](int64_t begin, int64_t end) {
      const int64_t together = a.sid ? 1 : end - begin;
      for (int64_t sample = begin; sample < end; sample += together) {
        if (a.sid) fgm_size(a, sample, sample + together);
        fgm_omega(a, sample, sample + together);
        fgm(a, sample, sample + together);
      }
    });
    return;
  }
  if (a.sid) parallel(items, grain, [&](int64_t begin, int64_t end) { fgm_size(a, begin, end); });
  fgm_omega(a, 0, a.extent.batch);
  parallel(items, grain, [&](int64_t begin, int64_t end) { fgm(a, begin, end); });
}

// (loss, number of samples left out, ω, gradients...)
std::vector<Tensor> fgm_forward(const Tensor u, const Tensor v, const Tensor x0, const Tensor noise,
                                const OptionalTensor u_uncond, const Tensor t,
                                const OptionalTensor weight, double lam, double guidance, bool sid,
                                int64_t reduction, int64_t wanted) {
  FGM a = describe(u, v, x0, noise, u_uncond, lam, guidance, reduction);
  a.t = per_sample(t, "t", u, 0.f);
  a.weight = per_sample(weight, "weight", u, 1.f);
  a.sid = sid;
  WantedOutputs outputs(u, wanted);
  take_gradients(a, u, v, x0, noise, u_uncond, outputs);
  std::vector<double> sums(2 * items_of(a.extent));
  a.partial = sums.data();
  a.size = sums.data() + items_of(a.extent);
  Tensor omega = empty({a.extent.batch}, ScalarType::Float, u);
  a.omega = float_data(omega);
  run_forward(a);
  Tensor loss = empty_loss(a.extent, u);
  Tensor skipped = empty({}, ScalarType::Int, u);
  *static_cast<int32_t*>(skipped.data_ptr()) = fgm_total(a, float_data(loss));
  return listed({loss, skipped, omega}, outputs.results);
}

void run_backward(FGM& a, const Tensor& omega, const Tensor& like) {
  STD_TORCH_CHECK(omega.scalar_type() == ScalarType::Float && omega.is_contiguous() &&
                      omega.numel() == batch_of(like),
                  "omega: need contiguous float32 [B]");
  a.omega = float_data(omega);
  std::vector<double> partial(items_of(a.extent));
  a.partial = partial.data();
  parallel(items_of(a.extent), elements_per_item(a.extent),
           [&](int64_t begin, int64_t end) { fgm(a, begin, end); });
}

std::vector<Tensor> fgm_backward(const Tensor grad_output, const Tensor u, const Tensor v,
                                 const Tensor x0, const Tensor noise, const OptionalTensor u_uncond,
                                 const Tensor omega, double lam, double guidance, int64_t reduction,
                                 int64_t wanted) {
  FGM a = describe(u, v, x0, noise, u_uncond, lam, guidance, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", u, 1.f);
  WantedOutputs outputs(u, wanted);
  take_gradients(a, u, v, x0, noise, u_uncond, outputs);
  run_backward(a, omega, u);
  return std::move(outputs.results);
}

void fgm_rescale(const std::vector<Tensor> gradients, const Tensor grad_output, const Tensor u,
                 const Tensor v, const Tensor x0, const Tensor noise, const OptionalTensor u_uncond,
                 const Tensor omega, double lam, double guidance, int64_t reduction,
                 int64_t wanted) {
  FGM a = describe(u, v, x0, noise, u_uncond, lam, guidance, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", u, 1.f);
  if (is_one(a.grad_output)) return;
  a.rescale = true;
  GivenOutputs outputs(gradients, u, wanted);
  take_gradients(a, u, v, x0, noise, u_uncond, outputs);
  run_backward(a, omega, u);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("flow_matching_forward", TORCH_BOX(&flow_matching_forward));
  m.impl("flow_matching_backward", TORCH_BOX(&flow_matching_backward));
  m.impl("flow_matching_rescale_", TORCH_BOX(&flow_matching_rescale));
  m.impl("fgm_forward", TORCH_BOX(&fgm_forward));
  m.impl("fgm_backward", TORCH_BOX(&fgm_backward));
  m.impl("fgm_rescale_", TORCH_BOX(&fgm_rescale));
}
