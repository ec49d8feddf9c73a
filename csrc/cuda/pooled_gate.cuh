// The pooled-gate cell, "variant (a)": the whole sequence in one launch.
//
// The blocks of a group share an image: each has some tiles of its pixels, with all channels. They meet twice a step,
// once when h (backward: the gradient of the depthwise result) of all pixels is there, and once when the gate vectors,
// of which each block computes a part, are. A group takes one image after the other; images know nothing of each other.
#pragma once

#include "sequence.cuh"

namespace fused_convlstm {

using PooledTile = Tile<64, 64, 4, 1, 4, 3>;

template <class Math> struct PooledGateTraits {
  using T = typename Math::T;
  static constexpr int elements = CHUNK / static_cast<int>(sizeof(T)); // of a chunk
};

// Shared memory of a block, for both directions.
struct PooledGateShared {
  int stages;  // of the resident operand
  int ring;    // offsets in bytes
  int vectors; // 4 * stored channels floats: totals or gates, and a pooled vector
  int scratch; // partial sums of the threads
  int bytes;

  PooledGateShared() = default;
#ifdef __CUDACC__
  __host__ __device__
#endif
  PooledGateShared(int chunks, int elements, int sums) {
    stages = (chunks + CHUNKS_PER_STAGE - 1) / CHUNKS_PER_STAGE;
    ring = stages * PooledTile::stage_bytes_a;
    vectors = ring + PooledTile::stages * PooledTile::stage_bytes_b;
    scratch = vectors + 4 * chunks * elements * static_cast<int>(sizeof(float));
    bytes = scratch + PooledTile::threads * elements * sums * static_cast<int>(sizeof(float));
  }
};

// Which chunks of a pixel's channels a thread works on, and which rows: chunk `lane + pass * width`, rows `row`,
// `row + stride`, ...
struct ChunkWork {
  int width, stride, lane, row, passes;

  FCL_DEVICE explicit ChunkWork(int chunks) {
    const int thread = static_cast<int>(thread_index());
    width = chunks < PooledTile::threads ? chunks : PooledTile::threads;
    stride = PooledTile::threads / width;
    lane = thread % width;
    row = thread / width; // `stride` or more: the thread has no work
    passes = (chunks + width - 1) / width;
  }
};

template <class T> struct alignas(CHUNK) ChunkOf {
  T value[CHUNK / sizeof(T)];
};

// A depthwise convolution at one pixel, one chunk of channels; weight (taps, stored channels).
template <class T, int elements>
FCL_DEVICE void depthwise_at(const Gather &g, const char *frame, const T *weight, int y, int x, int chunk,
                             float (&sum)[elements]) {
#pragma unroll
  for (int k = 0; k < elements; ++k) {
    sum[k] = 0.0f;
  }
  for (int ky = 0; ky < g.kernel_h; ++ky) {
    const int iy = y - g.pad_top + ky * g.dilation_h;
    if (static_cast<unsigned>(iy) >= static_cast<unsigned>(g.height)) {
      continue;
    }
    for (int kx = 0; kx < g.kernel_w; ++kx) {
      const int ix = x - g.pad_left + kx * g.dilation_w;
      if (static_cast<unsigned>(ix) >= static_cast<unsigned>(g.width)) {
        continue;
      }
      const auto from = *reinterpret_cast<const ChunkOf<T> *>(frame + ((iy * g.width + ix) * g.chunks + chunk) * CHUNK);
      const auto w = reinterpret_cast<const ChunkOf<T> *>(weight)[(ky * g.kernel_w + kx) * g.chunks + chunk];
#pragma unroll
      for (int k = 0; k < elements; ++k) {
        sum[k] = fmaf(to_float(w.value[k]), to_float(from.value[k]), sum[k]);
      }
    }
  }
}

// Writes one chunk of a row of the resident operand.
template <class T, int elements>
FCL_DEVICE void store_operand(char *operand, int row, int chunk, const float (&value)[elements]) {
  ChunkOf<T> out;
#pragma unroll
  for (int k = 0; k < elements; ++k) {
    out.value[k] = from_float<T>(value[k]);
  }
  *reinterpret_cast<ChunkOf<T> *>(operand + chunk / CHUNKS_PER_STAGE * PooledTile::stage_bytes_a +
                                  swizzle(row, chunk % CHUNKS_PER_STAGE)) = out;
}

// Zeros in the chunks that fill up the last stage of the operand.
FCL_DEVICE void clear_operand_tail(char *operand, int chunks, int stages) {
  const int tail = stages * CHUNKS_PER_STAGE - chunks;
  for (int k = static_cast<int>(thread_index()); k < tail * PooledTile::rows; k += PooledTile::threads) {
    const int row = k % PooledTile::rows, chunk = chunks + k / PooledTile::rows;
    auto *at = reinterpret_cast<uint32_t *>(operand + chunk / CHUNKS_PER_STAGE * PooledTile::stage_bytes_a +
                                            swizzle(row, chunk % CHUNKS_PER_STAGE));
    at[0] = at[1] = at[2] = at[3] = 0u;
  }
}

// Adds what the threads of each chunk have summed to `totals`, in a fixed order; all threads take part.
template <int elements>
FCL_DEVICE void add_to_totals(const ChunkWork &work, int pass, int chunks, const float (&sum)[elements], float *scratch,
                              float *totals) {
  sync_block();
#pragma unroll
  for (int k = 0; k < elements; ++k) {
    scratch[static_cast<int>(thread_index()) * elements + k] = sum[k];
  }
  sync_block();
  for (int k = static_cast<int>(thread_index()); k < work.width * elements; k += PooledTile::threads) {
    const int channel = pass * work.width * elements + k;
    if (channel < chunks * elements) {
      float total = totals[channel];
      for (int row = 0; row < work.stride; ++row) {
        total += scratch[row * work.width * elements + k];
      }
      totals[channel] = total;
    }
  }
}

// The dot product of two vectors of `count`, by a warp; the result is in every lane.
template <class T> FCL_DEVICE float warp_dot(const T *a, const float *b, int count) {
  float sum = 0.0f;
  for (int k = static_cast<int>(thread_index()) % 32; k < count; k += 32) {
    sum = fmaf(to_float(a[k]), b[k], sum);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    sum += shuffle_xor(sum, mask);
  }
  return sum;
}

// What a block of either direction knows about its place.
struct PooledGateBlock {
  int group, rank, blocks, groups;
  int pixels, tiles;

