// flowkernels::euler_step_* on CPU.
#include "../cpu/step.h"

#include "samples.h"

namespace flowkernels {
namespace {

void run(const Tensor& x, const Tensor& v, const OptionalTensor& v_uncond, const OptionalTensor& dt,
         double dt_value, double guidance, const Tensor& out, const OptionalTensor& twice) {
  EulerStep a{};
  a.batch = batch_of(x);
  a.elements = elements_of(x);
  a.x = samples_view(x, "x", x);
  a.v = samples_view(v, "v", x);
  a.v_uncond = samples_view(v_uncond, "v_uncond", x);
  a.out = samples_view(out, "out", x);
  if (twice) {
    STD_TORCH_CHECK(twice->scalar_type() == out.scalar_type() && twice->is_contiguous() &&
                        twice->numel() == 2 * out.numel(),
                    "twice: need two contiguous batches in the dtype of out");
    a.twice = View{data(*twice), a.out.dtype, a.elements, 0};
  }
  a.dt = per_sample(dt, "dt", x, static_cast<float>(dt_value));
  a.guidance = static_cast<float>(guidance);
  parallel(blocks_of(a.batch, a.elements), kBlock,
           [&](int64_t begin, int64_t end) { euler_step(a, begin, end); });
}

Tensor euler_step_forward(const Tensor x, const Tensor v, const OptionalTensor v_uncond,
                          const OptionalTensor dt, double dt_value, double guidance) {
  Tensor out = empty_like(x, promote(promote(x.scalar_type(), v.scalar_type()), v_uncond));
  run(x, v, v_uncond, dt, dt_value, guidance, out, std::nullopt);
  return out;
}

void euler_step_out(const Tensor x, const Tensor v, const OptionalTensor v_uncond,
                    const OptionalTensor dt, double dt_value, double guidance, const Tensor out,
                    const OptionalTensor twice) {
  run(x, v, v_uncond, dt, dt_value, guidance, out, twice);
}

std::vector<Tensor> euler_step_gradients(const Tensor grad, const OptionalTensor dt,
                                         double dt_value, double guidance, int64_t wanted) {
  const float scale = static_cast<float>(guidance);
  return scaled_gradients(grad, per_sample(dt, "dt", grad, static_cast<float>(dt_value)), wanted,
                          [=](const ScaledGradient& a, int64_t begin, int64_t end) {
                            euler_step_backward(a, scale, begin, end);
                          });
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("euler_step_forward", TORCH_BOX(&euler_step_forward));
  m.impl("euler_step_out", TORCH_BOX(&euler_step_out));
  m.impl("euler_step_backward", TORCH_BOX(&euler_step_gradients));
}
