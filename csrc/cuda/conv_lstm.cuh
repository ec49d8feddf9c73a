// ConvLSTM, one launch a step: the recurrent convolution as a product, the cell in its epilogue.
#pragma once

#include "sequence.cuh"

namespace fused_convlstm {

// --- forward ------------------------------------------------------------------------------------------------------

// Frames of the forward products: first the input, second h of the step before.
struct ForwardFrames {
  const ConvLSTMForward &p;
  int first_step; // of the images that are counted through

  FCL_DEVICE const void *frame(int which, int image) const {
    const int step = first_step + image / p.s.batch, b = image % p.s.batch;
    if (which == 0) {
      return static_cast<const char *>(p.input.frames) + step * p.input.step_stride + b * p.input.image_stride;
    }
    const int source = source_of(p.s, step, b);
    if (source >= 0) {
      return static_cast<const char *>(p.hidden.frames) + source * p.hidden.step_stride + b * p.hidden.image_stride;
    }
    if (source == OUTSIDE && p.h_0 != nullptr) {
      return static_cast<const char *>(p.h_0) +
             static_cast<int64_t>(b) * p.s.height * p.s.width * p.hidden.chunks * CHUNK;
    }
    return nullptr;
  }
};

// What the epilogue needs of one pixel.
struct ForwardPixel {
  int step, image, pixel;
  int source;
  int64_t place; // of the pixel in (B, Ho, Wo)

  FCL_DEVICE ForwardPixel(const ConvLSTMForward &p, int first_step, int row) {
    const int pixels = p.s.height * p.s.width;
    const int frame = row / pixels;
    pixel = row - frame * pixels;
    step = first_step + frame / p.s.batch;
    image = frame % p.s.batch;
    source = source_of(p.s, step, image);
    place = static_cast<int64_t>(image) * pixels + pixel;
  }
};

// The cell of four neighbouring channels of a pixel: c is updated, h returned. z[k][gate] are the products on entry.
template <class Math>
FCL_DEVICE void forward_cell(const ConvLSTMForward &p, const ForwardPixel &at, int channel, int count, float (&z)[4][4],
                             float (&c)[4], float (&h)[4]) {
  using T = typename Math::T;
  const int channels = p.s.channels;
  const int64_t pixels = static_cast<int64_t>(p.s.batch) * p.s.height * p.s.width;
  T *gates = p.gates == nullptr ? nullptr
                                : static_cast<T *>(p.gates) +
                                      (((at.step - p.gates_first) * pixels + at.place) * channels + channel) * 4;
  const T *bias = static_cast<const T *>(p.bias);
  const T *peephole = static_cast<const T *>(p.s.peephole);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    h[k] = 0.0f;
    if (k >= count) {
      continue;
    }
    if (p.input.frames == nullptr) {
      float part[4];
      load4(gates + 4 * k, part, 4, true);
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        z[k][gate] += part[gate];
      }
    } else if (bias != nullptr) {
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        z[k][gate] += to_float(bias[gate * channels + channel + k]);
      }
    }
    const float before = c[k];
    if (peephole != nullptr) {
      z[k][0] += to_float(peephole[channel + k]) * before;
      z[k][1] += to_float(peephole[channels + channel + k]) * before;
    }
    const float i = gate_of<Math>(z[k][0], p.s.gate_activation);
    const float f = gate_of<Math>(z[k][1], p.s.gate_activation);
    const float g = tanh_of<Math>(z[k][2]);
    c[k] = f * before + i * g;
    if (peephole != nullptr) {
      z[k][3] += to_float(peephole[2 * channels + channel + k]) * c[k];
    }
    const float o = gate_of<Math>(z[k][3], p.s.gate_activation);
    h[k] = o * tanh_of<Math>(c[k]);
    if (p.store_gates) {
      const float keep[4] = {gate_to_keep<Math>(i, z[k][0], p.s.gate_activation),
                             gate_to_keep<Math>(f, z[k][1], p.s.gate_activation), g,
                             gate_to_keep<Math>(o, z[k][3], p.s.gate_activation)};
      store4(gates + 4 * k, keep, 4, true);
    }
  }
}

