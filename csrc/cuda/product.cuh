// The product at the core of every kernel: rows are pixels, gathered from frames around them (implicit GEMM), columns
// are packed weights. A block computes a tile of rows x columns, a warp a part of it, in fragments of 16 x 8.
#pragma once

#include "math.cuh"
#include "params.h"

namespace fused_convlstm {

constexpr int CHUNK = 16;           // bytes
constexpr int CHUNKS_PER_STAGE = 4; // of K, in each row and column of a stage

template <int rows_, int columns_, int warps_m_, int warps_n_, int stages_, int blocks_per_sm_> struct Tile {
  static constexpr int rows = rows_, columns = columns_;
  static constexpr int warps_m = warps_m_, warps_n = warps_n_;
  static constexpr int stages = stages_;
  static constexpr int blocks_per_sm = blocks_per_sm_;
  static constexpr int threads = 32 * warps_m * warps_n;
  static constexpr int warp_rows = rows / warps_m, warp_columns = columns / warps_n;
  static constexpr int fragments_m = warp_rows / 16, fragments_n = warp_columns / 8;
  static constexpr int stage_bytes_a = rows * CHUNKS_PER_STAGE * CHUNK;
  static constexpr int stage_bytes_b = columns * CHUNKS_PER_STAGE * CHUNK;
  static constexpr int stage_bytes = stage_bytes_a + stage_bytes_b;
  static constexpr int shared_bytes = stages * stage_bytes;
  static_assert(warp_rows % 16 == 0 && warp_columns % 64 == 0, "a thread owns the gates of whole channels");
  static_assert(rows * CHUNKS_PER_STAGE % threads == 0 && columns * CHUNKS_PER_STAGE % threads == 0);
};

using LargeTile = Tile<128, 128, 4, 2, 4, 2>;
using SmallTile = Tile<64, 64, 4, 1, 4, 4>;

// Blocks that are to share a multiprocessor. Without tensor cores a thread holds more operands at once: with twice the
// registers none is spilled.
template <class Math, class Tile>
constexpr int blocks_per_sm = Math::tensor_cores ? Tile::blocks_per_sm : (Tile::blocks_per_sm + 1) / 2;

// Where chunk `chunk` of row `row` lies in a stage: the eight rows of an ldmatrix, and eight neighbouring writes, fall
// into different banks.
FCL_DEVICE int swizzle(int row, int chunk) { return (row * CHUNKS_PER_STAGE + (chunk ^ ((row >> 1) & 3))) * CHUNK; }

// The place of a thread in the fragments of its warp.
template <class Tile> struct Place {
  int warp_row, warp_column; // of the warp's part in the tile
  int group, quad;           // rows group and group + 8 of a fragment, columns 2 * quad and 2 * quad + 1

  FCL_DEVICE Place() {
    const int thread = static_cast<int>(thread_index());
    const int warp = thread / 32, lane = thread % 32;
    warp_row = warp / Tile::warps_n * Tile::warp_rows;
    warp_column = warp % Tile::warps_n * Tile::warp_columns;
    group = lane / 4;
    quad = lane % 4;
  }

  // Row in the tile of accumulators [m][..][2 * half ..].
  FCL_DEVICE int row(int m, int half) const { return warp_row + 16 * m + 8 * half + group; }
};

template <class Tile> struct Accumulators {
  float value[Tile::fragments_m][Tile::fragments_n][4];

  FCL_DEVICE void clear() {
#pragma unroll
    for (auto &row : value) {
#pragma unroll
      for (auto &fragment : row) {
        fragment[0] = fragment[1] = fragment[2] = fragment[3] = 0.0f;
      }
    }
  }
};

// Issues the copies of stage `k` of the packed weights, from the column that `weight` points to.
template <class Tile>
FCL_DEVICE void load_weight_stage(char *stage_b, const char *weight, int64_t weight_stride, int k) {
  constexpr int copies = Tile::columns * CHUNKS_PER_STAGE / Tile::threads;
#pragma unroll
  for (int j = 0; j < copies; ++j) {
    const int place = static_cast<int>(thread_index()) + j * Tile::threads;
    const int column = place % Tile::columns, part = place / Tile::columns;
    copy_async_16(stage_b + swizzle(column, part),
                  weight + (k * CHUNKS_PER_STAGE + part) * weight_stride + column * CHUNK, true);
  }
}

// Reads both operands into the stages. `Frames` tells where the frame of an image is for the first or second product:
// frame(which, image) is its address, or null where it counts as zero.
template <class Tile, class Frames> class Loader {
public:
  FCL_DEVICE Loader(const Frames &frames, const Gather &first, const Gather &second, const void *weight, int columns,
                    int row0, int column0, int row_count, int frame_height, int frame_width)
      : frames_(frames), first_(first), second_(second),
        weight_(static_cast<const char *>(weight) + static_cast<int64_t>(column0) * CHUNK),
        weight_stride_(static_cast<int64_t>(columns) * CHUNK), row0_(row0), row_count_(row_count),
        height_(frame_height), width_(frame_width), first_stages_(stages_of(first)),
        stages_(first_stages_ + stages_of(second)) {}

  FCL_DEVICE int stages() const { return stages_; }
  FCL_DEVICE int first_stages() const { return first_stages_; } // of them, those of the first frames

  // Issues the copies of stage `k` of the frames; called for k = 0, 1, ... in turn.
  FCL_DEVICE void load_frames(int k, char *stage) {
    if (k == 0 && first_stages_ > 0) {
      begin(0, first_);
    } else if (k == first_stages_) {
      begin(1, second_);
    }
    const Gather &gather = k < first_stages_ ? first_ : second_;
    const int thread = static_cast<int>(thread_index());
    const int chunk = thread % CHUNKS_PER_STAGE;
    const int dy = kernel_y_ * gather.dilation_h, dx = kernel_x_ * gather.dilation_w;
#pragma unroll
    for (int j = 0; j < copies_a; ++j) {
      const int row = thread / CHUNKS_PER_STAGE + j * (Tile::threads / CHUNKS_PER_STAGE);
      const int y = y_[j] + dy, x = x_[j] + dx;
      const bool valid = frame_[j] != nullptr && kernel_y_ < gather.kernel_h &&
                         static_cast<unsigned>(y) < static_cast<unsigned>(gather.height) &&
                         static_cast<unsigned>(x) < static_cast<unsigned>(gather.width);
      // A frame is smaller than 2 GiB; where nothing is read, the address still has to be one.
      const char *address = valid ? frame_[j] + ((y * gather.width + x) * gather.chunks + chunk_) * CHUNK : weight_;
      copy_async_16(stage + swizzle(row, chunk), address, valid);
    }
    advance(gather);
  }

  // Those of the weights.
  FCL_DEVICE void load_weight(int k, char *stage_b) const {
    load_weight_stage<Tile>(stage_b, weight_, weight_stride_, k);
  }

private:
  static constexpr int copies_a = Tile::rows * CHUNKS_PER_STAGE / Tile::threads;
  static FCL_DEVICE int stages_of(const Gather &g) {
    if (g.frames == nullptr) {
      return 0;
    }
    return (g.kernel_h * g.kernel_w * g.chunks + CHUNKS_PER_STAGE - 1) / CHUNKS_PER_STAGE;
  }

  FCL_DEVICE void begin(int which, const Gather &gather) {
    const int thread = static_cast<int>(thread_index());
    const int pixels = height_ * width_;
#pragma unroll
    for (int j = 0; j < copies_a; ++j) {
      const int row = row0_ + thread / CHUNKS_PER_STAGE + j * (Tile::threads / CHUNKS_PER_STAGE);
      frame_[j] = nullptr;
      y_[j] = x_[j] = 0;
      if (row < row_count_) {
        const int image = row / pixels, pixel = row - image * pixels;
        const int y = pixel / width_, x = pixel - y * width_;
        frame_[j] = static_cast<const char *>(frames_.frame(which, image));
        y_[j] = y * gather.stride_h - gather.pad_top;
        x_[j] = x * gather.stride_w - gather.pad_left;
      }
    }
    kernel_y_ = kernel_x_ = 0;
    chunk_ = thread % CHUNKS_PER_STAGE;
    normalise(gather);
  }

  FCL_DEVICE void advance(const Gather &gather) {
    chunk_ += CHUNKS_PER_STAGE;
    normalise(gather);
  }

  FCL_DEVICE void normalise(const Gather &gather) { // chunks are counted over the taps of the kernel
    while (chunk_ >= gather.chunks) {
      chunk_ -= gather.chunks;
      if (++kernel_x_ == gather.kernel_w) {
        kernel_x_ = 0;
        ++kernel_y_;
      }
    }
  }

  const Frames &frames_;
  const Gather &first_;
  const Gather &second_;
  const char *weight_;
  int64_t weight_stride_;
  int row0_, row_count_, height_, width_, first_stages_, stages_;
  const char *frame_[copies_a];
  int y_[copies_a], x_[copies_a];
  int kernel_y_ = 0, kernel_x_ = 0, chunk_ = 0;
};

// Multiplies one stage into the accumulators.
template <class Math, class Tile>
FCL_DEVICE void multiply_stage(Accumulators<Tile> &acc, const char *stage_a, const char *stage_b,
                               const Place<Tile> &place) {
  if constexpr (Math::tensor_cores) {
    const int lane = static_cast<int>(thread_index()) % 32;
#pragma unroll
    for (int k = 0; k < CHUNKS_PER_STAGE; k += 2) {
      uint32_t a[Tile::fragments_m][4];
#pragma unroll
      for (int m = 0; m < Tile::fragments_m; ++m) {
        load_matrix_x4(a[m], stage_a + swizzle(place.warp_row + 16 * m + lane % 16, k + lane / 16));
        Math::round_operand(a[m]);
      }
#pragma unroll
      for (int n = 0; n < Tile::fragments_n; n += 2) {
        uint32_t b[4];
        load_matrix_x4(b, stage_b + swizzle(place.warp_column + 8 * n + lane / 16 * 8 + lane % 8, k + lane / 8 % 2));
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < Tile::fragments_m; ++m) {
          Math::multiply(acc.value[m][n], a[m], b0);
          Math::multiply(acc.value[m][n + 1], a[m], b1);
        }
      }
    }
  } else {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS_PER_STAGE; ++chunk) {
      Four<float> a[Tile::fragments_m][2];
#pragma unroll
      for (int m = 0; m < Tile::fragments_m; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[m][half] = *reinterpret_cast<const Four<float> *>(stage_a + swizzle(place.row(m, half), chunk));
        }
      }
#pragma unroll
      for (int n = 0; n < Tile::fragments_n; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Four<float> b = *reinterpret_cast<const Four<float> *>(
              stage_b + swizzle(place.warp_column + 8 * n + 2 * place.quad + e, chunk));
#pragma unroll
          for (int m = 0; m < Tile::fragments_m; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              // A sum of its own every four products: less rounding than one long chain.
              float sum = a[m][half].value[0] * b.value[0];
#pragma unroll
              for (int k = 1; k < 4; ++k) {
                sum = fmaf(a[m][half].value[k], b.value[k], sum);
              }
              acc.value[m][n][2 * half + e] += sum;
            }
          }
        }
      }
    }
  }
}

