// Huge pages under large results.
//
// A result of tens of megabytes is fresh memory at each call: the allocator has given the last one
// back. Its first touch is a fault every 4 KB, which costs more than the arithmetic of any kernel
// here: three float32 gradients of 16 MB take 28 ms, 23 of them in faults. With 2 MB pages, where
// the system allows them on request (its default), the same call takes 11 ms.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace flowkernels {

// Advice only: it changes no content, and a refusal is of no consequence.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{2} << 20;
  if (bytes < 2 * kHugePage) return;
  const auto first = reinterpret_cast<uintptr_t>(data), page = uintptr_t{4096};
  const uintptr_t begin = (first + page - 1) / page * page;
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace flowkernels