  FCL_DEVICE PooledGateBlock(const Sequence &s, int blocks_) {
    blocks = blocks_;
    group = static_cast<int>(block_x()) / blocks;
    rank = static_cast<int>(block_x()) % blocks;
    groups = static_cast<int>(grid_x()) / blocks;
    pixels = s.height * s.width;
    tiles = (pixels + PooledTile::rows - 1) / PooledTile::rows;
  }
};

// --- forward ------------------------------------------------------------------------------------------------------

// This block's part of the sum of h over the pixels of an image, into partial (stored channels).
template <class Math>
FCL_DEVICE void pool_rows(const PooledGateForward &p, const PooledGateBlock &block, const char *frame, char *shared,
                          const PooledGateShared &layout, float *partial) {
  using T = typename Math::T;
  constexpr int elements = PooledGateTraits<Math>::elements;
  const int chunks = p.hidden.chunks;
  const ChunkWork work(chunks);
  auto *totals = reinterpret_cast<float *>(shared + layout.vectors);
  sync_block(); // `totals` may still be read
  for (int k = static_cast<int>(thread_index()); k < chunks * elements; k += PooledTile::threads) {
    totals[k] = 0.0f;
  }
  for (int pass = 0; pass < work.passes; ++pass) {
    const int chunk = work.lane + pass * work.width;
    float sum[elements] = {};
    if (frame != nullptr && work.row < work.stride && chunk < chunks) {
      for (int tile = block.rank; tile < block.tiles; tile += block.blocks) {
        for (int row = work.row; row < PooledTile::rows; row += work.stride) {
          const int pixel = tile * PooledTile::rows + row;
          if (pixel < block.pixels) {
            const auto from =
                *reinterpret_cast<const ChunkOf<T> *>(frame + (static_cast<int64_t>(pixel) * chunks + chunk) * CHUNK);
#pragma unroll
            for (int k = 0; k < elements; ++k) {
              sum[k] += to_float(from.value[k]);
            }
          }
        }
      }
    }
    add_to_totals<elements>(work, pass, chunks, sum, reinterpret_cast<float *>(shared + layout.scratch), totals);
  }
  sync_block();
  for (int k = static_cast<int>(thread_index()); k < chunks * elements; k += PooledTile::threads) {
    partial[k] = totals[k];
  }
}

// Gate vectors of a step, this block's part of them, from the pooled h of all blocks.
template <class Math>
FCL_DEVICE void gate_vectors(const PooledGateForward &p, const PooledGateBlock &block, int step, int image,
                             bool with_hidden, const float *partials, int stored_channels, float *pooled,
                             float *gates) {
  using T = typename Math::T;
  const int channels = p.s.channels;
  for (int k = static_cast<int>(thread_index()); k < channels; k += PooledTile::threads) {
    float sum = 0.0f;
    for (int b = 0; with_hidden && b < block.blocks; ++b) {
      sum += partials[b * stored_channels + k];
    }
    pooled[k] = sum / static_cast<float>(block.pixels);
  }
  sync_block();
  const int first = block.rank * 3 * channels / block.blocks, last = (block.rank + 1) * 3 * channels / block.blocks;
  const float *part = p.gate_part + (static_cast<int64_t>(step) * p.s.batch + image) * 3 * channels;
  for (int k = first + static_cast<int>(thread_index()) / 32; k < last; k += PooledTile::threads / 32) {
    const T *row = static_cast<const T *>(p.gate_weight) + static_cast<int64_t>(k) * channels;
    const float z = part[k] + warp_dot(row, pooled, channels);
    if (thread_index() % 32 == 0) {
      gates[k] = gate_to_keep<MathFloat>(gate_of<MathFloat>(z, p.s.gate_activation), z, p.s.gate_activation);
    }
  }
}

// The depthwise convolution of h, one tile of pixels, as the operand of the pointwise one.
template <class Math>
FCL_DEVICE void depthwise_tile(const PooledGateForward &p, const PooledGateBlock &block, const char *frame, int tile,
                               char *operand) {
  using T = typename Math::T;
  constexpr int elements = PooledGateTraits<Math>::elements;
  const int chunks = p.hidden.chunks;
  const ChunkWork work(chunks);
  for (int pass = 0; pass < work.passes; ++pass) {
    const int chunk = work.lane + pass * work.width;
    if (work.row >= work.stride || chunk >= chunks) {
      continue;
    }
    for (int row = work.row; row < PooledTile::rows; row += work.stride) {
      const int pixel = tile * PooledTile::rows + row;
      float sum[elements] = {};
      if (frame != nullptr && pixel < block.pixels) {
        depthwise_at<T, elements>(p.hidden, frame, static_cast<const T *>(p.depthwise), pixel / p.s.width,
                                  pixel % p.s.width, chunk, sum);
      }
      store_operand<T, elements>(operand, row, chunk, sum);
    }
  }
}

// Candidate, c and h of one tile of pixels and channels.
template <class Math>
FCL_DEVICE void pooled_gate_cells(const PooledGateForward &p, const PooledGateBlock &block, int step, int image,
                                  int source, const Accumulators<PooledTile> &acc, const Place<PooledTile> &place,
                                  int tile, int column0, const float *gates) {
  using T = typename Math::T;
  const int channels = p.s.channels;
  const int stored_channels = p.hidden.chunks * PooledGateTraits<Math>::elements;
  const bool aligned = channels % 4 == 0;
  const int64_t image_size = static_cast<int64_t>(block.pixels) * channels;
  const float *before = source >= 0 ? p.c : (source == OUTSIDE ? p.s.c_0 : nullptr);
  T *candidate = static_cast<T *>(p.candidate) + (static_cast<int64_t>(step) * p.s.batch + image) * image_size;
  char *frame = static_cast<char *>(const_cast<void *>(p.hidden.frames)) + step * p.hidden.step_stride +
                image * p.hidden.image_stride;
#pragma unroll
  for (int m = 0; m < PooledTile::fragments_m; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pixel = tile * PooledTile::rows + place.row(m, half);
      if (pixel >= block.pixels) {
        continue;
      }
#pragma unroll
      for (int four = 0; four < PooledTile::warp_columns / 16; ++four) {
        const int channel = column0 + place.warp_column + four / 2 * 32 + 8 * place.quad + 4 * (four % 2);
        if (channel >= stored_channels) {
          continue;
        }
        const int left = channels - channel;
        const int count = left < 0 ? 0 : (left > 4 ? 4 : left);
        const int64_t at = static_cast<int64_t>(pixel) * channels + channel;
        float z[4], part[4], c[4] = {}, h[4];
        channels_of_thread<PooledTile>(acc, m, half, four, z);
        load4(candidate + at, part, count, aligned);
        if (before != nullptr) {
          load4(before + image * image_size + at, c, count, aligned);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          h[k] = 0.0f;
          if (k < count) {
            z[k] = tanh_of<Math>(z[k] + part[k]);
            c[k] = gates[channels + channel + k] * c[k] + gates[channel + k] * z[k];
            h[k] = gates[2 * channels + channel + k] * tanh_of<Math>(c[k]);
          }
        }
        if (p.store_candidate) {
          store4(candidate + at, z, count, aligned);
        }
        store4(p.c + image * image_size + at, c, count, aligned);
        if (p.cells != nullptr) {
          keep_cell<T>(p.s, p.cells, false, step, image * image_size + at, count, c);
        }
        store4(reinterpret_cast<T *>(frame + static_cast<int64_t>(pixel) * p.hidden.chunks * CHUNK) + channel, h, 4,
               true);
      }
    }
  }
}

