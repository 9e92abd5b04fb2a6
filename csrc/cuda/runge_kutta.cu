// Fills the table of stages and launches: combinations, and errors with their norm in two stages.
#include "runge_kutta_launch.cuh"

namespace flowkernels::cuda {
namespace {

template <typename T, int N>
void launch_combine(const StageList& stages, const View& y, const View& out, cudaStream_t stream) {
  const int64_t packs = (stages.elements + N - 1) / N;
  const int threads = threads_for(packs);
  const dim3 blocks(static_cast<unsigned>((packs + threads - 1) / threads),
                    static_cast<unsigned>(std::min<int64_t>(stages.batch, 65535)));
  rk_combine_kernel<T, N><<<blocks, threads, 0, stream>>>(table_of<Compute<T>>(stages),
                                                          operand_of(y), operand_of(out));
}

template <typename T, int N>
void launch_error(const StageList& stages, const ErrorTerms& terms, double* partial, void* norm,
                  cudaStream_t stream) {
  using C = Compute<T>;
  const int64_t chunks = chunks_of(stages.elements);
  const int threads = threads_for_chunk(stages.elements, N);
  const unsigned blocks = static_cast<unsigned>(stages.batch * chunks);
  rk_error_kernel<T, N><<<blocks, threads, 0, stream>>>(
      table_of<C>(stages), operand_of(terms.y0), operand_of(terms.y1), operand_of(terms.error),
      tolerances_of<C>(terms), static_cast<int32_t>(chunks), partial, norm);
}

void launch_norm(bool is_double, const double* partial, int64_t norms, int64_t each, double count,
                 void* norm, cudaStream_t stream) {
  const int threads = static_cast<int>(std::clamp<int64_t>((each + 31) / 32 * 32, 32, 1024));
  const unsigned blocks = static_cast<unsigned>(norms);
  if (is_double)
    rk_norm_kernel<double><<<blocks, threads, 0, stream>>>(partial, each, count, norm);
  else
    rk_norm_kernel<float><<<blocks, threads, 0, stream>>>(partial, each, count, norm);
}

}  // namespace

cudaError_t rk_combine(const StageList& stages, const View& y, const View& out,
                       cudaStream_t stream) {
  if (stages.batch * stages.elements == 0) return cudaSuccess;
  const Operands operands(stages, {&y, &out});
  operands.with_type([&](auto type) {
    using T = typename decltype(type)::type;
    operands.packed<T>() ? launch_combine<T, kLanes<T>>(stages, y, out, stream)
                         : launch_combine<T, 1>(stages, y, out, stream);
  });
  return cudaGetLastError();
}

int64_t error_chunks(const StageList& stages) { return stages.batch * chunks_of(stages.elements); }

cudaError_t rk_error(const StageList& stages, const ErrorTerms& terms, bool per_sample,
                     double* partial, void* norm, cudaStream_t stream) {
  const int64_t norms = per_sample ? stages.batch : 1;
  if (norms == 0) return cudaSuccess;
  const int64_t total = stages.batch * stages.elements, each = error_chunks(stages) / norms;
  double* sums = each == 1 ? nullptr : partial;
  if (total > 0) {
    const Operands operands(stages, {&terms.y0, &terms.y1, &terms.error});
    operands.with_type([&](auto type) {
      using T = typename decltype(type)::type;
      operands.packed<T>() ? launch_error<T, kLanes<T>>(stages, terms, sums, norm, stream)
                           : launch_error<T, 1>(stages, terms, sums, norm, stream);
    });
  }
  if (each != 1)
    launch_norm(stages.is_double, partial, norms, each, static_cast<double>(total / norms), norm,
                stream);
  return cudaGetLastError();
}

}  // namespace flowkernels::cuda