// c of the step before, four channels of a pixel.
template <class T>
FCL_DEVICE void load_cell(const ConvLSTMForward &p, const ForwardPixel &at, int channel, int count, float (&c)[4]) {
  const int64_t place = at.place * p.s.channels + channel;
  if (at.source >= 0 && p.c != nullptr) {
    load4(p.c + place, c, count, p.s.channels % 4 == 0);
  } else {
    load_cell_before<T, 4>(p.s, p.cells, p.s.peephole != nullptr, at.source, place, count, c);
  }
}

template <class Math>
FCL_DEVICE void store_hidden(const ConvLSTMForward &p, const ForwardPixel &at, int channel, const float (&h)[4]) {
  using T = typename Math::T;
  char *frame = static_cast<char *>(const_cast<void *>(p.hidden.frames)) + at.step * p.hidden.step_stride +
                at.image * p.hidden.image_stride;
  store4(reinterpret_cast<T *>(frame + static_cast<int64_t>(at.pixel) * p.hidden.chunks * CHUNK) + channel, h, 4, true);
}

FCL_DEVICE void store_cell(const ConvLSTMForward &p, const ForwardPixel &at, int channel, int count,
                           const float (&c)[4]) {
  store4(p.c + at.place * p.s.channels + channel, c, count, p.s.channels % 4 == 0);
}

// Of every 64 columns, fragment 2 * j + e of quad q holds gates 2 * e and 2 * e + 1 of channel 4 * q + j of sixteen, so
// that a thread has all gates of four neighbouring channels. (The weights are packed in this order.)
template <class Tile>
FCL_DEVICE void gates_of_thread(const Accumulators<Tile> &acc, int m, int half, int sixteen, float (&z)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
#pragma unroll
    for (int gate = 0; gate < 4; ++gate) {
      z[j][gate] = acc.value[m][8 * sixteen + 2 * j + gate / 2][2 * half + gate % 2];
    }
  }
}

template <class Math, class Tile>
FCL_KERNEL(Tile::threads, (blocks_per_sm<Math, Tile>))
conv_lstm_forward_step(FCL_PARAMS ConvLSTMForward p) {
  using T = typename Math::T;
  const int tiles_n = p.columns / Tile::columns;
  const int row0 = static_cast<int>(block_x()) / tiles_n * Tile::rows;
  const int column0 = static_cast<int>(block_x()) % tiles_n * Tile::columns;
  const int rows = p.parallel_steps * p.s.batch * p.s.height * p.s.width;
  const Place<Tile> place;
  Accumulators<Tile> acc;
  acc.clear();
  const ForwardFrames frames{p, p.step};
  Loader<Tile, ForwardFrames> loader(frames, p.input, p.hidden, p.weight, p.columns, row0, column0, rows, p.s.height,
                                     p.s.width);
  multiply_tile<Math, Tile>(acc, loader, shared_memory(), place);

  const int stored_channels = p.hidden.chunks * (CHUNK / static_cast<int>(sizeof(T)));
#pragma unroll
  for (int m = 0; m < Tile::fragments_m; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + place.row(m, half);
      if (row >= rows) {
        continue;
      }
      const ForwardPixel at(p, p.step, row);
#pragma unroll
      for (int sixteen = 0; sixteen < Tile::warp_columns / 64; ++sixteen) {
        const int channel = (column0 + place.warp_column) / 4 + 16 * sixteen + 4 * place.quad;
        const int left = p.s.channels - channel;
        const int count = left < 0 ? 0 : (left > 4 ? 4 : left);
        if (channel >= stored_channels) {
          continue;
        }
        float c[4] = {}, h[4] = {};
        if (at.source != PAST_END) {
          float z[4][4];
          gates_of_thread<Tile>(acc, m, half, sixteen, z);
          load_cell<T>(p, at, channel, count, c);
          forward_cell<Math>(p, at, channel, count, z, c, h);
        }
        if (p.c != nullptr) {
          store_hidden<Math>(p, at, channel, h);
          if (at.source != PAST_END) {
            store_cell(p, at, channel, count, c);
          }
          if (p.cells != nullptr) {
            keep_cell<T>(p.s, p.cells, p.s.peephole != nullptr, at.step, at.place * p.s.channels + channel, count, c);
          }
        }
      }
    }
  }
}

// --- backward -----------------------------------------------------------------------------------------------------

// Frames of the backward product: the gradient of the gates of the step after.
struct BackwardFrames {
  const ConvLSTMBackward &p;
  int step;