// A step that is none: zeros for what others may read.
template <class Math>
FCL_DEVICE void pooled_gate_no_step(const PooledGateForward &p, const PooledGateBlock &block, int step, int image) {
  using T = typename Math::T;
  const int64_t image_size = static_cast<int64_t>(block.pixels) * p.s.channels;
  char *frame = static_cast<char *>(const_cast<void *>(p.hidden.frames)) + step * p.hidden.step_stride +
                image * p.hidden.image_stride;
  const int64_t words = static_cast<int64_t>(block.pixels) * p.hidden.chunks * (CHUNK / 4);
  const int first = block.rank * PooledTile::threads + static_cast<int>(thread_index());
  for (int64_t k = first; k < words; k += block.blocks * PooledTile::threads) {
    reinterpret_cast<uint32_t *>(frame)[k] = 0u;
  }
  if (p.cells != nullptr) {
    T *cells = static_cast<T *>(p.cells) + (static_cast<int64_t>(step) * p.s.batch + image) * image_size;
    for (int64_t k = first; k < image_size; k += block.blocks * PooledTile::threads) {
      cells[k] = from_float<T>(0.0f);
    }
  }
}

template <class Math>
FCL_KERNEL(PooledTile::threads, (blocks_per_sm<Math, PooledTile>))
pooled_gate_forward(FCL_PARAMS PooledGateForward p) {
  constexpr int elements = PooledGateTraits<Math>::elements;
  const PooledGateBlock block(p.s, p.blocks);
  const PooledGateShared layout(p.hidden.chunks, elements, 1);
  const int channels = p.s.channels, stored_channels = p.hidden.chunks * elements;
  char *shared = shared_memory();
  auto *vectors = reinterpret_cast<float *>(shared + layout.vectors);
  GroupBarrier barrier(p.counters == nullptr ? nullptr : p.counters + block.group, static_cast<unsigned>(block.blocks));
  const Place<PooledTile> place;
  clear_operand_tail(shared, p.hidden.chunks, layout.stages);
  for (int image = block.group; image < p.s.batch; image += block.groups) {
    float *partials = p.partial + static_cast<int64_t>(image) * block.blocks * stored_channels;
    const char *initial = p.h_0 == nullptr ? nullptr
                                           : static_cast<const char *>(p.h_0) +
                                                 static_cast<int64_t>(image) * block.pixels * p.hidden.chunks * CHUNK;
    pool_rows<Math>(p, block, initial, shared, layout, partials + block.rank * stored_channels);
    barrier.arrive();
    barrier.wait();
    for (int k = 0; k < p.s.steps; ++k) {
      const int step = p.s.reverse ? p.s.steps - 1 - k : k;
      const int source = source_of(p.s, step, image);
      if (source == PAST_END) {
        pooled_gate_no_step<Math>(p, block, step, image);
        continue;
      }
      const char *before =
          source == OUTSIDE ? initial
                            : (source == NOTHING ? nullptr
                                                 : static_cast<const char *>(p.hidden.frames) +
                                                       source * p.hidden.step_stride + image * p.hidden.image_stride);
      float *gates = p.gates + step * p.gates_step_stride + static_cast<int64_t>(image) * 3 * channels;
      gate_vectors<Math>(p, block, step, image, source != NOTHING, partials, stored_channels,
                         vectors + 3 * stored_channels, gates);
      barrier.arrive();
      bool gates_are_there = false;
      for (int tile = block.rank; tile < block.tiles; tile += block.blocks) {
        sync_block(); // the operand of the tile before is no longer read
        depthwise_tile<Math>(p, block, before, tile, shared);
        for (int column0 = 0; column0 < channels; column0 += PooledTile::columns) {
          Accumulators<PooledTile> acc;
          acc.clear();
          multiply_resident<Math, PooledTile>(acc, shared, layout.stages, p.weight, p.columns, column0,
                                              shared + layout.ring, place);
          if (!gates_are_there) {
            barrier.wait();
            for (int j = static_cast<int>(thread_index()); j < 3 * channels; j += PooledTile::threads) {
              vectors[j] = gates[j];
            }
            sync_block();
            gates_are_there = true;
          }
          pooled_gate_cells<Math>(p, block, step, image, source, acc, place, tile, column0, vectors);
        }
      }
      if (!gates_are_there) {
        barrier.wait();
      }
      const char *now =
          static_cast<const char *>(p.hidden.frames) + step * p.hidden.step_stride + image * p.hidden.image_stride;
      pool_rows<Math>(p, block, now, shared, layout, partials + block.rank * stored_channels);
      barrier.arrive();
      barrier.wait();
    }
  }
}

