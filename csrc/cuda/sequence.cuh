// What the cells have in common: which step follows on which, and which columns of a product a thread has.
#pragma once

#include "product.cuh"

namespace fused_convlstm {

constexpr int CLUSTER_BLOCKS = 8; // the largest size that every device with clusters takes

FCL_DEVICE int source_of(const Sequence &s, int step, int image) {
  if (s.source != nullptr) {
    return s.source[static_cast<int64_t>(step) * s.batch + image];
  }
  const int before = s.reverse ? step + 1 : step - 1;
  return before >= 0 && before < s.steps ? before : OUTSIDE;
}

FCL_DEVICE int sink_of(const Sequence &s, const int *sink, int step, int image) {
  if (sink != nullptr) {
    return sink[static_cast<int64_t>(step) * s.batch + image];
  }
  if (step == s.steps) {
    return s.reverse ? s.steps - 1 : 0;
  }
  const int after = s.reverse ? step - 1 : step + 1;
  return after >= 0 && after < s.steps ? after : OUTSIDE;
}

// c after a step, as it was kept: neighbouring channels, the first one element `at` of a frame. exact: as float,
// because peepholes read it.
template <class T, int elements>
FCL_DEVICE void load_kept_cell(const Sequence &s, const void *cells, bool exact, int step, int64_t at, int count,
                               float (&c)[elements]) {
  const bool aligned = s.channels % 4 == 0;
  const int64_t first = step * (static_cast<int64_t>(s.batch) * s.height * s.width * s.channels) + at;
  if (exact) {
    load_elements<float, elements>(static_cast<const float *>(cells) + first, c, count, aligned);
  } else {
    load_elements<T, elements>(static_cast<const T *>(cells) + first, c, count, aligned);
  }
}

// c as a step finds it.
template <class T, int elements>
FCL_DEVICE void load_cell_before(const Sequence &s, const void *cells, bool exact, int source, int64_t at, int count,
                                 float (&c)[elements]) {
  if (source >= 0) {
    load_kept_cell<T, elements>(s, cells, exact, source, at, count, c);
  } else if (source == OUTSIDE && s.c_0 != nullptr) {
    load_elements<float, elements>(s.c_0 + at, c, count, s.channels % 4 == 0);
  } else {
#pragma unroll
    for (int k = 0; k < elements; ++k) {
      c[k] = 0.0f;
    }
  }
}

template <class T>
FCL_DEVICE void keep_cell(const Sequence &s, void *cells, bool exact, int step, int64_t at, int count,
                          const float (&c)[4]) {
  const bool aligned = s.channels % 4 == 0;
  const int64_t first = step * (static_cast<int64_t>(s.batch) * s.height * s.width * s.channels) + at;
  if (exact) {
    store4(static_cast<float *>(cells) + first, c, count, aligned);
  } else {
    store4(static_cast<T *>(cells) + first, c, count, aligned);
  }
}

// Of every 32 columns, fragments 0 to 3 of quad q hold channels 8 * q to 8 * q + 7.
template <class Tile>
FCL_DEVICE void channels_of_thread(const Accumulators<Tile> &acc, int m, int half, int four, float (&dh)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    dh[k] = acc.value[m][2 * four + k / 2][2 * half + k % 2];
  }
}

} // namespace fused_convlstm