  FCL_DEVICE const void *frame(int, int image) const {
    const int sink = sink_of(p.s, p.sink, step, image);
    return sink < 0 ? nullptr
                    : static_cast<const char *>(p.grad.frames) + (sink - p.grad_first) * p.grad.step_stride +
                          image * p.grad.image_stride;
  }
};

// The cell's backward, four channels of a pixel. dh: gradient of h of this step; dc: on entry that of c but for what
// comes through h, on exit that of c of the step before. dz[k][gate]: gradient before the activations.
template <class Math>
FCL_DEVICE void backward_cell(const ConvLSTMBackward &p, int step, int64_t place, int channel, int count,
                              const float (&dh)[4], const float (&c_before)[4], const float (&c)[4], float (&dc)[4],
                              float (&dz)[4][4]) {
  using T = typename Math::T;
  const int channels = p.s.channels;
  const int64_t pixels = static_cast<int64_t>(p.s.batch) * p.s.height * p.s.width;
  const T *gates =
      static_cast<const T *>(p.gates) + (((step - p.gates_first) * pixels + place) * channels + channel) * 4;
  const T *peephole = static_cast<const T *>(p.s.peephole);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    dz[k][0] = dz[k][1] = dz[k][2] = dz[k][3] = 0.0f;
    if (k >= count) {
      continue;
    }
    float gate[4]; // i, f, g, o
    load4(gates + 4 * k, gate, 4, true);
    const float tanh_c = tanh_of<Math>(c[k]);
    dz[k][3] = dh[k] * tanh_c * gate_slope(gate[3], p.s.gate_activation);
    float grad = dc[k] + dh[k] * gate[3] * (1.0f - tanh_c * tanh_c);
    if (peephole != nullptr) {
      grad += dz[k][3] * to_float(peephole[2 * channels + channel + k]);
    }
    dz[k][0] = grad * gate[2] * gate_slope(gate[0], p.s.gate_activation);
    dz[k][1] = grad * c_before[k] * gate_slope(gate[1], p.s.gate_activation);
    dz[k][2] = grad * gate[0] * (1.0f - gate[2] * gate[2]);
    dc[k] = grad * gate[1];
    if (peephole != nullptr) {
      dc[k] += dz[k][0] * to_float(peephole[channel + k]) + dz[k][1] * to_float(peephole[channels + channel + k]);
    }
  }
}

template <class Math>
FCL_DEVICE void store_gate_gradients(const ConvLSTMBackward &p, int step, int image, int pixel, int channel,
                                     const float (&dz)[4][4]) {
  using T = typename Math::T;
  // A pixel's chunks hold a whole number of channels: 8 / 4 or 4 / 4 of them.
  const int stored_channels = p.grad.chunks * (CHUNK / static_cast<int>(sizeof(T))) / 4;
  char *frame = static_cast<char *>(const_cast<void *>(p.grad.frames)) + (step - p.grad_first) * p.grad.step_stride +
                image * p.grad.image_stride;
  T *at = reinterpret_cast<T *>(frame + static_cast<int64_t>(pixel) * p.grad.chunks * CHUNK) + 4 * channel;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (channel + k < stored_channels) {
      store4(at + 4 * k, dz[k], 4, true);
    }
  }
}

// Four channels of a pixel of the backward pass: dh is the product on entry.
template <class Math>
FCL_DEVICE void backward_four(const ConvLSTMBackward &p, int step, int image, int pixel, int channel, float (&dh)[4]) {
  using T = typename Math::T;
  const int channels = p.s.channels;
  const int left = channels - channel;
  const int count = left < 0 ? 0 : (left > 4 ? 4 : left);
  const bool aligned = channels % 4 == 0;
  const int64_t pixels = static_cast<int64_t>(p.s.height) * p.s.width;
  const int64_t place = image * pixels + pixel;
  const int64_t at = place * channels + channel;
  const int sink = sink_of(p.s, p.sink, step, image);
  float dz[4][4] = {};
  if (sink != PAST_END) {
    float part[4];
    if (sink == OUTSIDE && p.grad_h_n != nullptr) {
      load4(static_cast<const T *>(p.grad_h_n) + at, part, count, aligned);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        dh[k] += part[k];
      }
    }
    if (step == p.s.steps) {
      store4(static_cast<T *>(p.grad_h_0) + at, dh, count, aligned);
      return;
    }
    if (p.grad_output != nullptr) {
      load4(static_cast<const T *>(p.grad_output) + (step - p.grad_output_first) * p.grad_output_step_stride +
                image * p.grad_output_image_stride + static_cast<int64_t>(pixel) * channels + channel,
            part, count, aligned);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        dh[k] += part[k];
      }
    }
    const int source = source_of(p.s, step, image);
    float c[4], c_before[4], dc[4];
    const bool exact = p.s.peephole != nullptr;
    load_kept_cell<T, 4>(p.s, p.cells, exact, step, at, count, c);
    load_cell_before<T, 4>(p.s, p.cells, exact, source, at, count, c_before);
    load4(p.grad_c + at, dc, count, aligned);
    backward_cell<Math>(p, step, place, channel, count, dh, c_before, c, dc, dz);
    if (source == NOTHING) {
      dc[0] = dc[1] = dc[2] = dc[3] = 0.0f;
    }
    store4(p.grad_c + at, dc, count, aligned);
  }
  store_gate_gradients<Math>(p, step, image, pixel, channel, dz);
}