// --- backward -----------------------------------------------------------------------------------------------------

// From the sums of all blocks: the gradient of the gates of step `step` before their activations, and what it gives
// for the pooled h of the step before, this block's part of it.
template <class Math>
FCL_DEVICE void gate_vector_gradients(const PooledGateBackward &p, const PooledGateBlock &block, int step, int image,
                                      const float *partials, int stored_channels, float *dz, float *grad_pooled) {
  using T = typename Math::T;
  const int channels = p.s.channels;
  const int64_t at = (static_cast<int64_t>(step) * p.s.batch + image) * 3 * channels;
  for (int k = static_cast<int>(thread_index()); k < 3 * channels; k += PooledTile::threads) {
    const int gate = k / channels, channel = k % channels;
    float sum = 0.0f;
    for (int b = 0; b < block.blocks; ++b) {
      sum += partials[(b * 3 + gate) * stored_channels + channel];
    }
    dz[k] = sum * gate_slope(p.gates[at + k], p.s.gate_activation);
    if (block.rank == 0) {
      p.grad_gates[at + k] = dz[k];
    }
  }
  sync_block();
  const int first = block.rank * channels / block.blocks, last = (block.rank + 1) * channels / block.blocks;
  for (int k = first + static_cast<int>(thread_index()) / 32; k < last; k += PooledTile::threads / 32) {
    const T *row = static_cast<const T *>(p.gate_weight) + static_cast<int64_t>(k) * 3 * channels;
    const float sum = warp_dot(row, dz, 3 * channels);
    if (thread_index() % 32 == 0) {
      grad_pooled[k] = sum / static_cast<float>(block.pixels);
    }
  }
}

