// Launches of what lies between two steps of an adaptive solver: one to decide, one to go on.
#include "runge_kutta_launch.cuh"
#include "step_control_kernels.cuh"

namespace flowkernels::cuda {
namespace {

template <typename T, int N>
void launch_control(const StageList& stages, const ErrorTerms& terms, const StepControl& control,
                    double* partial, unsigned* tickets, cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t chunks = chunks_of(stages.elements), all = error_chunks(stages);
  const int threads = threads_for_chunk(stages.elements, N);
  const unsigned blocks = static_cast<unsigned>(all);
  const double count = static_cast<double>(stages.batch * stages.elements / control.columns);
  rk_control_kernel<T, N><<<blocks, threads, 0, stream>>>(
      table_of<C>(stages), operand_of(terms.y0), operand_of(terms.y1), tolerances_of<C>(terms),
      static_cast<int32_t>(chunks), all / control.columns, count, partial, tickets, control);
}

template <typename T, int N>
void launch_begin(const StepBegin& a, cudaStream_t stream) {
  const int64_t packs = (a.elements + N - 1) / N;
  const int threads = threads_for(packs);
  const dim3 blocks(static_cast<unsigned>((packs + threads - 1) / threads),
                    static_cast<unsigned>(std::min<int64_t>(a.batch, 65535)));
  rk_begin_kernel<T, N><<<blocks, threads, 0, stream>>>(a);
}

template <typename T>
void begin_as(const StepBegin& a, cudaStream_t stream) {
  uintptr_t addresses = 0;
  for (const void* data : {a.y0, a.y1, a.first, a.last})
    addresses |= reinterpret_cast<uintptr_t>(data);
  for (const void* data : {a.y, a.slope, a.at}) addresses |= reinterpret_cast<uintptr_t>(data);
  const bool packed = addresses % 16 == 0 && (a.batch == 1 || a.elements % kLanes<T> == 0);
  packed ? launch_begin<T, kLanes<T>>(a, stream) : launch_begin<T, 1>(a, stream);
}

}  // namespace

cudaError_t rk_control(const StageList& stages, const ErrorTerms& terms, const StepControl& control,
                       double* partial, unsigned* tickets, cudaStream_t stream) {
  const Operands operands(stages, {&terms.y0, &terms.y1});
  operands.with_type([&](auto type) {
    using T = typename decltype(type)::type;
    operands.packed<T>()
        ? launch_control<T, kLanes<T>>(stages, terms, control, partial, tickets, stream)
        : launch_control<T, 1>(stages, terms, control, partial, tickets, stream);
  });
  return cudaGetLastError();
}

cudaError_t rk_begin(const StepBegin& a, cudaStream_t stream) {
  if (a.batch * a.elements == 0) return cudaSuccess;
  if (a.is_double) {
    begin_as<double>(a, stream);
  } else {
    switch (a.dtype) {
      case DType::float32:
        begin_as<float>(a, stream);
        break;
      case DType::bfloat16:
        begin_as<__nv_bfloat16>(a, stream);
        break;
      case DType::float16:
        begin_as<__half>(a, stream);
        break;
    }
  }
  return cudaGetLastError();
}

}  // namespace flowkernels::cuda