template <class Math, class Tile>
FCL_KERNEL(Tile::threads, (blocks_per_sm<Math, Tile>))
conv_lstm_backward_step(FCL_PARAMS ConvLSTMBackward p) {
  const int tiles_n = p.columns / Tile::columns;
  const int row0 = static_cast<int>(block_x()) / tiles_n * Tile::rows;
  const int column0 = static_cast<int>(block_x()) % tiles_n * Tile::columns;
  const int pixels = p.s.height * p.s.width;
  const int rows = p.s.batch * pixels;
  const Place<Tile> place;
  Accumulators<Tile> acc;
  acc.clear();
  // Without a table, no image of the last step gets anything from a step after it.
  if (p.sink != nullptr || sink_of(p.s, p.sink, p.step, 0) >= 0) {
    const BackwardFrames frames{p, p.step};
    const Gather none{};
    Loader<Tile, BackwardFrames> loader(frames, none, p.grad, p.weight, p.columns, row0, column0, rows, p.s.height,
                                        p.s.width);
    multiply_tile<Math, Tile>(acc, loader, shared_memory(), place);
  }
#pragma unroll
  for (int m = 0; m < Tile::fragments_m; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + place.row(m, half);
      if (row >= rows) {
        continue;
      }
      const int image = row / pixels, pixel = row - image * pixels;
#pragma unroll
      for (int four = 0; four < Tile::warp_columns / 16; ++four) {
        const int channel = column0 + place.warp_column + four / 2 * 32 + 8 * place.quad + 4 * (four % 2);
        if (channel >= p.s.channels + (p.s.channels & 1)) {
          continue;
        }
        float dh[4];
        channels_of_thread<Tile>(acc, m, half, four, dh);
        backward_four<Math>(p, p.step, image, pixel, channel, dh);
      }
    }
  }
}

// --- small maps ---------------------------------------------------------------------------------------------------
//
// All steps in one launch. A group of blocks has a few images, whole: each block some of their pixels and of the
// channels. The blocks of a group meet after every step; groups know nothing of each other. A block keeps as much of
// its weights as fits in shared memory, and (forward) c of its pixels and channels in registers.

using PersistentTile = Tile<64, 64, 4, 1, 4, 2>;

// A block's place: its group, and its tile of the images that the group has at a time.
struct GroupPlace {
  int group, groups, row_tile, column0;

  FCL_DEVICE GroupPlace(const Group &g, int columns) {
    const int column_tiles = columns / PersistentTile::columns;
    const int rank = static_cast<int>(block_x()) % g.blocks;
    group = static_cast<int>(block_x()) / g.blocks;
    groups = static_cast<int>(grid_x()) / g.blocks;
    row_tile = rank / column_tiles;
    column0 = rank % column_tiles * PersistentTile::columns;
  }
};

