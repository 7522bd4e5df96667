// Bilinear upsampling and cross entropy in one pass, with the gradient to the logits.
//
// Reads logits [B, C, h, w] and labels [B, H, W]; writes sums and, if asked, the gradient of the
// numerator [B, C, h, w] before any scaling. No tensor of B x C x H x W exists: label rows are made
// one at a time in cache, and each row's gradient is folded back into the two low-resolution rows
// it came from (the adjoint of the interpolation).
//
// Cost per pixel and class: 1 exponential; about 3 flops to interpolate, 8 for the softmax and its
// gradient, 4 for the adjoint. Bytes: each logit and label read once per band, each gradient
// written once. Memory beyond the outputs: 4 rows of C x w and a tile of C x 128 per thread, one
// edge row of C x w per band.
//
// Work is cut into bands of low-resolution rows. A label row belongs to the band of its lower tap;
// what it sends to the first row of the next band goes to the band's edge row and is added
// afterwards. Bands do not depend on the number of threads and are summed in a fixed order, so
// the bits of every result are the same for any thread count.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "../math/cross_entropy.h"
#include "../math/interpolation.h"
#include "strided.h"

namespace heteroakd::cpu {

struct CrossEntropyShape {
  int64_t batch, classes, in_height, in_width, out_height, out_width;
};

struct CrossEntropySums {
  double numerator = 0.0;
  double denominator = 0.0;
  LabelReport labels;
};

template <typename T>
class UpsampleCrossEntropy {
 public:
  UpsampleCrossEntropy(const CrossEntropyShape& shape, StridedLogits<T> logits,
                       StridedLabels labels, const T* class_weight, bool align_corners,
                       double label_smoothing, T* grad)
      : s_(shape),
        logits_(logits),
        labels_(labels),
        class_weight_(class_weight),
        smoothing_(label_smoothing),
        grad_(grad),
        row_taps_(make_taps(shape.in_height, shape.out_height, align_corners)),
        column_taps_(make_taps(shape.in_width, shape.out_width, align_corners)),
        first_row_(static_cast<size_t>(shape.in_height) + 1),
        bands_((shape.in_height + kBandRows - 1) / kBandRows),
        band_sums_(static_cast<size_t>(shape.batch * bands_)) {
    size_t y = 0;
    for (int64_t row = 0; row <= s_.in_height; ++row) {
      while (y < row_taps_.size() && row_taps_[y].lower < row) ++y;
      first_row_[static_cast<size_t>(row)] = static_cast<int64_t>(y);
    }
    weight_sum_ = T(0);
    for (int64_t c = 0; c < s_.classes; ++c) weight_sum_ += weight_of(c);
    if (grad_ != nullptr) edges_.resize(band_sums_.size() * row_elements());
  }

  // Independent units of work; `run_band` and, after all of them, `add_edge` take 0..bands().
  int64_t bands() const { return s_.batch * bands_; }

  // What one thread needs to run bands; made once per thread.
  struct Scratch {
    explicit Scratch(const UpsampleCrossEntropy& k)
        : lower(k.row_elements()),
          upper(k.row_elements()),
          mixed(k.row_elements()),
          row_grad(k.grad_ == nullptr ? 0 : k.row_elements()),
          tile(static_cast<size_t>(k.s_.classes) * kTile),
          labels(static_cast<size_t>(k.s_.out_width)) {}

    std::vector<T> lower, upper;  // the two low-resolution rows around a label row, [C][w]
    std::vector<T> mixed;         // their mixture, [C][w]
    std::vector<T> row_grad;      // gradient to that mixture, [C][w]
    std::vector<T> tile;          // [C][kTile]: logits, then exponentials, then gradients
    std::vector<int32_t> labels;  // [W]
  };