// Weights of a block that stay in shared memory from step to step: the first `stages` stages of them.
struct ResidentWeight {
  char *memory = nullptr;
  int stages = 0;
  bool filled = false;
};

struct Nothing {
  FCL_DEVICE void operator()(int) const {}
};

// The whole product of a tile, the copies `Tile::stages - 1` stages ahead of the arithmetic. All threads of the block
// call before_copy(k) before the copies of stage k.
template <class Math, class Tile, class Frames, class BeforeCopy = Nothing>
FCL_DEVICE void multiply_tile(Accumulators<Tile> &acc, Loader<Tile, Frames> &loader, char *shared,
                              const Place<Tile> &place, const ResidentWeight &resident = {},
                              const BeforeCopy &before_copy = {}) {
  const int stages = loader.stages();
  const auto load = [&](int k) {
    before_copy(k);
    char *stage = shared + k % Tile::stages * Tile::stage_bytes;
    loader.load_frames(k, stage);
    if (k >= resident.stages) {
      loader.load_weight(k, stage + Tile::stage_bytes_a);
    } else if (!resident.filled) {
      loader.load_weight(k, resident.memory + k * Tile::stage_bytes_b);
    }
  };
#pragma unroll
  for (int k = 0; k < Tile::stages - 1; ++k) {
    if (k < stages) {
      load(k);
    }
    copy_async_commit();
  }
  for (int k = 0; k < stages; ++k) {
    copy_async_wait<Tile::stages - 2>();
    sync_block(); // stage k is there for all, and all are done with stage k - 1
    if (k + Tile::stages - 1 < stages) {
      load(k + Tile::stages - 1);
    }
    copy_async_commit();
    const char *stage = shared + k % Tile::stages * Tile::stage_bytes;
    multiply_stage<Math, Tile>(
        acc, stage, k < resident.stages ? resident.memory + k * Tile::stage_bytes_b : stage + Tile::stage_bytes_a,
        place);
  }
  copy_async_wait<0>();
}

