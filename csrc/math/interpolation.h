// Bilinear taps, as torch.nn.functional.interpolate(mode="bilinear") places them.
//
// The arithmetic is done in double whatever the logits' type: in float, the position of a tap at
// column 1000 is off by up to 6e-5 of a cell for ratios that are not powers of two, and the
// gradient with it.
#pragma once

#include <cstdint>

#include "macros.h"

namespace heteroakd {

// One output position along one axis: (1 - fraction) * in[lower] + fraction * in[upper].
template <typename T>
struct Tap {
  int64_t lower;
  int64_t upper;
  T fraction;
};

// Input cells per output cell; the same for every position of an axis.
HAKD_FN double tap_scale(int64_t in_size, int64_t out_size, bool align_corners) {
  if (align_corners) {
    return out_size > 1 ? static_cast<double>(in_size - 1) / static_cast<double>(out_size - 1)
                        : 0.0;
  }
  return static_cast<double>(in_size) / static_cast<double>(out_size);
}

template <typename T>
HAKD_FN Tap<T> bilinear_tap(int64_t position, int64_t in_size, double scale, bool align_corners) {
  double source = align_corners ? scale * static_cast<double>(position)
                                : scale * (static_cast<double>(position) + 0.5) - 0.5;
  if (source < 0.0) source = 0.0;
  int64_t lower = static_cast<int64_t>(source);
  if (lower > in_size - 1) lower = in_size - 1;
  double fraction = source - static_cast<double>(lower);
  if (fraction > 1.0) fraction = 1.0;
  // A neighbour of weight zero is not read: 0 * inf must not turn a finite pixel into NaN.
  int64_t upper = lower + 1;
  if (upper > in_size - 1 || fraction == 0.0) {
    upper = lower;
    fraction = 0.0;
  }
  return {lower, upper, static_cast<T>(fraction)};
}

}  // namespace heteroakd