// Gradient of h of one pixel and chunk from the step after it: through the depthwise convolution and the pooling, or
// from outside.
template <class Math, int elements>
FCL_DEVICE void hidden_gradient(const PooledGateBackward &p, int sink, const char *frame, const float *grad_pooled,
                                int image, int pixel, int chunk, int count, float (&dh)[elements]) {
  using T = typename Math::T;
  const int channels = p.s.channels, channel = chunk * elements;
  if (sink >= 0) {
    depthwise_at<T, elements>(p.hidden, frame, static_cast<const T *>(p.depthwise), pixel / p.s.width,
                              pixel % p.s.width, chunk, dh);
#pragma unroll
    for (int k = 0; k < elements; ++k) {
      dh[k] = k < count ? dh[k] + grad_pooled[channel + k] : 0.0f;
    }
  } else if (sink == OUTSIDE && p.grad_h_n != nullptr) {
    const int64_t at = (static_cast<int64_t>(image) * p.s.height * p.s.width + pixel) * channels + channel;
    load_elements<T, elements>(static_cast<const T *>(p.grad_h_n) + at, dh, count, channels % 4 == 0);
  } else {
#pragma unroll
    for (int k = 0; k < elements; ++k) {
      dh[k] = 0.0f;
    }
  }
}

// The cell's backward of one tile of pixels: writes the candidate's gradient, as a result and as the operand of the
// product, and adds to the sums of the gates' gradients (3, stored channels).
template <class Math>
FCL_DEVICE void pooled_gate_cells_backward(const PooledGateBackward &p, const PooledGateBlock &block, int step,
                                           int image, int sink, const char *frame, int tile, char *shared,
                                           const PooledGateShared &layout, const float *grad_pooled, float *totals) {
  using T = typename Math::T;
  constexpr int elements = PooledGateTraits<Math>::elements;
  const int channels = p.s.channels, chunks = p.hidden.chunks;
  const bool aligned = channels % 4 == 0;
  const ChunkWork work(chunks);
  const int source = source_of(p.s, step, image);
  const int64_t image_size = static_cast<int64_t>(block.pixels) * channels;
  const int64_t step_size = p.s.batch * image_size, image_at = image * image_size;
  const float *gates = p.gates + (static_cast<int64_t>(step) * p.s.batch + image) * 3 * channels;
  const T *grad_output = p.grad_output == nullptr
                             ? nullptr
                             : static_cast<const T *>(p.grad_output) + step * p.grad_output_step_stride +
                                   image * p.grad_output_image_stride;
  for (int pass = 0; pass < work.passes; ++pass) {
    const int chunk = work.lane + pass * work.width, channel = chunk * elements;
    const int left = channels - channel;
    const int count = left < 0 ? 0 : (left > elements ? elements : left);
    float sum_i[elements] = {}, sum_f[elements] = {}, sum_o[elements] = {};
    for (int row = work.row; work.row < work.stride && chunk < chunks && row < PooledTile::rows; row += work.stride) {
      const int pixel = tile * PooledTile::rows + row;
      float dz[elements] = {};
      if (pixel < block.pixels) {
        const int64_t at = static_cast<int64_t>(pixel) * channels + channel;
        float dh[elements], part[elements] = {}, c[elements], c_before[elements], g[elements], dc[elements];
        hidden_gradient<Math, elements>(p, sink, frame, grad_pooled, image, pixel, chunk, count, dh);
        if (grad_output != nullptr) {
          load_elements<T, elements>(grad_output + at, part, count, aligned);
        }
        load_cell_before<T, elements>(p.s, p.cells, false, source, image_at + at, count, c_before);
        load_kept_cell<T, elements>(p.s, p.cells, false, step, image_at + at, count, c);
        load_elements<float, elements>(p.grad_c + image_at + at, dc, count, aligned);
        load_elements<T, elements>(static_cast<const T *>(p.candidate) + step * step_size + image_at + at, g, count,
                                   aligned);
#pragma unroll
        for (int k = 0; k < elements; ++k) {
          if (k < count) {
            const float i = gates[channel + k], f = gates[channels + channel + k],
                        o = gates[2 * channels + channel + k];
            const float tanh_c = tanh_of<Math>(c[k]), grad_h = dh[k] + part[k];
            const float grad_c = dc[k] + grad_h * o * (1.0f - tanh_c * tanh_c);
            sum_o[k] += grad_h * tanh_c;
            sum_i[k] += grad_c * g[k];
            sum_f[k] += grad_c * c_before[k];
            dz[k] = grad_c * i * (1.0f - g[k] * g[k]);
            dc[k] = source == NOTHING ? 0.0f : grad_c * f;
          }
        }
        store_elements<float, elements>(p.grad_c + image_at + at, dc, count, aligned);
        store_elements<T, elements>(static_cast<T *>(p.grad_candidate) + step * step_size + image_at + at, dz, count,
                                    aligned);
      }
      store_operand<T, elements>(shared, row, chunk, dz);
    }
    auto *scratch = reinterpret_cast<float *>(shared + layout.scratch);
    const int stored_channels = chunks * elements;
    add_to_totals<elements>(work, pass, chunks, sum_i, scratch, totals);
    add_to_totals<elements>(work, pass, chunks, sum_f, scratch, totals + stored_channels);
    add_to_totals<elements>(work, pass, chunks, sum_o, scratch, totals + 2 * stored_channels);
  }
}

