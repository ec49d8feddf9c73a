// Threads: the OpenMP team of the caller's choice, and how work is divided among it.
#pragma once

#include <cstdint>
#include <omp.h>

namespace fused_convlstm {

struct Range {
  int64_t begin, end;
};

// Part `index` of `count` nearly equal, contiguous parts of 0 .. total.
static inline Range part_of(int64_t total, int index, int count) {
  return {total * index / count, total * (index + 1) / count};
}

// Runs body(thread, threads) on each thread of a team. The body may use `#pragma omp barrier`.
template <class Body> static inline void run_team(int threads, const Body &body) {
#pragma omp parallel num_threads(threads)
  body(omp_get_thread_num(), omp_get_num_threads());
}

} // namespace fused_convlstm
