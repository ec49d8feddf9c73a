#include "geometry.h"

#include <algorithm>
#include <cstring>
#include <mutex>

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
      rows_read(size_t(s.height)) {
  const auto keep = [this](std::vector<int32_t> &&list) {
    storage_.push_back(std::move(list));
    return storage_.back().data();
  };
  std::vector<int32_t> repetition(in_pixels);
  for (int32_t tap = 0; tap < taps; ++tap) {
    int32_t *row = source.data() + size_t(tap) * out_pixels;
    std::vector<int32_t> dst, src;
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
          dst.push_back(int32_t(k));
          src.push_back(row[k]);
        }
      }
    }
    connections += int64_t(dst.size());
    // The transposed lists: the n-th output pixel that reads an input pixel goes into the tap's n-th list.
    std::fill(repetition.begin(), repetition.end(), 0);
    std::vector<std::vector<std::pair<int32_t, int32_t>>> lists;
    for (size_t k = 0; k < dst.size(); ++k) {
      const size_t n = size_t(repetition[src[k]]++);
      if (n == lists.size())
        lists.emplace_back();
      lists[n].emplace_back(src[k], dst[k]);
    }
    for (auto &list : lists) {
      std::sort(list.begin(), list.end());
      std::vector<int32_t> first(list.size()), second(list.size());
      for (size_t k = 0; k < list.size(); ++k) {
        first[k] = list[k].first;
        second[k] = list[k].second;
      }
      const auto count = int32_t(list.size());
      const int32_t *first_data = keep(std::move(first));
      transposed.push_back({tap, count, first_data, keep(std::move(second))});
    }
    if (!dst.empty()) {
      const auto count = int32_t(dst.size());
      const int32_t *dst_data = keep(std::move(dst));
      forward.push_back({tap, count, dst_data, keep(std::move(src))});
    }
  }
}

std::shared_ptr<const Geometry> geometry_of(const ConvolutionShape &shape) {
  static std::mutex mutex;
  static std::vector<std::shared_ptr<const Geometry>> recent;
  constexpr size_t kKept = 32;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find_if(recent.begin(), recent.end(), [&](const auto &g) { return g->shape == shape; });
  if (found != recent.end())
    return *found;
  if (recent.size() == kKept)
    recent.erase(recent.begin());
  recent.push_back(std::make_shared<const Geometry>(shape));
  return recent.back();
}

} // namespace fused_convlstm