template <class Math>
FCL_DEVICE void pooled_gate_no_step_backward(const PooledGateBackward &p, const PooledGateBlock &block, int step,
                                             int image) {
  using T = typename Math::T;
  const int channels = p.s.channels;
  const int64_t image_size = static_cast<int64_t>(block.pixels) * channels;
  const int first = block.rank * PooledTile::threads + static_cast<int>(thread_index());
  T *grad = static_cast<T *>(p.grad_candidate) + (static_cast<int64_t>(step) * p.s.batch + image) * image_size;
  for (int64_t k = first; k < image_size; k += block.blocks * PooledTile::threads) {
    grad[k] = from_float<T>(0.0f);
  }
  float *gates = p.grad_gates + (static_cast<int64_t>(step) * p.s.batch + image) * 3 * channels;
  for (int k = first; k < 3 * channels; k += block.blocks * PooledTile::threads) {
    gates[k] = 0.0f;
  }
}

template <class Math> FCL_KERNEL(PooledTile::threads, 2) pooled_gate_backward(FCL_PARAMS PooledGateBackward p) {
  using T = typename Math::T;
  constexpr int elements = PooledGateTraits<Math>::elements;
  const PooledGateBlock block(p.s, p.blocks);
  const PooledGateShared layout(p.hidden.chunks, elements, 1);
  const int channels = p.s.channels, chunks = p.hidden.chunks, stored_channels = chunks * elements;
  char *shared = shared_memory();
  auto *vectors = reinterpret_cast<float *>(shared + layout.vectors);
  float *pooled = vectors + 3 * stored_channels;
  GroupBarrier barrier(p.counters == nullptr ? nullptr : p.counters + block.group, static_cast<unsigned>(block.blocks));
  const Place<PooledTile> place;
  clear_operand_tail(shared, chunks, layout.stages);
  for (int image = block.group; image < p.s.batch; image += block.groups) {
    float *partials = p.partial + static_cast<int64_t>(image) * block.blocks * 3 * stored_channels;
    float *grad_pooled = p.grad_pooled + static_cast<int64_t>(image) * channels;
    int computed = -1; // the step whose gradients wait to be passed on
    int parity = 0;    // of the frame that holds them
    for (int k = 0; k <= p.s.steps; ++k) {
      // After the steps, in their reverse order, comes the initial state: step T.
      const int step = k == p.s.steps ? p.s.steps : (p.s.reverse ? k : p.s.steps - 1 - k);
      const int sink = sink_of(p.s, p.sink, step, image);
      if (sink == PAST_END) {
        pooled_gate_no_step_backward<Math>(p, block, step, image);
        continue;
      }
      if (computed >= 0) {
        gate_vector_gradients<Math>(p, block, computed, image, partials, stored_channels, vectors, grad_pooled);
        barrier.arrive();
        barrier.wait();
        for (int j = static_cast<int>(thread_index()); j < channels; j += PooledTile::threads) {
          pooled[j] = grad_pooled[j];
        }
      }
      sync_block();
      const char *frame =
          static_cast<const char *>(p.hidden.frames) + parity * p.hidden.step_stride + image * p.hidden.image_stride;
      if (step == p.s.steps) {
        if (p.grad_h_0 != nullptr) {
          const ChunkWork work(chunks);
          for (int pass = 0; pass < work.passes; ++pass) {
            const int chunk = work.lane + pass * work.width, left = channels - chunk * elements;
            const int count = left < 0 ? 0 : (left > elements ? elements : left);
            for (int tile = block.rank; tile < block.tiles; tile += block.blocks) {
              for (int row = work.row; work.row < work.stride && chunk < chunks && row < PooledTile::rows;
                   row += work.stride) {
                const int pixel = tile * PooledTile::rows + row;
                if (pixel < block.pixels) {
                  float dh[elements];
                  hidden_gradient<Math, elements>(p, sink, frame, pooled, image, pixel, chunk, count, dh);
                  const int64_t at = (static_cast<int64_t>(image) * block.pixels + pixel) * channels + chunk * elements;
                  store_elements<T, elements>(static_cast<T *>(p.grad_h_0) + at, dh, count, channels % 4 == 0);
                }
              }
            }
          }
        }
        sync_block();
        continue;
      }
      parity ^= 1; // the neighbours still read the other frame
      char *result = static_cast<char *>(const_cast<void *>(p.hidden.frames)) + parity * p.hidden.step_stride +
                     image * p.hidden.image_stride;
      for (int j = static_cast<int>(thread_index()); j < 3 * stored_channels; j += PooledTile::threads) {
        vectors[j] = 0.0f;
      }
      for (int tile = block.rank; tile < block.tiles; tile += block.blocks) {
        sync_block(); // the operand of the tile before is no longer read
        pooled_gate_cells_backward<Math>(p, block, step, image, sink, frame, tile, shared, layout, pooled, vectors);
        for (int column0 = 0; column0 < channels; column0 += PooledTile::columns) {
          Accumulators<PooledTile> acc;
          acc.clear();
          multiply_resident<Math, PooledTile>(acc, shared, layout.stages, p.weight, p.columns, column0,
                                              shared + layout.ring, place);
#pragma unroll
          for (int m = 0; m < PooledTile::fragments_m; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int pixel = tile * PooledTile::rows + place.row(m, half);
#pragma unroll
              for (int four = 0; four < PooledTile::warp_columns / 16; ++four) {
                const int channel = column0 + place.warp_column + four / 2 * 32 + 8 * place.quad + 4 * (four % 2);
                if (pixel < block.pixels && channel < stored_channels) {
                  float du[4];
                  channels_of_thread<PooledTile>(acc, m, half, four, du);
                  store4(reinterpret_cast<T *>(result + static_cast<int64_t>(pixel) * chunks * CHUNK) + channel, du, 4,
                         true);
                }
              }
            }
          }
        }
      }
      sync_block();
      for (int j = static_cast<int>(thread_index()); j < 3 * stored_channels; j += PooledTile::threads) {
        partials[block.rank * 3 * stored_channels + j] = vectors[j];
      }
      computed = step;
      barrier.arrive();
      barrier.wait();
    }
  }
}

