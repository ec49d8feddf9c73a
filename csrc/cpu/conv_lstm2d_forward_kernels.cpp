// Forward of the ConvLSTM (Courtney & Sreenivas, eq. 1; peepholes: Shi et al. 2015, eq. 3). Per timestep one product
// over the taps of both convolutions; the cell update follows while the sums are in the cache.
#include "cell.h"

namespace fused_convlstm {
namespace FC_ISA {

namespace {

// N: number types of the product. Io: type of the caller's tensors.
template <class N, class Io> class Forward {
  using Elem = typename N::Elem;
  using Acc = typename N::Acc;
  static constexpr int L = kLanes<Acc>;
  static constexpr bool kStateIsOutput = sizeof(Io) == 2 && sizeof(Elem) == 2; // h has the caller's type

public:
  explicit Forward(const ConvLSTM2dForward &call)
      : call_(call), per_group_(call.channels / call.groups), pixels_(call.recurrent_conv->out_pixels),
        width_(call.recurrent_conv->shape.out_width), product_(call), input_conv_(product_.input_conv),
        recurrent_conv_(product_.recurrent_conv), parameters_(call, product_.blocks()),
        cell_row_{1, call.channels, call.channels} {
    input_rows_.allocate(2 * call.batch * input_conv_.image_rows() * input_conv_.row.size());
    h_rows_.allocate(2 * call.batch * recurrent_conv_.image_rows() * recurrent_conv_.row.size());
    cell_rows_.allocate(call.batch * pixels_ * call.channels);
  }

  void run() {
    Buffer<ThreadState> states(call_.threads);
    for (int k = 0; k < call_.threads; ++k) {
      new (&states[k]) ThreadState(call_.batch);
      if (product_.tile != 0)
        states[k].winograd.allocate(product_.tile, product_.winograd.depth);
    }
    run_team(call_.threads, [&](int thread, int threads) { run_thread(states[thread], thread, threads); });
    for (int k = 0; k < call_.threads; ++k)
      states[k].~ThreadState();
  }

private:
  // Where each sample's state is. Every thread keeps its own copy, so that none waits for another to update it.
  struct ThreadState {
    ProductScratch<N> scratch;
    WinogradScratch<Acc> winograd;
    Buffer<const Elem *> h;                  // (B), rows of the current state; null: zeros
    Buffer<const Acc *> c;                   // (B)
    Buffer<int> parity;                      // (B), which half of h_rows_ is written next
    Buffer<int64_t> active;                  // samples that take the step
    Buffer<const Elem *> x_images, h_images; // (active)
    Buffer<const Acc *> c_images;            // (active), before the step
    Buffer<Elem *> new_h;                    // (active)

    explicit ThreadState(int64_t batch)
        : h(batch), c(batch), parity(batch), active(batch), x_images(batch), h_images(batch), c_images(batch),
          new_h(batch) {}
  };

  Elem *h_slot(int64_t b, int parity) const {
    return h_rows_.get() + (parity * call_.batch + b) * recurrent_conv_.image_rows() * recurrent_conv_.row.size();
  }
  Elem *input_slot(int64_t s) const {
    return input_rows_.get() + s % 2 * call_.batch * input_conv_.image_rows() * input_conv_.row.size();
  }
  Acc *cell_slot(int64_t b) const { return cell_rows_.get() + b * pixels_ * call_.channels; }

  void pack_input(int64_t s, int thread, int threads) {
    const Geometry &geometry = *call_.input_conv;
    pack_frames(
        input_slot(s), input_conv_.row, input_conv_.image_rows(), call_.input.data, call_.dtype, call_.input.stride + 2,
        geometry.shape.width, geometry.in_pixels, call_.batch, thread, threads,
        [&](int64_t b) {
          return flags_of(call_, s, b) & kFlagPastEnd ? -1 : frame_of(call_.input, time_of(call_, s), b);
        },
        partial_rows(geometry));
  }

  void run_thread(ThreadState &state, int thread, int threads) {
    const int64_t batch = call_.batch;
    const DType state_type = sizeof(Acc) == 8 ? DType::float64 : DType::float32;
    if (recurrent_conv_.row.per_group != recurrent_conv_.row.padded) { // the channels that pad a group stay zero
      if (thread == 0)
        h_rows_.fill_zero();
#pragma omp barrier
    }
    product_.pack(call_, thread, threads);
    if (thread == 0) {
      zero_last_rows(input_rows_.get(), 2 * batch, input_conv_.image_rows(), input_conv_.row.size());
      zero_last_rows(h_rows_.get(), 2 * batch, recurrent_conv_.image_rows(), recurrent_conv_.row.size());
    }
    if (call_.h_0)
      pack_frames(h_slot(0, 0), recurrent_conv_.row, recurrent_conv_.image_rows(), call_.h_0.data, call_.dtype,
                  call_.h_0.stride + 1, width_, pixels_, batch, thread, threads,
                  [&](int64_t b) { return frame_of(call_.h_0, b); });
    if (call_.c_0)
      pack_frames(cell_rows_.get(), cell_row_, pixels_, call_.c_0.data, state_type, call_.c_0.stride + 1, width_,
                  pixels_, batch, thread, threads, [&](int64_t b) { return frame_of(call_.c_0, b); });
    pack_input(0, thread, threads);
#pragma omp barrier
    for (int64_t b = 0; b < batch; ++b) {
      state.h[b] = call_.h_0 ? h_slot(b, 0) : nullptr;
      state.c[b] = call_.c_0 ? cell_slot(b) : nullptr;
      state.parity[b] = 1;
    }
    for (int64_t s = 0; s < call_.steps; ++s) {
      step(state, s, thread, threads);
      if (s + 1 < call_.steps)
        pack_input(s + 1, thread, threads);
#pragma omp barrier
    }
    unpack_frames<Elem>([&](int64_t b) { return state.h[b]; }, recurrent_conv_.row, call_.h_n.data, call_.dtype,
                        call_.h_n.stride + 1, width_, pixels_, batch, call_.h_n.stride[0], thread, threads);
    unpack_frames<Acc>([&](int64_t b) { return state.c[b]; }, cell_row_, call_.c_n.data, state_type,
                       call_.c_n.stride + 1, width_, pixels_, batch, call_.c_n.stride[0], thread, threads);
  }

  void step(ThreadState &state, int64_t s, int thread, int threads) {
    const int64_t t = time_of(call_, s);
    int64_t count = 0;
    for (int64_t b = 0; b < call_.batch; ++b) {
      const uint8_t flags = flags_of(call_, s, b);
      if (flags & kFlagPastEnd) {
        if (b % threads == thread)
          pass_over(t, b);
        continue;
      }
      const bool reset = flags & kFlagReset;
      state.active[count] = b;
      state.x_images[count] = input_slot(s) + b * input_conv_.image_rows() * input_conv_.row.size();
      state.h_images[count] = reset ? nullptr : state.h[b];
      state.c_images[count] = reset ? nullptr : state.c[b];
      state.new_h[count] = h_slot(b, state.parity[b]);
      state.h[b] = state.new_h[count];
      state.c[b] = cell_slot(b);
      state.parity[b] ^= 1;
      ++count;
    }
    product_.run(
        state.x_images.get(), state.h_images.get(), count, thread, threads, state.scratch, state.winograd,
        [&](int64_t block, int64_t begin, int64_t end, Acc *sums) { update_cells(state, t, block, begin, end, sums); });
  }

  // A step past the end of sample b: the output is zero; what is saved is never read, but has to have a value.
  void pass_over(int64_t t, int64_t b) {
    Io *to = static_cast<Io *>(call_.output.data) + frame_of(call_.output, t, b);
    for (int64_t p = 0; p < pixels_; ++p)
      for (int64_t c = 0; c < call_.channels; ++c)
        to[p * call_.output.stride[4] + c * call_.output.stride[2]] = Io{};
    if (call_.save == Save::nothing)
      return;
    const size_t bytes = size_t(pixels_ * call_.channels) * (parameters_.has_peephole ? sizeof(Acc) : sizeof(Io));
    std::memset(static_cast<char *>(call_.cells) + size_t(t * call_.batch + b) * bytes, 0, bytes);
    if (call_.save == Save::gates)
      std::memset(static_cast<Io *>(call_.gates) + (t * call_.batch + b) * pixels_ * 4 * call_.channels, 0,
                  size_t(pixels_ * 4 * call_.channels) * sizeof(Io));
  }

  // From sums to gates, c and h for a block of channels of the pixels begin .. end. Overwrites the sums.
  __attribute__((noinline)) void update_cells(const ThreadState &state, int64_t t, int64_t block, int64_t begin,
                                              int64_t end, Acc *sums_of_pixels) {
    using V = Vec<Acc>;
    const Blocks &blocks = recurrent_conv_.blocks;
    const int64_t channels = call_.channels, group = blocks.group(block), first = blocks.first(block);
    const int lanes = int(blocks.channels(block));
    const int64_t channel = group * per_group_ + first;
    const int64_t h_row = recurrent_conv_.row.size(), h_channel = group * recurrent_conv_.row.padded + first;
    const Activation activation = call_.activation;
    const int64_t pixel_stride = call_.output.stride[4], channel_stride = call_.output.stride[2];
    V bias[4];
    for (int gate = 0; gate < 4; ++gate)
      bias[gate] = load(parameters_.bias.get() + (block * 4 + gate) * L);
    for (int64_t k = begin; k < end;) {
      const int64_t image = k / pixels_, pixel = k % pixels_, run = smaller(end - k, pixels_ - pixel);
      const int64_t b = state.active[image];
      const Acc *c_old = state.c_images[image];
      Acc *c_new = cell_slot(b) + pixel * channels + channel;
      const int64_t saved = ((t * call_.batch + b) * pixels_ + pixel) * channels + channel;
      Elem *h_new = state.new_h[image] + pixel * h_row + h_channel;
      if (c_old != nullptr)
        c_old += pixel * channels + channel;
      Io *gates = nullptr;
      if (call_.save == Save::gates)
        gates = static_cast<Io *>(call_.gates) + ((t * call_.batch + b) * pixels_ + pixel) * 4 * channels +
                group * 4 * per_group_ + first;
      const Acc *peephole = nullptr;
      if (parameters_.has_peephole)
        peephole = parameters_.peephole.get() + pixel * parameters_.peephole_pixel_stride + channel;
      Io *out = static_cast<Io *>(call_.output.data) + frame_of(call_.output, t, b) + pixel * pixel_stride +
                channel * channel_stride;
      Acc *sums = sums_of_pixels + (k - begin) * 4 * L;
      for (int64_t p = 0; p < run; ++p) {
        Acc *z = sums + p * 4 * L;
        V z_i = load(z) + bias[0], z_f = load(z + L) + bias[1];
        V z_g = load(z + 2 * L) + bias[2], z_o = load(z + 3 * L) + bias[3];
        V c = c_old == nullptr ? V{} : load_first(c_old + p * channels, lanes);
        if (peephole != nullptr) {
          const Acc *weights = peephole + p * parameters_.peephole_pixel_stride;
          z_i = fma(load_first(weights, lanes), c, z_i);
          z_f = fma(load_first(weights + channels, lanes), c, z_f);
        }
        const V open_i = open_gate<N>(activation, z_i), open_f = open_gate<N>(activation, z_f);
        const V g = CellFunctions<N>::tanh(z_g);
        c = fma(clamp_gate<Acc>(activation, open_f), c, clamp_gate<Acc>(activation, open_i) * g);
        if (peephole != nullptr)
          z_o = fma(load_first(peephole + p * parameters_.peephole_pixel_stride + 2 * channels, lanes), c, z_o);
        const V open_o = open_gate<N>(activation, z_o);
        V h = clamp_gate<Acc>(activation, open_o) * CellFunctions<N>::tanh(c);
        if constexpr (sizeof(Io) == 2 && sizeof(Elem) == 4)
          h = round_to_bfloat16(h); // the state is what the caller sees
        store_first(c_new + p * channels, c, lanes);
        if (call_.save != Save::nothing) {
          if (parameters_.has_peephole)
            store_first(static_cast<Acc *>(call_.cells) + saved + p * channels, c, lanes);
          else
            store_first_as<Acc>(static_cast<Io *>(call_.cells) + saved + p * channels, c, lanes);
        }
        store_first_as<Acc>(h_new + p * h_row, h, lanes);
        if (gates != nullptr) {
          Io *to = gates + p * 4 * channels;
          store_first_as<Acc>(to, open_i, lanes);
          store_first_as<Acc>(to + per_group_, open_f, lanes);
          store_first_as<Acc>(to + 2 * per_group_, g, lanes);
          store_first_as<Acc>(to + 3 * per_group_, open_o, lanes);
        }
        if (channel_stride == 1)
          store_first_as<Acc>(out + p * pixel_stride, h, lanes);
        else if (!kStateIsOutput)
          store(z, h);
      }
      if (channel_stride != 1) {
        const auto write = [&](const auto *from, int64_t stride) {
          if (pixel_stride == 1)
            return transpose(out, channel_stride, from, stride, run, lanes);
          for (int lane = 0; lane < lanes; ++lane) // frames of one column
            for (int64_t p = 0; p < run; ++p)
              out[lane * channel_stride + p * pixel_stride] = convert<Io>(from[p * stride + lane]);
        };
        if constexpr (kStateIsOutput)
          write(h_new, h_row);
        else
          write(sums, 4 * L);
      }
      k += run;
    }
  }

  const ConvLSTM2dForward &call_;
  int64_t per_group_, pixels_, width_;
  GateProduct<N> product_;
  const GateConvolution<N> &input_conv_, &recurrent_conv_;
  CellParameters<Acc> parameters_;
  Row cell_row_;
  Buffer<Elem> input_rows_; // two frames of all samples: the one that is read and the next
  Buffer<Elem> h_rows_;     // before and after the step
  Buffer<Acc> cell_rows_;   // c_0, then c
};

} // namespace

void conv_lstm2d_forward(const ConvLSTM2dForward &call) {
  switch (call.dtype) {
  case DType::float32:
    return Forward<F32, float>(call).run();
  case DType::float64:
    return Forward<F64, double>(call).run();
  case DType::bfloat16:
#ifdef FC_ISA_AVX512_BF16
    return Forward<BF16, bfloat16>(call).run();
#else
    return Forward<F32, bfloat16>(call).run();
#endif
  }
}

} // namespace FC_ISA
} // namespace fused_convlstm