template <class Math>
FCL_KERNEL(PersistentTile::threads, PersistentTile::blocks_per_sm)
conv_lstm_forward_sequence(FCL_PARAMS ConvLSTMForward p) {
  using T = typename Math::T;
  using Tile = PersistentTile;
  static_assert(Tile::warp_columns == 64);
  const GroupPlace mine(p.group, p.columns);
  GroupBarrier barrier(p.group.counters == nullptr ? nullptr : p.group.counters + mine.group,
                       static_cast<unsigned>(p.group.blocks));
  const Place<Tile> place;
  char *shared = shared_memory();
  ResidentWeight resident{shared + Tile::shared_bytes, p.group.resident_stages, false};
  const int pixels = p.s.height * p.s.width;
  const int stored_channels = p.hidden.chunks * (CHUNK / static_cast<int>(sizeof(T)));
  const int channel = (mine.column0 + place.warp_column) / 4 + 4 * place.quad, left = p.s.channels - channel;
  const int count = left < 0 ? 0 : (left > 4 ? 4 : left);
  const bool aligned = p.s.channels % 4 == 0;
  bool others_are_awaited = false; // h of the step before is not known to be there yet
  for (int first = mine.group * p.group.images; first < p.s.batch; first += mine.groups * p.group.images) {
    const int row0 = first * pixels + mine.row_tile * Tile::rows;
    const int last = first + p.group.images;
    const int rows = (last < p.s.batch ? last : p.s.batch) * pixels;
    float cell[Tile::fragments_m][2][4];
#pragma unroll
    for (int m = 0; m < Tile::fragments_m; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + place.row(m, half);
        cell[m][half][0] = cell[m][half][1] = cell[m][half][2] = cell[m][half][3] = 0.0f;
        if (p.s.c_0 != nullptr && row < rows && count > 0) {
          load4(p.s.c_0 + static_cast<int64_t>(row) * p.s.channels + channel, cell[m][half], count, aligned);
        }
      }
    }
    for (int k = 0; k < p.s.steps; ++k) {
      const int step = p.s.reverse ? p.s.steps - 1 - k : k;
      Accumulators<Tile> acc;
      acc.clear();
      const ForwardFrames frames{p, step};
      Loader<Tile, ForwardFrames> loader(frames, p.input, p.hidden, p.weight, p.columns, row0, mine.column0, rows,
                                         p.s.height, p.s.width);
      // The product with the input needs nothing of the other blocks: it hides the meeting.
      const auto meet = [&](int stage) {
        if (others_are_awaited && stage == loader.first_stages()) {
          barrier.wait();
          others_are_awaited = false;
        }
      };
      multiply_tile<Math, Tile>(acc, loader, shared, place, resident, meet);
      resident.filled = true;
#pragma unroll
      for (int m = 0; m < Tile::fragments_m; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + place.row(m, half);
          if (row >= rows || channel >= stored_channels) {
            continue;
          }
          const ForwardPixel at(p, step, row);
          float (&c)[4] = cell[m][half];
          float h[4] = {};
          if (at.source != PAST_END) {
            if (at.source == NOTHING) {
              c[0] = c[1] = c[2] = c[3] = 0.0f;
            }
            float z[4][4];
            gates_of_thread<Tile>(acc, m, half, 0, z);
            forward_cell<Math>(p, at, channel, count, z, c, h);
          }
          store_hidden<Math>(p, at, channel, h);
          if (k == p.s.steps - 1) {
            store_cell(p, at, channel, count, c);
          }
          if (p.cells != nullptr) {
            keep_cell<T>(p.s, p.cells, p.s.peephole != nullptr, step, at.place * p.s.channels + channel, count, c);
          }
        }
      }
      barrier.arrive();
      others_are_awaited = true;
      sync_block(); // nobody reads the stages of this step any more
    }
  }
  if (others_are_awaited) {
    barrier.wait();
  }
}