// --- launches -----------------------------------------------------------------------------------------------------

// One group an image, as many as the device holds at once; counters are needed where there are no clusters.
template <class Params> void launch_pooled_gate(const char *name, void (*kernel)(Params), Params p, int elements) {
  const DeviceGuard guard(p.s.device, name);
  const DeviceFacts facts = device_facts(p.s.device, name);
  const PooledGateShared layout(p.hidden.chunks, elements, 1);
  const int tiles = (p.s.height * p.s.width + PooledTile::rows - 1) / PooledTile::rows;
  const bool clusters = has_clusters(name, kernel, facts);
  const int resident = resident_blocks(name, kernel, PooledTile::threads, static_cast<size_t>(layout.bytes), facts);
  if (resident < 1) {
    throw std::runtime_error(std::string(name) + ": a block does not fit the device");
  }
  int most = clusters ? CLUSTER_BLOCKS : GROUP_BLOCKS;
  most = most < resident ? most : resident;
  p.blocks = tiles < most ? tiles : most;
  int groups = p.s.batch;
  if (clusters) {
    p.counters = nullptr;
  } else {
    groups = groups < resident / p.blocks ? groups : resident / p.blocks;
    fill_zero(p.counters, sizeof(unsigned) * static_cast<size_t>(groups), stream_from_handle(p.s.stream), name);
  }
  Launch l{};
  l.name = name;
  l.grid_x = static_cast<unsigned>(groups * p.blocks);
  l.grid_y = 1;
  l.threads = PooledTile::threads;
  l.shared_bytes = static_cast<size_t>(layout.bytes);
  l.cluster = clusters ? static_cast<unsigned>(p.blocks) : 1;
  l.cooperative = !clusters && p.blocks > 1;
  l.stream = stream_from_handle(p.s.stream);
  launch(l, kernel, p);
}

template <class Math> void PooledGateLaunchers<Math>::forward(const PooledGateForward &p) {
  launch_pooled_gate("pooled_gate_forward", pooled_gate_forward<Math>, p, PooledGateTraits<Math>::elements);
}

template <class Math> void PooledGateLaunchers<Math>::backward(const PooledGateBackward &p) {
  launch_pooled_gate("pooled_gate_backward", pooled_gate_backward<Math>, p, PooledGateTraits<Math>::elements);
}

template <class Math> int PooledGateLaunchers<Math>::device_shared_bytes(int device) {
  const DeviceGuard guard(device, "pooled_gate_forward");
  code_version("pooled_gate_forward", pooled_gate_forward<Math>);
  return device_facts(device, "pooled_gate_forward").shared_bytes_per_block;
}

template <class Math> int64_t PooledGateLaunchers<Math>::shared_bytes(int channels) {
  constexpr int elements = PooledGateTraits<Math>::elements;
  return PooledGateShared((channels + elements - 1) / elements, elements, 1).bytes;
}

} // namespace fused_convlstm
