// flowkernels::short_attention_* on CPU.
#include "../cpu/attention.h"
#include "common.h"

namespace flowkernels {
namespace {

HeadView view(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.size(0) == like.size(0) &&
                      tensor.size(2) == like.size(2) && tensor.size(3) == like.size(3),
                  name, ": need [B, S, H, E]");
  STD_TORCH_CHECK(tensor.size(3) <= 1 || tensor.stride(3) == 1, name,
                  ": need a unit stride in the last dimension");
  return {data(tensor), dtype_of(tensor, name), tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

Attention describe(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& lengths,
                   double scale) {
  Attention a{};
  a.batch = q.size(0);
  a.heads = q.size(2);
  a.rows = q.size(1);
  a.keys = k.size(1);
  a.head_dim = q.size(3);
  a.scale = static_cast<float>(scale);
  a.q = view(q, q, "q");
  a.k = view(k, q, "k");
  a.v = view(v, q, "v");
  STD_TORCH_CHECK(v.size(1) == a.keys, "v: need as many rows as k");
  if (lengths) {
    STD_TORCH_CHECK(lengths->dim() == 1 && lengths->size(0) == a.batch &&
                        lengths->scalar_type() == ScalarType::Int && lengths->stride(0) == 1,
                    "lengths: need contiguous int32 [B]");
    a.lengths = static_cast<const int32_t*>(lengths->data_ptr());
  }
  return a;
}

int64_t elements_per_head(const Attention& a) {
  return a.rows * a.keys + (a.rows + 2 * a.keys) * a.head_dim;
}

std::tuple<Tensor, Tensor> short_attention_forward(const Tensor q, const Tensor k, const Tensor v,
                                                   const OptionalTensor lengths, double scale) {
  Attention a = describe(q, k, v, lengths, scale);
  Tensor out = empty_like(q, q.scalar_type());
  Tensor lse = empty({a.batch, a.heads, a.rows}, ScalarType::Float, q);
  a.out = view(out, q, "out");
  a.lse = static_cast<float*>(lse.data_ptr());
  parallel(a.batch * a.heads, elements_per_head(a),
           [&](int64_t begin, int64_t end) { attention_forward(a, begin, end); });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> short_attention_backward(const Tensor grad_out, const Tensor q,
                                                            const Tensor k, const Tensor v,
                                                            const OptionalTensor lengths,
                                                            double scale) {
  Attention a = describe(q, k, v, lengths, scale);
  Tensor grad_q = empty_like(q, q.scalar_type());
  Tensor grad_k = empty_like(k, k.scalar_type()), grad_v = empty_like(v, v.scalar_type());
  STD_TORCH_CHECK(grad_out.dim() == 4 && grad_out.size(1) == a.rows, "grad_out: need q's rows");
  a.grad_out = view(grad_out, q, "grad_out");
  a.grad_q = view(grad_q, q, "grad_q");
  a.grad_k = view(grad_k, q, "grad_k");
  a.grad_v = view(grad_v, q, "grad_v");
  parallel(a.batch * a.heads, 2 * elements_per_head(a),
           [&](int64_t begin, int64_t end) { attention_backward(a, begin, end); });
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("short_attention_forward", TORCH_BOX(&short_attention_forward));
  m.impl("short_attention_backward", TORCH_BOX(&short_attention_backward));
}
