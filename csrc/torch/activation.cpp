// flowkernels::gelu_tanh_*, swiglu_* on CPU. x has one to three dimensions.
#include "../cpu/activation.h"

#include "../cpu/modulate.h"
#include "common.h"

namespace flowkernels {
namespace {

constexpr int64_t kBiasRowsPerChunk = 32;  // fixed: results do not depend on threads

// [..., columns] seen as [batch, rows, columns].
View rows_view(const Tensor& x, const char* name) {
  View view = view_of(x, name);
  if (x.dim() == 2) {  // view_of reads [B, D]; here the leading dimension is rows
    view.row_stride = view.batch_stride;
    view.batch_stride = 0;
  }
  return view;
}

Activation describe(const Tensor& x, int64_t columns) {
  Activation a{};
  a.batch = x.dim() == 3 ? x.size(0) : 1;
  a.rows = x.dim() >= 2 ? x.size(x.dim() - 2) : 1;
  a.columns = columns;
  a.x = rows_view(x, "x");
  return a;
}

Tensor output_like(const Tensor& x, int64_t columns, ScalarType dtype) {
  std::vector<int64_t> size(x.dim());
  for (int64_t i = 0; i < x.dim(); ++i) size[i] = x.size(i);
  size.back() = columns;
  return empty(size, dtype, x);
}

Tensor gelu_tanh_forward_cpu(const Tensor x, const OptionalTensor bias) {
  Activation a = describe(x, x.size(x.dim() - 1));
  Tensor y = output_like(x, a.columns, promote(x.scalar_type(), bias));
  a.bias = view_of(bias, "bias");
  a.out = rows_view(y, "y");
  parallel(a.batch * a.rows, a.columns,
           [&](int64_t begin, int64_t end) { gelu_tanh_forward(a, begin, end); });
  return y;
}

std::vector<Tensor> gelu_tanh_backward_cpu(const Tensor grad, const Tensor x,
                                           const OptionalTensor bias, int64_t wanted) {
  Activation a = describe(x, x.size(x.dim() - 1));
  std::vector<Tensor> results;
  a.grad = rows_view(grad, "grad");
  a.bias = view_of(bias, "bias");
  a.rows_per_chunk = kBiasRowsPerChunk;
  if (wanted & 1) {
    results.push_back(output_like(x, a.columns, x.scalar_type()));
    a.out = rows_view(results.back(), "grad_x");
  }
  const int64_t chunks = chunks_per_batch(a.batch * a.rows, a.rows_per_chunk);
  OptionalTensor partial;
  if (wanted & 2) {
    partial = empty({chunks, a.columns}, ScalarType::Float, x);
    a.partial_bias = reinterpret_cast<float*>(data(*partial));
  }
  parallel(chunks, a.rows_per_chunk * a.columns,
           [&](int64_t begin, int64_t end) { gelu_tanh_backward(a, begin, end); });
  if (partial) {
    results.push_back(empty_like(*bias, bias->scalar_type()));
    const ReducePartials reduce{a.partial_bias,
                                1,
                                chunks,
                                a.columns,
                                false,
                                false,
                                data(results.back()),
                                dtype_of(results.back(), "grad_bias")};
    reduce_partials(reduce, 0, 1);
  }
  return results;
}

Tensor swiglu_forward_cpu(const Tensor x) {
  Activation a = describe(x, x.size(x.dim() - 1) / 2);
  Tensor y = output_like(x, a.columns, x.scalar_type());
  a.out = rows_view(y, "y");
  parallel(a.batch * a.rows, 2 * a.columns,
           [&](int64_t begin, int64_t end) { swiglu_forward(a, begin, end); });
  return y;
}

Tensor swiglu_backward_cpu(const Tensor grad, const Tensor x) {
  Activation a = describe(x, x.size(x.dim() - 1) / 2);
  Tensor grad_x = output_like(x, 2 * a.columns, x.scalar_type());
  a.grad = rows_view(grad, "grad");
  a.out = rows_view(grad_x, "grad_x");
  parallel(a.batch * a.rows, 2 * a.columns,
           [&](int64_t begin, int64_t end) { swiglu_backward(a, begin, end); });
  return grad_x;
}

}  // namespace
}  // namespace flowkernels

STABLE_TORCH_LIBRARY_IMPL(flowkernels, CPU, m) {
  using namespace flowkernels;
  m.impl("gelu_tanh_forward", TORCH_BOX(&gelu_tanh_forward_cpu));
  m.impl("gelu_tanh_backward", TORCH_BOX(&gelu_tanh_backward_cpu));
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward_cpu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward_cpu));
}
