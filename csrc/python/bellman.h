// Shortest paths over the grid of a schedule, for every number of jumps at once.
#pragma once

#include <cstdint>
#include <vector>

namespace flowkernels {

// V_1(j) = c(j, n),  V_b(j) = min over m, j < m <= n - b + 1, of c(j, m) + discount V_{b-1}(m).
class BellmanTable {
 public:
  // `cost` is [n + 1, n + 1], row-major; entries (j, k) with k > j are read. n >= 1, and
  // 1 <= budget <= n. Budgets up to `budget` are served.
  BellmanTable(const double* cost, int64_t n, int64_t budget, double discount);

  // V_jumps(0).
  double value(int64_t jumps) const { return value_[index(jumps, 0)]; }

  // The best path of exactly `jumps` jumps: jumps + 1 grid indices from 0 to n. Of equal paths the
  // one whose next stop is lowest, at each stop.
  std::vector<int64_t> path(int64_t jumps) const;

 private:
  int64_t index(int64_t jumps, int64_t j) const { return (jumps - 1) * (n_ + 1) + j; }

  int64_t n_;
  std::vector<double> value_;  // [budget, n + 1]
  std::vector<int32_t> next_;  // likewise: the stop after j
};

}  // namespace flowkernels
