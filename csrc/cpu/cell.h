// What the forward and the backward of the ConvLSTM share: operands of the products, gate activations, step order.
#pragma once

#include "activations.h"
#include "conv_lstm2d.h"
#include "winograd.h"

namespace fused_convlstm {
namespace FC_ISA {

// The functions of the cell for number types N of the product.
template <class N> struct CellFunctions {
  using T = typename N::Acc;
  static FC_INLINE Vec<T> sigmoid(Vec<T> x) { return FC_ISA::sigmoid<T>(x); }
  static FC_INLINE Vec<T> tanh(Vec<T> x) { return FC_ISA::tanh<T>(x); }
};
#ifdef FC_ISA_AVX512_BF16
template <> struct CellFunctions<BF16> {
  static FC_INLINE Vec<float> sigmoid(Vec<float> x) { return short_sigmoid(x); }
  static FC_INLINE Vec<float> tanh(Vec<float> x) { return short_tanh(x); }
};
#endif

// A gate before the clamp of a hard sigmoid; `clamp_gate` finishes it. A sigmoid is complete.
template <class N, class T = typename N::Acc> static FC_INLINE Vec<T> open_gate(Activation activation, Vec<T> z) {
  switch (activation) {
  case Activation::hard_sigmoid:
    return fma(z, splat<T>(T(1) / T(6)), splat<T>(T(0.5)));
  case Activation::hard_sigmoid_keras2:
    return fma(z, splat<T>(T(0.2)), splat<T>(T(0.5)));
  default:
    return CellFunctions<N>::sigmoid(z);
  }
}
template <class T> static FC_INLINE Vec<T> clamp_gate(Activation activation, Vec<T> a) {
  if (activation == Activation::sigmoid)
    return a;
  a = a < T(0) ? Vec<T>{} : a;
  return a > T(1) ? splat<T>(T(1)) : a;
}
// d gate / d z from what open_gate returned; at the corners as PyTorch has it for each of the two.
template <class T> static FC_INLINE Vec<T> gate_slope(Activation activation, Vec<T> a) {
  const Vec<T> zero{};
  switch (activation) {
  case Activation::hard_sigmoid:
    return (a > T(0)) & (a < T(1)) ? splat<T>(T(1) / T(6)) : zero;
  case Activation::hard_sigmoid_keras2:
    return (a >= T(0)) & (a <= T(1)) ? splat<T>(T(0.2)) : zero;
  default:
    return a * (T(1) - a);
  }
}

// Time index of the s-th step.
static inline int64_t time_of(const ConvLSTM2dCall &call, int64_t s) { return call.reverse ? call.steps - 1 - s : s; }

static inline uint8_t flags_of(const ConvLSTM2dCall &call, int64_t s, int64_t b) {
  if (!call.step_flags)
    return 0;
  const auto *flags = static_cast<const uint8_t *>(call.step_flags.data);
  return flags[time_of(call, s) * call.step_flags.stride[0] + b * call.step_flags.stride[1]];
}

// Elements from the beginning of a tensor (.., B, C, H, W) to sample b of it, at time t if it has a time axis.
static inline int64_t frame_of(const Tensor &x, int64_t b) { return b * x.stride[0]; }
static inline int64_t frame_of(const Tensor &x, int64_t t, int64_t b) { return t * x.stride[0] + b * x.stride[1]; }

// This thread's part of packing `images` frames into rows (image_rows pixels apart); source(k) is frame k's offset in
// elements, negative to leave it out. `strides` are those of C, H, W. Frame rows that rows_read excludes are left out.
template <class To, class Source>
static void pack_frames(To *rows, const Row &row, int64_t image_rows, const void *data, DType type,
                        const int64_t *strides, int64_t width, int64_t pixels, int64_t images, int thread, int threads,
                        const Source &source, const uint8_t *rows_read = nullptr) {
  const Range range = part_of(images * pixels, thread, threads);
  with_type(type, [&](auto from) {
    for (int64_t k = range.begin; k < range.end;) {
      const int64_t image = k / pixels, begin = k - image * pixels;
      int64_t end = smaller(range.end - image * pixels, pixels);
      if (rows_read != nullptr)
        end = smaller(end, (begin / width + 1) * width);
      k = image * pixels + end;
      const int64_t offset = source(image);
      if (offset >= 0 && (rows_read == nullptr || rows_read[begin / width]))
        pack_pixels(rows + image * image_rows * row.size(), row, static_cast<const decltype(from) *>(data) + offset,
                    strides[0], strides[1], strides[2], width, begin, end);
    }
  });
}

// For pack_frames: null where the convolution reads every row.
static inline const uint8_t *partial_rows(const Geometry &geometry) {
  for (int64_t y = 0; y < geometry.shape.height; ++y)
    if (!geometry.rows_read[size_t(y)])
      return geometry.rows_read.data();
  return nullptr;
}

// This thread's part of writing rows to `images` frames of a caller's tensor. rows(k): image k, null for zeros.
template <class From, class Rows>
static void unpack_frames(const Rows &rows, const Row &row, void *data, DType type, const int64_t *strides,
                          int64_t width, int64_t pixels, int64_t images, int64_t image_stride, int thread,
                          int threads) {
  const Range range = part_of(images * pixels, thread, threads);
  with_type(type, [&](auto to) {
    using To = decltype(to);
    for (int64_t k = range.begin; k < range.end;) {
      const int64_t image = k / pixels, end = smaller(range.end, (image + 1) * pixels);
      To *frame = static_cast<To *>(data) + image * image_stride;
      const From *from = rows(image);
      if (from != nullptr) {
        unpack_pixels(frame, strides[0], strides[1], strides[2], from, row, width, k - image * pixels,
                      end - image * pixels);
      } else {
        for (int64_t p = k - image * pixels; p < end - image * pixels; ++p)
          for (int64_t c = 0; c < row.channels(); ++c)
            frame[p / width * strides[1] + p % width * strides[2] + c * strides[0]] = To{};
      }
      k = end;
    }
  });
}

// The forward products' weights: packed[block][tap][k][gate][lane][r] = weight[gate, group, first + lane][k * kGroup +
// r][tap].
template <class N, class From>
static void pack_gate_weights(typename N::Elem *packed, const Tensor &weight, const Blocks &blocks, int64_t channels,
                              int64_t in_per_group, int64_t kernel_h, int64_t kernel_w, int thread, int threads) {
  using Elem = typename N::Elem;
  constexpr int L = kLanes<typename N::Acc>, G = N::kGroup;
  const int64_t steps = (in_per_group + G - 1) / G, taps = kernel_h * kernel_w;
  const Range range = part_of(blocks.count() * 4, thread, threads);
  for (int64_t part = range.begin; part < range.end; ++part) {
    const int64_t block = part / 4, gate = part % 4;
    const int64_t lanes = blocks.channels(block);
    const int64_t out = gate * channels + blocks.group(block) * blocks.per_group + blocks.first(block);
    const From *from = static_cast<const From *>(weight.data) + out * weight.stride[0];
    Elem *to_block = packed + (block * taps * steps * 4 + gate) * L * G;
    const bool contiguous =
        weight.stride[3] == 1 && weight.stride[2] == kernel_w && weight.stride[1] == taps && lanes == L;
    if constexpr (sizeof(Elem) == 4 && sizeof(From) == 4) {
      if (contiguous) {
        // A lane's weights lie in a row: turn 4 by 4. This part takes a quarter of the row of all four gates, so that
        // what it writes lies together.
        const int64_t row = in_per_group * taps, quarter = round_up((row + 3) / 4, 4);
        const int64_t begin = smaller(row, gate * quarter), end = smaller(row, begin + quarter);
        const From *rows = from - gate * channels * weight.stride[0];
        int64_t tap = begin % taps, k = begin / taps; // of the weight that comes next
        for (int64_t j = begin; j < end; j += 4) {
          Elem *to[4] = {};
          const int64_t n = smaller(4, end - j);
          for (int64_t r = 0; r < n; ++r) {
            to[r] = packed + (block * taps * steps + tap * steps + k) * 4 * L;
            if (++tap == taps) {
              tap = 0;
              ++k;
            }
          }
          for (int64_t lane = 0; lane < 4 * L; lane += 4) {
            const From *at = rows + (lane / L * channels + lane % L) * weight.stride[0] + j;
            if (n == 4) {
              Float4 column[4];
              transpose4(at, weight.stride[0], column);
              for (int64_t r = 0; r < 4; ++r)
                store4(to[r] + lane, column[r]);
            } else {
              for (int64_t r = 0; r < n; ++r)
                for (int64_t m = 0; m < 4; ++m)
                  to[r][lane + m] = at[m * weight.stride[0] + r];
            }
          }
        }
        continue;
      }
    }
    if constexpr (sizeof(Elem) == 2 && sizeof(From) == 2 && G == 2) {
      if (contiguous) {
        // Pairs of channels as words [lane][tap], L taps at a time, then turned. This part takes a quarter of the pairs
        // of all four gates, so that what it writes lies together.
        const Range pairs = part_of(steps, int(gate), 4);
        for (int64_t k = pairs.begin; k < pairs.end; ++k)
          for (int64_t tap = 0; tap < taps; tap += L) {
            const int n = int(smaller(L, taps - tap)), second = 2 * k + 1 < in_per_group ? n : 0;
            for (int64_t g = 0; g < 4; ++g) {
              const From *at = from + (g - gate) * channels * weight.stride[0] + 2 * k * taps + tap;
              float *to = reinterpret_cast<float *>(packed) + (((block * taps + tap) * steps + k) * 4 + g) * L;
              Vec<float> words[L];
              for (int64_t lane = 0; lane < L; ++lane, at += weight.stride[0])
                words[lane] = (Vec<float>)(load_halves(at, n) | load_halves(at + taps, second) << 16);
              turn(words);
              for (int64_t j = 0; j < n; ++j)
                store(to + j * steps * 4 * L, words[j]);
            }
          }
        continue;
      }
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      const From *at_tap = from + tap / kernel_w * weight.stride[2] + tap % kernel_w * weight.stride[3];
      Elem *to = to_block + tap * steps * 4 * L * G;
      for (int64_t k = 0; k < steps; ++k, to += 4 * L * G) {
        for (int64_t r = 0; r < G; ++r) {
          const bool inside = k * G + r < in_per_group;
          const From *at = at_tap + (k * G + r) * weight.stride[1];
          for (int64_t lane = 0; lane < L; ++lane)
            to[lane * G + r] = inside && lane < lanes ? convert<Elem>(at[lane * weight.stride[0]]) : Elem{};
        }
      }
    }
  }
}

// One of the two convolutions of the forward products, with its packed weights and tables.
template <class N> struct GateConvolution {
  using Elem = typename N::Elem;
  const Geometry &geometry;
  Row row; // of the pixels that it reads
  Blocks blocks;
  Buffer<Elem> weights;
  Buffer<int32_t> offsets;
  Buffer<uint8_t> zeros;
  int64_t steps; // of kGroup channels
  bool whole;

  GateConvolution(const Geometry &geometry_, int64_t groups, int64_t in_per_group, int64_t out_per_group)
      : geometry(geometry_), row{groups, in_per_group, round_up(in_per_group, N::kGroup)},
        blocks(groups, out_per_group, kLanes<typename N::Acc>), steps(row.padded / N::kGroup) {
    weights.allocate(blocks.count() * block_stride());
    // Tap by tap, taps that fall on zeros cost nothing, but the sums go through memory at each tap, which takes the
    // time of about 6 channels. All taps at once are one chain of multiply-adds, which should not be too long.
    constexpr double kTapCost = 6;
    constexpr int64_t kLongestChain = 400;
    const double by_tap = double(geometry.connections) / geometry.out_pixels * (double(steps) + kTapCost);
    whole = by_tap >= double(geometry.taps) * (double(steps) + 0.5) && geometry.taps * steps <= kLongestChain;
    if (whole) {
      const int64_t count = int64_t(geometry.taps) * geometry.out_pixels;
      offsets.allocate(count);
      for (int64_t k = 0; k < count; ++k)
        offsets[k] = int32_t(geometry.source[k] * row.size());
      zeros.allocate(count);
      for (int64_t k = count - 1; k >= 0; --k) {
        const int next = (k + 1) % geometry.out_pixels == 0 ? 0 : zeros[k + 1];
        zeros[k] = geometry.source[k] == geometry.in_pixels ? uint8_t(smaller(next + 1, kMaxTilePixels)) : 0;
      }
    }
  }

  int64_t block_stride() const {
    return int64_t(geometry.taps) * steps * kVectors * kLanes<typename N::Acc> * N::kGroup;
  }
  // Pixels of an image in memory: one of zeros lies behind the others.
  int64_t image_rows() const { return int64_t(geometry.in_pixels) + 1; }

  void pack(const Tensor &weight, DType type, int64_t channels, int thread, int threads) {
    with_type(type, [&](auto from) {
      pack_gate_weights<N, decltype(from)>(weights.get(), weight, blocks, channels, row.per_group,
                                           geometry.shape.kernel_h, geometry.shape.kernel_w, thread, threads);
    });
  }

  Operand<N> operand(const Elem *const *images) const {
    return {
        images,     weights.get(), row.size(),    row.padded,  block_stride(),          geometry.taps,
        int(steps), whole,         offsets.get(), zeros.get(), geometry.forward.data(), int(geometry.forward.size())};
  }
};

// The product that gives a step's gates: the convolutions of input and h, summed, direct or transformed.
template <class N> struct GateProduct {
  using Elem = typename N::Elem;
  using Acc = typename N::Acc;
  static constexpr bool kCanTransform = sizeof(Elem) == 4;
  GateConvolution<N> input_conv, recurrent_conv;
  int tile;                      // of transformed convolutions, 0 for direct ones
  WinogradProduct<Acc> winograd; // empty for direct ones

  explicit GateProduct(const ConvLSTM2dCall &call)
      : input_conv(*call.input_conv, call.groups, call.in_channels / call.groups, call.channels / call.groups),
        recurrent_conv(*call.recurrent_conv, call.groups, call.channels / call.groups, call.channels / call.groups),
        tile(kCanTransform ? call.winograd.gates : 0) {
    if (tile != 0) {
      const ConvolutionShape &x = call.input_conv->shape, &h = call.recurrent_conv->shape;
      winograd.allocate(tile, h.out_height, h.out_width, blocks().count(),
                        {{call.in_channels, x.height, x.width, x.pad_top, x.pad_left},
                         {call.channels, h.height, h.width, h.pad_top, h.pad_left}});
    }
  }

  const Blocks &blocks() const { return recurrent_conv.blocks; }

  // This thread's part of the weights. All threads call it; a barrier has to follow.
  void pack(const ConvLSTM2dCall &call, int thread, int threads) {
    input_conv.pack(call.weight_ih, call.dtype, call.channels, thread, threads);
    recurrent_conv.pack(call.weight_hh, call.dtype, call.channels, thread, threads);
    if constexpr (kCanTransform) {
      if (tile != 0) {
#pragma omp barrier
        int64_t first = 0;
        for (const GateConvolution<N> *conv : {&input_conv, &recurrent_conv}) {
          winograd.pack(
              conv->weights.get(), conv->block_stride(), [](int64_t) { return kVectors; }, first, conv->row.per_group,
              false, thread, threads);
          first += conv->row.per_group;
        }
      }
    }
  }

  // This thread's part of the sums for `count` images: body(block, begin, end, sums) for pixels of the images laid end
  // to end. x, h: rows of each image, null for zeros.
  template <class Body>
  void run(const Elem *const *x, const Elem *const *h, int64_t count, int thread, int threads,
           const ProductScratch<N> &scratch, const WinogradScratch<Acc> &winograd_scratch, const Body &body) const {
    if constexpr (kCanTransform) {
      if (tile != 0) {
        const Elem *const *images[kWinogradInputs] = {x, h};
        winograd.for_pieces(images, count, thread, threads, winograd_scratch,
                            [&](int64_t block, int64_t begin, int64_t end) {
                              winograd.template run<kVectors>(
                                  block, begin, end, winograd_scratch,
                                  [&](Acc *sums, int64_t from, int64_t to) { body(block, from, to, sums); });
                            });
        return;
      }
    }
    const Operand<N> operands[2] = {input_conv.operand(x), recurrent_conv.operand(h)};
    const bool small = operands[0].whole && operands[1].whole;
    const int64_t pixels = recurrent_conv.geometry.out_pixels;
    for_pieces(blocks().count(), count, pixels, small, thread, threads, [&](int64_t block, int64_t begin, int64_t end) {
      product<N, kVectors>(operands, 2, block, blocks().group(block), pixels, begin, end, scratch);
      body(block, begin, end, scratch.sums.get());
    });
  }
};

// Sets the row of zeros behind the last pixel of each image.
template <class Elem> static void zero_last_rows(Elem *rows, int64_t images, int64_t image_rows, int64_t row) {
  for (int64_t k = 0; k < images; ++k)
    std::memset(static_cast<void *>(rows + ((k + 1) * image_rows - 1) * row), 0, size_t(row) * sizeof(Elem));
}

// Bias and peepholes in the order in which the cell update reads them.
template <class Acc> struct CellParameters {
  Buffer<Acc> bias;     // [block][gate][lane]
  Buffer<Acc> peephole; // [i, f, o][channel], or a pixel's [i, f, o][channel] one after the other
  int64_t peephole_pixel_stride = 0;
  bool has_peephole = false;

  CellParameters(const ConvLSTM2dCall &call, const Blocks &blocks) {
    constexpr int L = kLanes<Acc>;
    const int64_t channels = call.channels;
    bias.allocate(blocks.count() * 4 * L);
    bias.fill_zero();
    has_peephole = bool(call.peephole);
    const int64_t pixels = call.recurrent_conv->out_pixels, width = call.recurrent_conv->shape.out_width;
    if (has_peephole) {
      peephole.allocate((call.pixel_peephole ? pixels : 1) * 3 * channels);
      peephole_pixel_stride = call.pixel_peephole ? 3 * channels : 0;
    }
    with_type(call.dtype, [&](auto from) {
      using From = decltype(from);
      if (call.bias) {
        for (int64_t block = 0; block < blocks.count(); ++block)
          for (int64_t gate = 0; gate < 4; ++gate)
            for (int64_t lane = 0; lane < blocks.channels(block); ++lane) {
              const int64_t k = gate * channels + blocks.group(block) * blocks.per_group + blocks.first(block) + lane;
              bias[(block * 4 + gate) * L + lane] =
                  convert<Acc>(static_cast<const From *>(call.bias.data)[k * call.bias.stride[0]]);
            }
      }
      if (has_peephole) {
        const int64_t *s = call.peephole.stride;
        for (int64_t k = 0; k < 3 * channels; ++k) {
          const From *at = static_cast<const From *>(call.peephole.data) + k / channels * s[0] + k % channels * s[1];
          if (!call.pixel_peephole) {
            peephole[k] = convert<Acc>(*at);
          } else {
            for (int64_t p = 0; p < pixels; ++p)
              peephole[p * 3 * channels + k] = convert<Acc>(at[p / width * s[2] + p % width * s[3]]);
          }
        }
      }
    });
  }
};

} // namespace FC_ISA
} // namespace fused_convlstm
