#include "geometry.h"

#include <algorithm>

namespace fused_convlstm {

namespace {

// Where position k, possibly outside 0 .. size, reads from; -1 for a zero.
int64_t padded_position(int64_t k, int64_t size, PaddingMode mode) {
  if (k >= 0 && k < size)
    return k;
  switch (mode) {
  case PaddingMode::circular:
    return (k + size) % size;
  case PaddingMode::replicate:
    return k < 0 ? 0 : size - 1;
  case PaddingMode::reflect:
    return k < 0 ? -k : 2 * (size - 1) - k;
  case PaddingMode::zeros:
    break;
  }
  return -1;
}

} // namespace

bool ConvolutionShape::operator==(const ConvolutionShape &o) const {
  return height == o.height && width == o.width && out_height == o.out_height && out_width == o.out_width &&
         kernel_h == o.kernel_h && kernel_w == o.kernel_w && stride_h == o.stride_h && stride_w == o.stride_w &&
         pad_top == o.pad_top && pad_left == o.pad_left && dilation_h == o.dilation_h && dilation_w == o.dilation_w &&
         mode == o.mode;
}

Geometry::Geometry(const ConvolutionShape &s)
    : shape(s), taps(int32_t(s.kernel_h * s.kernel_w)), in_pixels(int32_t(s.height * s.width)),
      out_pixels(int32_t(s.out_height * s.out_width)), source(size_t(taps) * out_pixels), connections(0),
      rows_read(size_t(s.height)), storage_(2 * source.size()) {
  for (int32_t tap = 0; tap < taps; ++tap) {
    int32_t *row = source.data() + size_t(tap) * out_pixels;
    int32_t *dst = storage_.data() + 2 * size_t(tap) * out_pixels, *src = dst + out_pixels;
    int32_t count = 0;
    for (int64_t y = 0, k = 0; y < s.out_height; ++y) {
      const int64_t in_y =
          padded_position(y * s.stride_h - s.pad_top + tap / s.kernel_w * s.dilation_h, s.height, s.mode);
      for (int64_t x = 0; x < s.out_width; ++x, ++k) {
        const int64_t in_x =
            padded_position(x * s.stride_w - s.pad_left + tap % s.kernel_w * s.dilation_w, s.width, s.mode);
        const bool valid = in_y >= 0 && in_x >= 0;
        row[k] = valid ? int32_t(in_y * s.width + in_x) : in_pixels;
        if (valid) {
          rows_read[size_t(in_y)] = 1;
          dst[count] = int32_t(k);
          src[count++] = row[k];
        }
      }
    }
    connections += count;
    if (count > 0)
      forward.push_back({tap, count, dst, src});
  }
}

const std::vector<Pass> &Geometry::transposed() const {
  std::call_once(transposed_made_, [this] {
    std::vector<Pass> made;
    std::vector<int32_t> storage(2 * size_t(connections));
    int32_t *next = storage.data();
    std::vector<int32_t> repetition(in_pixels);
    for (const Pass &of_tap : forward) {
      // The n-th output pixel that reads an input pixel goes into the tap's n-th list.
      std::fill(repetition.begin(), repetition.end(), 0);
      std::vector<std::vector<std::pair<int32_t, int32_t>>> lists;
      for (int32_t k = 0; k < of_tap.count; ++k) {
        const size_t n = size_t(repetition[size_t(of_tap.src[k])]++);
        if (n == lists.size())
          lists.emplace_back();
        lists[n].emplace_back(of_tap.src[k], of_tap.dst[k]);
      }
      for (auto &list : lists) {
        if (!std::is_sorted(list.begin(), list.end()))
          std::sort(list.begin(), list.end());
        const auto count = int32_t(list.size());
        int32_t *dst = next, *src = dst + count;
        for (int32_t k = 0; k < count; ++k) {
          dst[k] = list[size_t(k)].first;
          src[k] = list[size_t(k)].second;
        }
        made.push_back({of_tap.tap, count, dst, src});
        next = src + count;
      }
    }
    transposed_ = std::move(made);
    transposed_storage_ = std::move(storage);
  });
  return transposed_;
}

size_t Geometry::bytes() const { return (source.size() + 4 * size_t(taps) * size_t(out_pixels)) * sizeof(int32_t); }

std::shared_ptr<const Geometry> geometry_of(const ConvolutionShape &shape) {
  constexpr size_t kKept = 128, kKeptBytes = size_t(64) << 20;
  constexpr size_t kAlways = 2; // the two convolutions of a layer
  static std::mutex mutex;
  static std::vector<std::shared_ptr<const Geometry>> recent; // the one used last at the end
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = std::find_if(recent.begin(), recent.end(), [&](const auto &g) { return g->shape == shape; });
    if (found != recent.end()) {
      std::rotate(found, found + 1, recent.end());
      return recent.back();
    }
  }
  const auto made = std::make_shared<const Geometry>(shape); // unlocked: two threads may make the same
  const std::lock_guard<std::mutex> lock(mutex);
  recent.push_back(made);
  size_t bytes = 0;
  for (const auto &geometry : recent)
    bytes += geometry->bytes();
  while (recent.size() > kKept || (recent.size() > kAlways && bytes > kKeptBytes)) {
    bytes -= recent.front()->bytes();
    recent.erase(recent.begin());
  }
  return made;
}

} // namespace fused_convlstm
