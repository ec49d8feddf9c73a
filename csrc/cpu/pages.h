// Large arrays in large pages: the first touch of a fresh 4 KiB page costs as much as some arithmetic on it.
#pragma once

#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_convlstm {

// A hint; without effect where the system has no such pages.
static inline void prefer_large_pages(void *begin, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kPage - 1) & ~(kPage - 1), last = (address + bytes) & ~(kPage - 1);
  if (last > first)
    madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

} // namespace fused_convlstm
