// flowkernels::bellman_step_* on CPU.
#include "../cpu/bellman.h"

#include "samples.h"

namespace flowkernels {
namespace {

View float32_view(const Tensor& tensor, const char* name, const Tensor& like) {
  View view = samples_view(tensor, name, like);
  STD_TORCH_CHECK(view.dtype == DType::float32, name, ": need float32");
  return view;
}

void bellman_step_out(const Tensor x, const Tensor v, const OptionalTensor v_uncond,
                      const OptionalTensor previous, double dt, double guidance,
                      const Tensor x_next, const Tensor velocity, const OptionalTensor increment) {
  STD_TORCH_CHECK(!previous || increment, "increment: need one where previous is given");
  BellmanStep a{};
  a.batch = batch_of(x);
  a.elements = elements_of(x);
  a.x = samples_view(x, "x", x);
  a.v = samples_view(v, "v", x);
  a.v_uncond = samples_view(v_uncond, "v_uncond", x);
  a.previous = samples_view(previous, "previous", x);
  a.x_next = samples_view(x_next, "x_next", x);
  a.velocity = float32_view(velocity, "velocity", x);
  if (previous) a.increment = float32_view(*increment, "increment", x);
  a.dt = static_cast<float>(dt);
  a.guidance = static_cast<float>(guidance);
  parallel(blocks_of(a.batch, a.elements), kBlock,
           [&](int64_t begin, int64_t end) { bellman_step(a, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> bellman_step_forward(const Tensor x, const Tensor v,
                                                        const OptionalTensor v_uncond,
                                                        const OptionalTensor previous, double dt,
                                                        double guidance) {
  Tensor x_next = empty_like(x, promote(promote(x.scalar_type(), v.scalar_type()), v_uncond));
  Tensor velocity = empty_like(x, ScalarType::Float);
  Tensor increment = previous ? empty_like(x, ScalarType::Float) : empty({0}, ScalarType::Float, x);
  bellman_step_out(x, v, v_uncond, previous, dt, guidance, x_next, velocity, increment);
  return {x_next, velocity, increment};
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("bellman_step_forward", TORCH_BOX(&bellman_step_forward));
  m.impl("bellman_step_out", TORCH_BOX(&bellman_step_out));
}
