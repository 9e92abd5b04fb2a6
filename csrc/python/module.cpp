// flowkernels._C: host-only routines. No torch header: this module loads with any torch, or none.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bellman.h"

namespace {

using Costs = pybind11::array_t<double, pybind11::array::c_style | pybind11::array::forcecast>;
using Path = std::pair<double, std::vector<int64_t>>;

// For each budget, the least total cost and the grid indices of its path; one table serves all.
std::vector<Path> bellman_paths(const Costs& cost, const std::vector<int64_t>& budgets,
                                double discount) {
  if (cost.ndim() != 2 || cost.shape(0) != cost.shape(1) || cost.shape(0) < 2)
    throw std::invalid_argument("cost: need a square matrix of at least two rows");
  const int64_t n = cost.shape(0) - 1;
  int64_t most = 1;
  for (const int64_t budget : budgets) {
    if (budget < 1 || budget > n)
      throw std::invalid_argument("budgets: need numbers from 1 to the grid's steps");
    most = std::max(most, budget);
  }
  pybind11::gil_scoped_release release;
  const flowkernels::BellmanTable table(cost.data(), n, most, discount);
  std::vector<Path> found;
  for (const int64_t budget : budgets) found.emplace_back(table.value(budget), table.path(budget));
  return found;
}

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
  m.def("bellman_paths", &bellman_paths, pybind11::arg("cost"), pybind11::arg("budgets"),
        pybind11::arg("discount"),
        "(total cost, grid indices) of the best path of exactly K jumps, for each K of budgets.");
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