  void run_band(int64_t band, Scratch& scratch) {
    const int64_t b = band / bands_;
    const int64_t begin = band % bands_ * kBandRows;
    const int64_t end = std::min(begin + kBandRows, s_.in_height);
    T* edge = grad_ == nullptr ? nullptr : edges_.data() + static_cast<size_t>(band) * row_elements();
    if (grad_ != nullptr) {
      std::fill_n(edge, row_elements(), T(0));
      for (int64_t c = 0; c < s_.classes; ++c) {
        std::fill_n(grad_row(b, c, begin), (end - begin) * s_.in_width, T(0));
      }
    }
    CrossEntropySums sums;
    int64_t lower_row = -1;
    int64_t upper_row = -1;
    for (int64_t y = first_row_[begin]; y < first_row_[end]; ++y) {
      const Tap<T>& tap = row_taps_[static_cast<size_t>(y)];
      if (tap.lower != lower_row) {
        if (tap.lower == upper_row) {
          scratch.lower.swap(scratch.upper);
          upper_row = -1;
        } else {
          read_row(b, tap.lower, scratch.lower);
        }
        lower_row = tap.lower;
      }
      if (tap.upper != lower_row && tap.upper != upper_row) {
        read_row(b, tap.upper, scratch.upper);
        upper_row = tap.upper;
      }
      mix_rows(tap, scratch);
      labels_.read_row(b, y, scratch.labels.data(), sums.labels);
      std::fill(scratch.row_grad.begin(), scratch.row_grad.end(), T(0));
      for (int64_t x = 0; x < s_.out_width; x += kTile) {
        run_tile(x, std::min<int64_t>(kTile, s_.out_width - x), scratch, sums);
      }
      if (grad_ != nullptr) fold_row(b, tap, end, scratch.row_grad, edge);
    }
    band_sums_[static_cast<size_t>(band)] = sums;
  }

  // Adds a band's edge row to the first row of the next band.
  void add_edge(int64_t band) {
    const int64_t next = (band % bands_ + 1) * kBandRows;
    if (grad_ == nullptr || next >= s_.in_height) return;
    const T* edge = edges_.data() + static_cast<size_t>(band) * row_elements();
    for (int64_t c = 0; c < s_.classes; ++c) {
      T* row = grad_row(band / bands_, c, next);
      for (int64_t x = 0; x < s_.in_width; ++x) row[x] += edge[c * s_.in_width + x];
    }
  }

  CrossEntropySums total() const {
    CrossEntropySums total;
    for (const CrossEntropySums& band : band_sums_) {
      total.numerator += band.numerator;
      total.denominator += band.denominator;
      total.labels.merge(band.labels);
    }
    return total;
  }

 private:
  static constexpr int64_t kBandRows = 8;
  static constexpr int64_t kTile = 128;

  static std::vector<Tap<T>> make_taps(int64_t in_size, int64_t out_size, bool align_corners) {
    const double scale = tap_scale(in_size, out_size, align_corners);
    std::vector<Tap<T>> taps;
    taps.reserve(static_cast<size_t>(out_size));
    for (int64_t i = 0; i < out_size; ++i) {
      // Equal sizes are the identity for both conventions, without the rounding of a scale.
      taps.push_back(in_size == out_size ? Tap<T>{i, i, T(0)}
                                         : bilinear_tap<T>(i, in_size, scale, align_corners));
    }
    return taps;
  }

  size_t row_elements() const { return static_cast<size_t>(s_.classes * s_.in_width); }
  T weight_of(int64_t c) const { return class_weight_ == nullptr ? T(1) : class_weight_[c]; }
  T* grad_row(int64_t b, int64_t c, int64_t row) const {
    return grad_ + ((b * s_.classes + c) * s_.in_height + row) * s_.in_width;
  }

  void read_row(int64_t b, int64_t row, std::vector<T>& out) const {
    for (int64_t c = 0; c < s_.classes; ++c) {
      logits_.read_row(b, c, row, out.data() + c * s_.in_width);
    }
  }

  void mix_rows(const Tap<T>& tap, Scratch& scratch) const {
    const T* lower = scratch.lower.data();
    const T* upper = tap.upper == tap.lower ? lower : scratch.upper.data();
    const T w1 = tap.fraction;
    const T w0 = T(1) - w1;
    T* mixed = scratch.mixed.data();
    if (w1 == T(0)) {  // a copy: 0 * inf is not 0
      std::copy_n(lower, row_elements(), mixed);
      return;
    }
    for (size_t i = 0; i < row_elements(); ++i) mixed[i] = w0 * lower[i] + w1 * upper[i];
  }