// The same where the left operand stands in shared memory already, `stages` stages of it, and the weights alone are
// copied, through a ring of Tile::stages stages.
template <class Math, class Tile>
FCL_DEVICE void multiply_resident(Accumulators<Tile> &acc, const char *operand, int stages, const void *weight,
                                  int columns, int column0, char *ring, const Place<Tile> &place) {
  const char *from = static_cast<const char *>(weight) + static_cast<int64_t>(column0) * CHUNK;
  const int64_t stride = static_cast<int64_t>(columns) * CHUNK;
  sync_block(); // the operand is there, and nobody reads the ring any more
#pragma unroll
  for (int k = 0; k < Tile::stages - 1; ++k) {
    if (k < stages) {
      load_weight_stage<Tile>(ring + k * Tile::stage_bytes_b, from, stride, k);
    }
    copy_async_commit();
  }
  for (int k = 0; k < stages; ++k) {
    copy_async_wait<Tile::stages - 2>();
    sync_block();
    const int next = k + Tile::stages - 1;
    if (next < stages) {
      load_weight_stage<Tile>(ring + next % Tile::stages * Tile::stage_bytes_b, from, stride, next);
    }
    copy_async_commit();
    multiply_stage<Math, Tile>(acc, operand + k * Tile::stage_bytes_a, ring + k % Tile::stages * Tile::stage_bytes_b,
                               place);
  }
  copy_async_wait<0>();
}

} // namespace fused_convlstm
