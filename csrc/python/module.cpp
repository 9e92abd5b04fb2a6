// flowkernels._C: host-only routines. No torch header: this module loads with any torch, or none.
#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string best_instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host-only native routines of flowkernels.";
  m.def("instruction_set", &best_instruction_set,
        "The instruction set whose clone of the CPU kernels this machine runs.");
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = __VERSION__;
        info["cxx_standard"] = static_cast<long>(__cplusplus);
        return info;
      },
      "Compiler and language standard of the native build.");
}