template <class Math>
FCL_KERNEL(PersistentTile::threads, PersistentTile::blocks_per_sm)
conv_lstm_backward_sequence(FCL_PARAMS ConvLSTMBackward p) {
  using Tile = PersistentTile;
  const GroupPlace mine(p.group, p.columns);
  GroupBarrier barrier(p.group.counters == nullptr ? nullptr : p.group.counters + mine.group,
                       static_cast<unsigned>(p.group.blocks));
  const Place<Tile> place;
  char *shared = shared_memory();
  ResidentWeight resident{shared + Tile::shared_bytes, p.group.resident_stages, false};
  const int pixels = p.s.height * p.s.width;
  for (int first = mine.group * p.group.images; first < p.s.batch; first += mine.groups * p.group.images) {
    const int row0 = first * pixels + mine.row_tile * Tile::rows;
    const int last = first + p.group.images;
    const int rows = (last < p.s.batch ? last : p.s.batch) * pixels;
    for (int k = 0; k < p.step_count; ++k) {
      const int step = p.s.reverse ? p.step + k : p.step + p.step_count - 1 - k;
      Accumulators<Tile> acc;
      acc.clear();
      if (p.sink != nullptr || sink_of(p.s, p.sink, step, first) >= 0) {
        const BackwardFrames frames{p, step};
        const Gather none{};
        Loader<Tile, BackwardFrames> loader(frames, none, p.grad, p.weight, p.columns, row0, mine.column0, rows,
                                            p.s.height, p.s.width);
        multiply_tile<Math, Tile>(acc, loader, shared, place, resident);
        resident.filled = true;
      }
#pragma unroll
      for (int m = 0; m < Tile::fragments_m; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + place.row(m, half);
          if (row >= rows) {
            continue;
          }
          const int image = row / pixels, pixel = row - image * pixels;
#pragma unroll
          for (int four = 0; four < Tile::warp_columns / 16; ++four) {
            const int channel = mine.column0 + place.warp_column + four / 2 * 32 + 8 * place.quad + 4 * (four % 2);
            if (channel < p.s.channels + (p.s.channels & 1)) {
              float dh[4];
              channels_of_thread<Tile>(acc, m, half, four, dh);
              backward_four<Math>(p, step, image, pixel, channel, dh);
            }
          }
        }
      }
      barrier.arrive();
      barrier.wait();
    }
  }
}

// --- launches -----------------------------------------------------------------------------------------------------

// The larger tile reads less for the same arithmetic, the smaller one fills more of the device.
inline bool use_large_tile(int chosen, int64_t rows, int columns, const DeviceFacts &facts) {
  if (chosen != 0) {
    return chosen == 2;
  }
  if (columns % LargeTile::columns != 0) {
    return false;
  }
  const int64_t blocks = (rows + LargeTile::rows - 1) / LargeTile::rows * (columns / LargeTile::columns);
  return blocks >= facts.multiprocessors;
}

template <class Tile, class Params>
void launch_step(const char *name, void (*kernel)(Params), const Params &p, int64_t rows) {
  Launch l{};
  l.name = name;
  l.grid_x = static_cast<unsigned>((rows + Tile::rows - 1) / Tile::rows * (p.columns / Tile::columns));
  l.grid_y = 1;
  l.threads = Tile::threads;
  l.shared_bytes = Tile::shared_bytes;
  l.stream = stream_from_handle(p.s.stream);
  launch(l, kernel, p);
}

template <class Math> void launch_forward(const ConvLSTMForward &p, const DeviceFacts &facts) {
  const char *name = "conv_lstm_forward_step";
  const int64_t rows = static_cast<int64_t>(p.parallel_steps) * p.s.batch * p.s.height * p.s.width;
  if (use_large_tile(p.s.tile, rows, p.columns, facts)) {
    launch_step<LargeTile>(name, conv_lstm_forward_step<Math, LargeTile>, p, rows);
  } else {
    launch_step<SmallTile>(name, conv_lstm_forward_step<Math, SmallTile>, p, rows);
  }
}

template <class Math> void launch_backward(const ConvLSTMBackward &p, const DeviceFacts &facts) {
  const char *name = "conv_lstm_backward_step";
  const int64_t rows = static_cast<int64_t>(p.s.batch) * p.s.height * p.s.width;
  if (use_large_tile(p.s.tile, rows, p.columns, facts)) {
    launch_step<LargeTile>(name, conv_lstm_backward_step<Math, LargeTile>, p, rows);
  } else {
    launch_step<SmallTile>(name, conv_lstm_backward_step<Math, SmallTile>, p, rows);
  }
}

constexpr int SMALL_MAP = 12 * 12; // pixels; with more, a step fills a device by itself

