// Which input pixel each output pixel of a convolution reads at each tap: stride, dilation and padding as tables, so
// that the kernels know nothing of them. Pixels are numbered row by row.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace fused_convlstm {

enum class PaddingMode { zeros = 0, circular = 1, replicate = 2, reflect = 3 };

struct ConvolutionShape {
  int64_t height, width;         // of the input
  int64_t out_height, out_width; // of the output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  PaddingMode mode;

  bool operator==(const ConvolutionShape &other) const;
};

// Pairs of pixels that one tap connects. No `dst` occurs twice, and they ascend.
struct Pass {
  int32_t tap;
  int32_t count;
  const int32_t *dst, *src;
};

struct Geometry {
  ConvolutionShape shape;
  int32_t taps;
  int32_t in_pixels, out_pixels;
  // (taps, out_pixels): the input pixel, or in_pixels where the tap falls on a zero.
  std::vector<int32_t> source;
  std::vector<Pass> forward;      // dst: output pixel, src: input pixel; one a tap
  int64_t connections;            // pairs in all
  std::vector<uint8_t> rows_read; // (height), whether any output reads the row: a wide stride passes some over

  explicit Geometry(const ConvolutionShape &shape);

  // dst: input pixel, src: output pixel; several for a tap that reads a pixel twice. Made at the first call.
  const std::vector<Pass> &transposed() const;
  // Memory of all tables, the transposed ones among them.
  size_t bytes() const;

private:
  std::vector<int32_t> storage_; // what the passes point to
  mutable std::once_flag transposed_made_;
  mutable std::vector<Pass> transposed_;
  mutable std::vector<int32_t> transposed_storage_;
};

// The tables of a shape; those used last are kept.
std::shared_ptr<const Geometry> geometry_of(const ConvolutionShape &shape);

} // namespace fused_convlstm
