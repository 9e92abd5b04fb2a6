#include "bellman.h"

namespace flowkernels {

BellmanTable::BellmanTable(const double* cost, int64_t n, int64_t budget, double discount)
    : n_(n), value_(budget * (n + 1)), next_(budget * (n + 1)) {
  for (int64_t j = 0; j < n; ++j) {
    value_[index(1, j)] = cost[j * (n + 1) + n];
    next_[index(1, j)] = static_cast<int32_t>(n);
  }
  for (int64_t b = 2; b <= budget; ++b) {
    const double* rest = &value_[index(b - 1, 0)];
    for (int64_t j = 0; j <= n - b; ++j) {
      const double* row = cost + j * (n + 1);
      int64_t best = j + 1;
      double least = row[best] + discount * rest[best];
      for (int64_t m = j + 2; m <= n - b + 1; ++m) {
        const double through = row[m] + discount * rest[m];
        if (through < least) {  // not <=: ties go to the lowest index
          least = through;
          best = m;
        }
      }
      value_[index(b, j)] = least;
      next_[index(b, j)] = static_cast<int32_t>(best);
    }
  }
}

std::vector<int64_t> BellmanTable::path(int64_t jumps) const {
  std::vector<int64_t> stops{0};
  for (int64_t b = jumps; b >= 1; --b) stops.push_back(next_[index(b, stops.back())]);
  return stops;
}

}  // namespace flowkernels
