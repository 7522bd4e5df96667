// Where the label grid falls in a grid of logits, and how its columns are dealt to vectors.
#pragma once

#include <cstdint>
#include <vector>

#include "../math/interpolation.h"
#include "pass.h"

namespace heteroakd::cpu {

template <typename T>
std::vector<Tap<T>> make_taps(int64_t in_size, int64_t out_size, bool align_corners) {
  const double scale = out_size > 0 ? tap_scale(in_size, out_size, align_corners) : 0.0;
  std::vector<Tap<T>> taps;
  taps.reserve(static_cast<size_t>(out_size));
  for (int64_t i = 0; i < out_size; ++i) {
    // Equal sizes are the identity for both conventions, without the rounding of a scale.
    taps.push_back(in_size == out_size ? Tap<T>{i, i, T(0)}
                                       : bilinear_tap<T>(i, in_size, scale, align_corners));
  }
  return taps;
}

// The columns of a row of labels, dealt to vectors: pixel[vector * lanes + lane], -1 beyond the end.
struct Columns {
  int64_t lanes, vectors;
  std::vector<int32_t> pixel;

  // apart: of neighbouring lanes, in pixels. With the ratio of label columns to logits columns,
  // lane l of a vector lies one logit further than lane l - 1.
  Columns(int64_t width, int64_t lanes_, int64_t apart) : lanes(lanes_) {
    const int64_t block = lanes * apart;
    vectors = (width + block - 1) / block * apart;
    pixel.resize(static_cast<size_t>(vectors * lanes));
    for (int64_t vector = 0; vector < vectors; ++vector) {
      for (int64_t l = 0; l < lanes; ++l) {
        const int64_t x = vector / apart * block + vector % apart + apart * l;
        pixel[static_cast<size_t>(vector * lanes + l)] = x < width ? static_cast<int32_t>(x) : -1;
      }
    }
  }

  // The ratio of the grids where it is an integer (of the distances, with align_corners), else 1.
  static int64_t distance(int64_t in_width, int64_t out_width, bool align_corners) {
    int64_t in = in_width;
    int64_t out = out_width;
    if (align_corners) {
      --in;
      --out;
    }
    return in > 0 && out > in && out % in == 0 && out / in <= 64 ? out / in : 1;
  }
};

// Owns the arrays that a Geometry points to.
template <typename T>
class GridMap {
 public:
  GridMap() = default;
  GridMap(int64_t in_height, int64_t in_width, int64_t out_height, int64_t out_width,
          bool align_corners, const Columns& columns)
      : height_(in_height), width_(in_width), lanes_(columns.lanes) {
    for (const Tap<T>& tap : make_taps<T>(in_height, out_height, align_corners)) {
      row_lower_.push_back(static_cast<int32_t>(tap.lower));
      row_fraction_.push_back(tap.fraction);
    }
    const std::vector<Tap<T>> taps = make_taps<T>(in_width, out_width, align_corners);
    const size_t count = static_cast<size_t>(columns.vectors * columns.lanes);
    column_lower_.resize(count);
    column_fraction_.resize(count);
    for (int64_t vector = 0; vector < columns.vectors; ++vector) {
      place(taps, columns.pixel.data() + vector * columns.lanes,
            column_lower_.data() + vector * columns.lanes,
            column_fraction_.data() + vector * columns.lanes);
    }
  }

  const std::vector<int32_t>& row_lower() const { return row_lower_; }

  Geometry<T> view(int64_t max_rows) const {
    Geometry<T> g;
    g.height = height_;
    g.width = width_;
    // one column before, one behind, and what the loads of a last vector may touch
    g.padded = (width_ + 2 * lanes_ + 3 + 15) / 16 * 16;
    g.row_lower = row_lower_.data();
    g.row_fraction = row_fraction_.data();
    g.column_lower = column_lower_.data();
    g.column_fraction = column_fraction_.data();
    g.column_base = base_.data();
    g.column_mode = mode_.data();
    g.max_rows = max_rows;
    return g;
  }

 private:
  void place(const std::vector<Tap<T>>& taps, const int32_t* pixel, int32_t* lower, T* fraction) {
    int32_t least = static_cast<int32_t>(width_ - 1);
    int32_t most = 0;
    int64_t start = 0;  // column of lane 0, if the lanes are consecutive
    bool anchored = false;
    for (int64_t l = 0; l < lanes_; ++l) {
      if (pixel[l] < 0) continue;
      const Tap<T>& tap = taps[static_cast<size_t>(pixel[l])];
      lower[l] = static_cast<int32_t>(tap.lower);
      fraction[l] = tap.fraction;
      least = lower[l] < least ? lower[l] : least;
      most = lower[l] > most ? lower[l] : most;
      if (!(lower[l] == 0 && fraction[l] == T(0))) {
        start = lower[l] - l;
        anchored = true;
      }
    }
    bool consecutive = anchored && start >= -1;
    for (int64_t l = 0; l < lanes_; ++l) {
      if (pixel[l] < 0) {
        lower[l] = least;
        fraction[l] = T(0);
        continue;
      }
      // the pixel before the first column may as well read the padding, which repeats it
      const bool before = lower[l] == 0 && fraction[l] == T(0) && start + l == -1;
      consecutive = consecutive && (lower[l] == start + l || before);
    }
    if (consecutive) {
      base_.push_back(static_cast<int32_t>(start));
      mode_.push_back(ColumnMode::kConsecutive);
    } else {
      base_.push_back(least);
      mode_.push_back(most - least <= 2 * lanes_ - 2 ? ColumnMode::kPermuted
                                                     : ColumnMode::kScattered);
    }
  }

  int64_t height_ = 0, width_ = 0, lanes_ = 1;
  std::vector<int32_t> row_lower_, column_lower_, base_;
  std::vector<T> row_fraction_, column_fraction_;
  std::vector<ColumnMode> mode_;
};

}  // namespace heteroakd::cpu
