// flowkernels::self_corrected_*, pair_loss_* on CPU.
#include "../cpu/correction.h"

#include "loss_items.h"

namespace flowkernels {
namespace {

SelfCorrected describe(const Tensor& v, const Tensor& v_teacher, const Tensor& v_post,
                       const Tensor& v_prev, const Tensor& x0, const Tensor& noise, const Tensor& t,
                       const Tensor& t_post, const Tensor& t_prev, double trunc, double c,
                       double lam_bi, int64_t reduction) {
  SelfCorrected a{};
  a.extent = extent_of(v, reduction);
  a.v = samples_view(v, "v", v);
  a.v_teacher = samples_view(v_teacher, "v_teacher", v);
  a.v_post = samples_view(v_post, "v_post", v);
  a.v_prev = samples_view(v_prev, "v_prev", v);
  a.x0 = samples_view(x0, "x0", v);
  a.noise = samples_view(noise, "noise", v);
  a.t = per_sample(t, "t", v, 1.f);
  a.t_post = per_sample(t_post, "t_post", v, 1.f);
  a.t_prev = per_sample(t_prev, "t_prev", v, 1.f);
  a.trunc = static_cast<float>(trunc);
  a.c = static_cast<float>(c);
  a.lam_bi = static_cast<float>(lam_bi);
  return a;
}

void run(SelfCorrected& a, std::vector<double>& sums) {
  const int64_t items = items_of(a.extent);
  sums.resize(2 * items);
  a.consistency = sums.data();
  a.bidirectional = sums.data() + items;
  parallel(items, elements_per_item(a.extent),
           [&](int64_t begin, int64_t end) { self_corrected(a, begin, end); });
}

// (total, consistency, bidirectional, gradient of total to v where wanted)
std::vector<Tensor> self_corrected_forward(const Tensor v, const Tensor v_teacher,
                                           const Tensor v_post, const Tensor v_prev,
                                           const Tensor x0, const Tensor noise, const Tensor t,
                                           const Tensor t_post, const Tensor t_prev, double trunc,
                                           double c, double lam_bi, int64_t reduction,
                                           int64_t wanted) {
  SelfCorrected a = describe(v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc, c,
                             lam_bi, reduction);
  WantedOutputs outputs(v, wanted);
  a.grad_v = outputs.next(v.scalar_type());
  std::vector<double> sums;
  run(a, sums);
  Tensor total = empty_loss(a.extent, v), consistency = empty_loss(a.extent, v);
  Tensor bidirectional = empty_loss(a.extent, v);
  self_corrected_total(a, float_data(total), float_data(consistency), float_data(bidirectional));
  return listed({total, consistency, bidirectional}, outputs.results);
}

Tensor self_corrected_backward(const Tensor grad_output, const Tensor v, const Tensor v_teacher,
                               const Tensor v_post, const Tensor v_prev, const Tensor x0,
                               const Tensor noise, const Tensor t, const Tensor t_post,
                               const Tensor t_prev, double trunc, double c, double lam_bi,
                               int64_t reduction) {
  SelfCorrected a = describe(v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc, c,
                             lam_bi, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", v, 1.f);
  Tensor gradient = empty_like(v, v.scalar_type());
  a.grad_v = samples_view(gradient, "gradient", v);
  std::vector<double> sums;
  run(a, sums);
  return gradient;
}

void self_corrected_rescale(const Tensor gradient, const Tensor grad_output, const Tensor v,
                            const Tensor v_teacher, const Tensor v_post, const Tensor v_prev,
                            const Tensor x0, const Tensor noise, const Tensor t,
                            const Tensor t_post, const Tensor t_prev, double trunc, double c,
                            double lam_bi, int64_t reduction) {
  const PerSample scale = per_sample(grad_output, "grad_output", v, 1.f);
  if (is_one(scale)) return;
  SelfCorrected a = describe(v, v_teacher, v_post, v_prev, x0, noise, t, t_post, t_prev, trunc, c,
                             lam_bi, reduction);
  STD_TORCH_CHECK(gradient.scalar_type() == v.scalar_type(), "gradient: need the dtype of v");
  a.grad_output = scale;
  a.rescale = true;
  a.grad_v = samples_view(gradient, "gradient", v);
  std::vector<double> sums;
  run(a, sums);
}

PairLoss describe(const Tensor& x, const Tensor& y, const OptionalTensor& t, double c,
                  int64_t reduction) {
  PairLoss a{};
  a.extent = extent_of(x, reduction);
  a.x = samples_view(x, "x", x);
  a.y = samples_view(y, "y", x);
  a.t = per_sample(t, "t", x, 1.f);
  a.c = static_cast<float>(c);
  return a;
}

template <class Outputs>
void take_gradients(PairLoss& a, const Tensor& x, const Tensor& y, Outputs& outputs) {
  a.grad_x = outputs.next(x.scalar_type());
  a.grad_y = outputs.next(y.scalar_type());
}

void run(PairLoss& a, std::vector<double>& partial) {
  partial.resize(items_of(a.extent));
  a.partial = partial.data();
  parallel(items_of(a.extent), elements_per_item(a.extent),
           [&](int64_t begin, int64_t end) { pair_loss(a, begin, end); });
}

std::vector<Tensor> pair_loss_forward(const Tensor x, const Tensor y, const OptionalTensor t,
                                      double c, int64_t reduction, int64_t wanted) {
  PairLoss a = describe(x, y, t, c, reduction);
  WantedOutputs outputs(x, wanted);
  take_gradients(a, x, y, outputs);
  std::vector<double> partial;
  run(a, partial);
  Tensor loss = empty_loss(a.extent, x);
  pair_loss_total(a, float_data(loss));
  return listed({loss}, outputs.results);
}

std::vector<Tensor> pair_loss_backward(const Tensor grad_output, const Tensor x, const Tensor y,
                                       const OptionalTensor t, double c, int64_t reduction,
                                       int64_t wanted) {
  PairLoss a = describe(x, y, t, c, reduction);
  a.grad_output = per_sample(grad_output, "grad_output", x, 1.f);
  WantedOutputs outputs(x, wanted);
  take_gradients(a, x, y, outputs);
  std::vector<double> partial;
  run(a, partial);
  return std::move(outputs.results);
}

void pair_loss_rescale(const std::vector<Tensor> gradients, const Tensor grad_output,
                       const Tensor x, const Tensor y, const OptionalTensor t, double c,
                       int64_t reduction, int64_t wanted) {
  const PerSample scale = per_sample(grad_output, "grad_output", x, 1.f);
  if (is_one(scale)) return;
  PairLoss a = describe(x, y, t, c, reduction);
  a.grad_output = scale;
  a.rescale = true;
  GivenOutputs outputs(gradients, x, wanted);
  take_gradients(a, x, y, outputs);
  std::vector<double> partial;
  run(a, partial);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("self_corrected_forward", TORCH_BOX(&self_corrected_forward));
  m.impl("self_corrected_backward", TORCH_BOX(&self_corrected_backward));
  m.impl("self_corrected_rescale_", TORCH_BOX(&self_corrected_rescale));
  m.impl("pair_loss_forward", TORCH_BOX(&pair_loss_forward));
  m.impl("pair_loss_backward", TORCH_BOX(&pair_loss_backward));
  m.impl("pair_loss_rescale_", TORCH_BOX(&pair_loss_rescale));
}
