// flowkernels::interpolate_*, philox on CPU.
#include "../cpu/interpolate.h"

#include "samples.h"

namespace flowkernels {
namespace {

uint64_t bits_of(const OptionalTensor& tensor, int64_t value, const char* name) {
  if (!tensor) return static_cast<uint64_t>(value);
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Long && tensor->dim() == 0, name,
                  ": need a 0-d int64 tensor");
  return *static_cast<const uint64_t*>(tensor->data_ptr());
}

void run(const Interpolate& a) {
  // A normal costs as much as a few elements' traffic: seeded blocks make a task sooner.
  parallel(blocks_of(a.batch, a.elements), a.seeded ? 4 * kBlock : kBlock,
           [&](int64_t begin, int64_t end) { interpolate(a, begin, end); });
}

Interpolate describe(const Tensor& x0, const Tensor& t, const Tensor& x_t) {
  Interpolate a{};
  a.batch = batch_of(x0);
  a.elements = elements_of(x0);
  a.x0 = samples_view(x0, "x0", x0);
  a.x_t = samples_view(x_t, "x_t", x0);
  a.t = per_sample(t, "t", x0, 0.f);
  return a;
}

Tensor interpolate_forward(const Tensor x0, const Tensor t, const Tensor noise) {
  Tensor x_t = empty_like(x0, promote(x0.scalar_type(), noise.scalar_type()));
  Interpolate a = describe(x0, t, x_t);
  a.noise = samples_view(noise, "noise", x0);
  run(a);
  return x_t;
}

std::tuple<Tensor, Tensor> interpolate_seeded(const Tensor x0, const Tensor t,
                                              const OptionalTensor seed, int64_t seed_value,
                                              const OptionalTensor offset, int64_t offset_value,
                                              bool return_noise) {
  Tensor x_t = empty_like(x0, x0.scalar_type());
  Tensor noise = return_noise ? empty_like(x0, x0.scalar_type()) : empty({0}, x0.scalar_type(), x0);
  Interpolate a = describe(x0, t, x_t);
  if (return_noise) a.noise = samples_view(noise, "noise", x0);
  a.noise_dtype = a.x0.dtype;
  a.seeded = true;
  a.stream = {bits_of(seed, seed_value, "seed"), bits_of(offset, offset_value, "offset")};
  run(a);
  return {x_t, noise};
}

std::vector<Tensor> interpolate_gradients(const Tensor grad, const Tensor t, int64_t wanted) {
  return scaled_gradients(grad, per_sample(t, "t", grad, 0.f), wanted,
                          [](const ScaledGradient& a, int64_t begin, int64_t end) {
                            interpolate_backward(a, begin, end);
                          });
}

Tensor philox(const Tensor groups, const OptionalTensor seed, int64_t seed_value,
              const OptionalTensor offset, int64_t offset_value) {
  STD_TORCH_CHECK(groups.scalar_type() == ScalarType::Long && groups.dim() == 1 &&
                      (groups.size(0) <= 1 || groups.stride(0) == 1),
                  "groups: need a contiguous int64 tensor [N]");
  const int64_t count = groups.size(0);
  Tensor words = empty({count, 4}, ScalarType::Long, groups);
  const PhiloxStream stream{bits_of(seed, seed_value, "seed"),
                            bits_of(offset, offset_value, "offset")};
  const auto* from = static_cast<const int64_t*>(groups.data_ptr());
  auto* to = static_cast<int64_t*>(words.data_ptr());
  parallel(count, 8,
           [&](int64_t begin, int64_t end) { philox_words(from, stream, to, begin, end); });
  return words;
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("interpolate_forward", TORCH_BOX(&interpolate_forward));
  m.impl("interpolate_seeded", TORCH_BOX(&interpolate_seeded));
  m.impl("interpolate_backward", TORCH_BOX(&interpolate_gradients));
  m.impl("philox", TORCH_BOX(&philox));
}
