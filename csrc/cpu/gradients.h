// Gradients of one term at the pixels, added up along the columns of a strip.
//
// Up to four rows between the same two rows of logits are taken at once: per class, sum_r g_r goes
// to `sum` and sum_r f_r g_r to `upper`; what belongs to the lower row is their difference. On the
// label grid itself (`upper` null) there is one row and nothing to interpolate.
#pragma once

#include "statistics.h"

namespace heteroakd::cpu::HAKD_ISA {

// Where sums of one term go.
template <typename T>
struct Sink {
  T* sum;      // [C][N]; on the label grid [C][padded], a vector of columns for each r
  T* upper;    // [C][N]; null on the label grid
  bool first;  // the first rows of a pair of rows of logits: `upper` holds nothing yet
  bool last;   // the last ones, of consecutive columns: sum - upper goes to the logits' row
  T* row;      // where column `base` of class 0 lies in that row
  int64_t padded;
  const T* column_fraction;  // [N]
};

// What a vector sends to the row of logits that its lanes lie in: lane l to columns l and l + 1.
template <typename T>
HAKD_FN void fold_lanes(Lanes<T> v, Lanes<T> fraction, T* row) {
  using F = Lanes<T>;
  const F upper = fraction * v;
  (F::load(row) + (v - upper) + shift_up(upper)).store(row);
  row[F::N] += last_lane(upper);
}

template <typename T, int kRows, bool kUpsample, typename Gradient>
HAKD_FN void accumulate(int64_t classes, const T* row_fraction, const Sink<T>& sink,
                        const Gradient& gradient) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  F f[kRows];
  F fraction(T(0));
  if constexpr (kUpsample) {
    for (int r = 0; r < kRows; ++r) f[r] = F(row_fraction[r]);
    fraction = F::load(sink.column_fraction);
  }
  T* sum = sink.sum;
  T* upper = sink.upper;
  T* row = sink.row;
  const bool first = sink.first;
  const bool last = sink.last;
  for (int64_t c = 0; c < classes; ++c) {
    if constexpr (kUpsample) {
      F total = F::load(sum + c * N);
      F high(T(0));
      if (!first) high = F::load(upper + c * N);
      for (int r = 0; r < kRows; ++r) {
        const F g = gradient(r, c);
        total = total + g;
        high = fma(f[r], g, high);
      }
      high.store(upper + c * N);
      if (last) {
        fold_lanes<T>(total - high, fraction, row + c * sink.padded);
      } else {
        total.store(sum + c * N);
      }
    } else {
      for (int r = 0; r < kRows; ++r) {
        T* own = sum + c * sink.padded + r * N;
        (F::load(own) + gradient(r, c)).store(own);
      }
    }
  }
}

// What g_c = student x_c^power - other y_c, and `label` at the labelled class, is made of.
template <typename T>
struct GradientParts {
  const T *x, *y;                       // tiles [kRows][C][N]
  const T *student, *other, *label;     // [kRows][N]
  const int32_t* const* labels;
  const T* class_weight;  // y of kClassWeight; null: 1
};
enum class OtherKind { kNone, kTile, kClassWeight };

// kPower: of x; 0: there is no x.
template <typename T, int kPower, OtherKind kOther, bool kLabel, int kRows, bool kUpsample>
void term_gradient(int64_t classes, const GradientParts<T>& parts, const T* fraction,
                   const Sink<T>& sink) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const int64_t tile = classes * N;
  const T *x = parts.x, *y = parts.y, *class_weight = parts.class_weight;
  F student[kRows], other[kRows], label[kRows];
  Labels<T> labels[kRows];
  for (int r = 0; r < kRows; ++r) {
    if constexpr (kPower > 0) student[r] = F::load(parts.student + r * N);
    if constexpr (kOther != OtherKind::kNone) other[r] = F::load(parts.other + r * N);
    if constexpr (kLabel) {
      label[r] = F::load(parts.label + r * N);
      labels[r] = load_labels<T>(parts.labels[r]);
    }
  }
  accumulate<T, kRows, kUpsample>(classes, fraction, sink, [&](int r, int64_t c) __attribute__((always_inline)) {
    F g(T(0));
    if constexpr (kPower > 0) g = student[r] * power<kPower>(F::load(x + r * tile + c * N));
    if constexpr (kOther == OtherKind::kTile) g = fnma(other[r], F::load(y + r * tile + c * N), g);
    if constexpr (kOther == OtherKind::kClassWeight) {
      g = fnma(other[r], F(class_weight == nullptr ? T(1) : class_weight[c]), g);
    }
    if constexpr (kLabel) g = select(is_class(labels[r], static_cast<int32_t>(c)), label[r], g);
    return g;
  });
}

}  // namespace heteroakd::cpu::HAKD_ISA