// Plans a launch over all steps: the group's images and blocks, the shared memory. False: the map is too large, or the
// device cannot hold all blocks at once.
template <class Params>
bool plan_sequence(const char *name, void (*kernel)(Params), Params &p, int weight_stages, int steps,
                   const DeviceFacts &facts, Launch &l) {
  using Tile = PersistentTile;
  const int pixels = p.s.height * p.s.width;
  if (p.s.tile != 3 && (p.s.tile != 0 || pixels > SMALL_MAP || steps == 1)) {
    return false;
  }
  Group &g = p.group;
  g.images = pixels < Tile::rows ? Tile::rows / pixels : 1;
  g.blocks = (g.images * pixels + Tile::rows - 1) / Tile::rows * (p.columns / Tile::columns);
  const int groups = (p.s.batch + g.images - 1) / g.images;
  // Where more than one block has to share a multiprocessor, each keeps less of its weights. 1 KiB a block is the
  // system's.
  const int blocks_per_sm = (groups * g.blocks + facts.multiprocessors - 1) / facts.multiprocessors;
  const int room = facts.shared_bytes_per_block / blocks_per_sm - 1024 - Tile::shared_bytes;
  if (room < 0) {
    return false;
  }
  const int fit = room / Tile::stage_bytes_b;
  g.resident_stages = fit < weight_stages ? fit : weight_stages;
  l.name = name;
  l.shared_bytes = static_cast<size_t>(Tile::shared_bytes + g.resident_stages * Tile::stage_bytes_b);
  l.threads = Tile::threads;
  l.grid_x = static_cast<unsigned>(groups * g.blocks);
  l.grid_y = 1;
  l.stream = stream_from_handle(p.s.stream);
  if (g.blocks <= CLUSTER_BLOCKS && has_clusters(name, kernel, facts)) {
    l.cluster = static_cast<unsigned>(g.blocks);
    g.counters = nullptr;
    return true;
  }
  if (groups * g.blocks > resident_blocks(name, kernel, Tile::threads, l.shared_bytes, facts)) {
    return false;
  }
  l.cooperative = g.blocks > 1;
  fill_zero(g.counters, sizeof(unsigned) * static_cast<size_t>(groups), l.stream, name);
  return true;
}

inline int weight_stages(const Gather &g) {
  return g.frames == nullptr ? 0 : (g.kernel_h * g.kernel_w * g.chunks + CHUNKS_PER_STAGE - 1) / CHUNKS_PER_STAGE;
}

template <class Math> void ConvLSTMLaunchers<Math>::forward(ConvLSTMForward p) {
  const DeviceGuard guard(p.s.device, "conv_lstm_forward_step");
  const DeviceFacts facts = device_facts(p.s.device, "conv_lstm_forward_step");
  p.parallel_steps = 1;
  Launch whole{};
  if (plan_sequence("conv_lstm_forward_sequence", conv_lstm_forward_sequence<Math>, p,
                    weight_stages(p.input) + weight_stages(p.hidden), p.s.steps, facts, whole)) {
    launch(whole, conv_lstm_forward_sequence<Math>, p);
    return;
  }
  for (int k = 0; k < p.s.steps; ++k) {
    p.step = p.s.reverse ? p.s.steps - 1 - k : k;
    launch_forward<Math>(p, facts);
  }
}

template <class Math> void ConvLSTMLaunchers<Math>::gates(ConvLSTMForward p, int first_step, int step_count) {
  const DeviceGuard guard(p.s.device, "conv_lstm_forward_step");
  p.step = first_step;
  p.parallel_steps = step_count;
  launch_forward<Math>(p, device_facts(p.s.device, "conv_lstm_forward_step"));
}

template <class Math> void ConvLSTMLaunchers<Math>::backward(ConvLSTMBackward p, int first_step, int step_count) {
  const DeviceGuard guard(p.s.device, "conv_lstm_backward_step");
  const DeviceFacts facts = device_facts(p.s.device, "conv_lstm_backward_step");
  Launch whole{};
  p.step = first_step;
  p.step_count = step_count;
  if (plan_sequence("conv_lstm_backward_sequence", conv_lstm_backward_sequence<Math>, p, weight_stages(p.grad),
                    step_count, facts, whole)) {
    launch(whole, conv_lstm_backward_sequence<Math>, p);
    return;
  }
  for (int k = 0; k < step_count; ++k) {
    p.step = p.s.reverse ? first_step + k : first_step + step_count - 1 - k;
    launch_backward<Math>(p, facts);
  }
}

template <class Math> void ConvLSTMLaunchers<Math>::initial(ConvLSTMBackward p) {
  const DeviceGuard guard(p.s.device, "conv_lstm_backward_step");
  p.step = p.s.steps;
  launch_backward<Math>(p, device_facts(p.s.device, "conv_lstm_backward_step"));
}

} // namespace fused_convlstm
