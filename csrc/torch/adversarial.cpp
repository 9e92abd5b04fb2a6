// flowkernels::gan_*, gradient_penalty_* on CPU.
#include "../cpu/adversarial.h"

#include "loss_items.h"

namespace flowkernels {
namespace {

// `x` as [batch, elements]; as one sample where it is contiguous, so that many small samples do
// not cost an item each.
PointwiseSum describe(Pointwise function, const Tensor& x, const char* name) {
  PointwiseSum a{};
  a.function = function;
  a.x = samples_view(x, name, x);
  const bool whole = x.is_contiguous();
  const int64_t batch = whole ? 1 : batch_of(x);
  const int64_t elements = whole ? x.numel() : elements_of(x);
  a.extent = {batch, elements, chunks_of(elements), Reduction::sum};
  return a;
}

double sum_of(PointwiseSum& a) {
  std::vector<double> partial(items_of(a.extent));
  a.partial = partial.data();
  parallel(items_of(a.extent), elements_per_item(a.extent),
           [&](int64_t begin, int64_t end) { pointwise_sum(a, begin, end); });
  double total = 0.0;
  for (const double each : partial) total += each;
  return total;
}

double mean_scale(const Tensor& x) { return 1.0 / static_cast<double>(x.numel()); }

double penalty_scale(const Tensor& x, double gamma) {
  return 0.5 * gamma / static_cast<double>(batch_of(x));
}

Tensor scalar(double value, const Tensor& like) {
  Tensor result = empty({}, ScalarType::Float, like);
  *float_data(result) = static_cast<float>(value);
  return result;
}

float grad_output_of(const Tensor& grad_output) {
  STD_TORCH_CHECK(grad_output.dim() == 0, "grad_output: need 0-d");
  return value_of(per_sample(grad_output, "grad_output", grad_output, 1.f), 0);
}

// Empty gradients of the operands whose bit is set.
std::vector<Tensor> new_gradients(int64_t wanted, const Tensor& first,
                                  const OptionalTensor& second = std::nullopt) {
  std::vector<Tensor> gradients;
  if (wanted & 1) gradients.push_back(empty_like(first, first.scalar_type()));
  if (second && wanted & 2) gradients.push_back(empty_like(*second, second->scalar_type()));
  return gradients;
}

View gradient_view(const Tensor& gradient, const Tensor& like) {
  STD_TORCH_CHECK(gradient.scalar_type() == like.scalar_type() && gradient.is_contiguous(),
                  "gradients: need contiguous ones of the operand's dtype");
  return samples_view(gradient, "gradient", like);
}

// The mean of softplus(-real) and of softplus(fake), and the gradients whose bit is set.
double gan(const Tensor& real, const OptionalTensor& fake, int64_t wanted, float grad_output,
           const std::vector<Tensor>& gradients) {
  auto next = gradients.begin();
  const auto term = [&](Pointwise function, const Tensor& logits, const char* name, bool wants) {
    PointwiseSum a = describe(function, logits, name);
    if (wants) {
      STD_TORCH_CHECK(next != gradients.end(), "gradients: fewer than are wanted");
      a.grad = gradient_view(*next++, logits);
    }
    a.factor = static_cast<float>(mean_scale(logits)) * grad_output;
    return sum_of(a) * mean_scale(logits);
  };
  double loss = term(Pointwise::softplus_minus, real, "real", wanted & 1);
  if (fake) loss += term(Pointwise::softplus_plus, *fake, "fake", wanted & 2);
  return loss;
}

std::vector<Tensor> gan_forward(const Tensor real, const OptionalTensor fake, int64_t wanted) {
  std::vector<Tensor> gradients = new_gradients(wanted, real, fake);
  const double loss = gan(real, fake, wanted, 1.f, gradients);
  return listed({scalar(loss, real)}, gradients);
}

std::vector<Tensor> gan_backward(const Tensor grad_output, const Tensor real,
                                 const OptionalTensor fake, int64_t wanted) {
  std::vector<Tensor> gradients = new_gradients(wanted, real, fake);
  gan(real, fake, wanted, grad_output_of(grad_output), gradients);
  return gradients;
}

void gan_rescale(const std::vector<Tensor> gradients, const Tensor grad_output, const Tensor real,
                 const OptionalTensor fake, int64_t wanted) {
  const float factor = grad_output_of(grad_output);
  if (factor != 1.f) gan(real, fake, wanted, factor, gradients);
}

// gamma/2 of the mean over samples of x²'s sum, and its gradient where there is a place for it.
double penalty(const Tensor& x, double gamma, float grad_output, const Tensor* gradient) {
  PointwiseSum a = describe(Pointwise::square, x, "x");
  if (gradient) a.grad = gradient_view(*gradient, x);
  a.factor = static_cast<float>(penalty_scale(x, gamma)) * grad_output;
  return sum_of(a) * penalty_scale(x, gamma);
}

std::vector<Tensor> gradient_penalty_forward(const Tensor x, double gamma, int64_t wanted) {
  std::vector<Tensor> gradients = new_gradients(wanted, x);
  const double loss = penalty(x, gamma, 1.f, wanted & 1 ? &gradients.front() : nullptr);
  return listed({scalar(loss, x)}, gradients);
}

Tensor gradient_penalty_backward(const Tensor grad_output, const Tensor x, double gamma) {
  Tensor gradient = empty_like(x, x.scalar_type());
  penalty(x, gamma, grad_output_of(grad_output), &gradient);
  return gradient;
}

void gradient_penalty_rescale(const Tensor gradient, const Tensor grad_output, const Tensor x,
                              double gamma) {
  const float factor = grad_output_of(grad_output);
  if (factor != 1.f) penalty(x, gamma, factor, &gradient);
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("gan_forward", TORCH_BOX(&gan_forward));
  m.impl("gan_backward", TORCH_BOX(&gan_backward));
  m.impl("gan_rescale_", TORCH_BOX(&gan_rescale));
  m.impl("gradient_penalty_forward", TORCH_BOX(&gradient_penalty_forward));
  m.impl("gradient_penalty_backward", TORCH_BOX(&gradient_penalty_backward));
  m.impl("gradient_penalty_rescale_", TORCH_BOX(&gradient_penalty_rescale));
}