  // Pixels [x0, x0 + count) of one label row.
  void run_tile(int64_t x0, int64_t count, Scratch& scratch, CrossEntropySums& sums) const {
    const Tap<T>* taps = column_taps_.data() + x0;
    const int32_t* label = scratch.labels.data() + x0;
    T* tile = scratch.tile.data();
    T maximum[kTile], total[kTile], others[kTile], weighted_z[kTile], label_z[kTile];

    std::fill_n(maximum, count, -std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < s_.classes; ++c) {
      const T* mixed = scratch.mixed.data() + c * s_.in_width;
      T* z = tile + c * kTile;
      for (int64_t x = 0; x < count; ++x) {
        const T lower = mixed[taps[x].lower];
        const T between = (T(1) - taps[x].fraction) * lower +
                          taps[x].fraction * mixed[taps[x].upper];
        z[x] = taps[x].fraction == T(0) ? lower : between;
        maximum[x] = z[x] > maximum[x] ? z[x] : maximum[x];
      }
    }
    for (int64_t x = 0; x < count; ++x) {
      total[x] = others[x] = weighted_z[x] = T(0);
      label_z[x] = label[x] < 0 ? T(0) : tile[label[x] * kTile + x] - maximum[x];
    }
    for (int64_t c = 0; c < s_.classes; ++c) {
      T* z = tile + c * kTile;
      if (smoothing_ != 0.0) {
        for (int64_t x = 0; x < count; ++x) weighted_z[x] += weight_of(c) * (z[x] - maximum[x]);
      }
      for (int64_t x = 0; x < count; ++x) {
        const T e = std::exp(z[x] - maximum[x]);
        total[x] += e;
        others[x] += label[x] == c ? T(0) : e;
        z[x] = e;
      }
    }

    CrossEntropyWeights<T> w;
    w.soft = static_cast<T>(smoothing_ / static_cast<double>(s_.classes));
    w.weight_sum = weight_sum_;
    for (int64_t x = 0; x < count; ++x) {
      if (label[x] < 0) continue;
      const T label_weight = weight_of(label[x]);
      w.hard = static_cast<T>(1.0 - smoothing_) * label_weight;
      sums.numerator += static_cast<double>(
          cross_entropy(w, others[x], total[x], label_z[x], weighted_z[x]));
      sums.denominator += static_cast<double>(label_weight);
    }
    if (grad_ == nullptr) return;

    for (int64_t c = 0; c < s_.classes; ++c) {
      const T* e = tile + c * kTile;
      T* row_grad = scratch.row_grad.data() + c * s_.in_width;
      for (int64_t x = 0; x < count; ++x) {
        if (label[x] < 0) continue;  // a branch, not a factor 0: ignored logits may be NaN
        w.hard = static_cast<T>(1.0 - smoothing_) * weight_of(label[x]);
        const T p = e[x] / total[x];
        const T g = label[x] == c
                        ? cross_entropy_gradient_label(w, others[x], total[x], p, weight_of(c))
                        : cross_entropy_gradient_other(w, p, weight_of(c));
        row_grad[taps[x].lower] += (T(1) - taps[x].fraction) * g;
        row_grad[taps[x].upper] += taps[x].fraction * g;
      }
    }
  }

  // The adjoint of mix_rows; rows from `end` on belong to the next band.
  void fold_row(int64_t b, const Tap<T>& tap, int64_t end, const std::vector<T>& row_grad,
                T* edge) const {
    const T w1 = tap.fraction;
    const T w0 = T(1) - w1;
    for (int64_t c = 0; c < s_.classes; ++c) {
      const T* g = row_grad.data() + c * s_.in_width;
      T* lower = grad_row(b, c, tap.lower);
      T* upper = tap.upper < end ? grad_row(b, c, tap.upper) : edge + c * s_.in_width;
      for (int64_t x = 0; x < s_.in_width; ++x) lower[x] += w0 * g[x];
      for (int64_t x = 0; x < s_.in_width; ++x) upper[x] += w1 * g[x];
    }
  }

  CrossEntropyShape s_;
  StridedLogits<T> logits_;
  StridedLabels labels_;
  const T* class_weight_;
  double smoothing_;
  T weight_sum_;
  T* grad_;
  std::vector<Tap<T>> row_taps_, column_taps_;
  std::vector<int64_t> first_row_;  // [h + 1]: first label row whose lower tap is >= row
  int64_t bands_;                   // per image
  std::vector<CrossEntropySums> band_sums_;
  std::vector<T> edges_;  // [B * bands][C][w]
};

}  // namespace heteroakd::cpu
