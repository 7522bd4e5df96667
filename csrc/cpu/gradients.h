// Gradients of one term at the pixels, added up along the columns of a strip.
//
// Up to four rows between the same two rows of logits are taken at once: per class, sum_r g_r goes
// to `sum` and sum_r f_r g_r to `upper`; what belongs to the lower row is their difference. On the
// label grid itself (`upper` null) there is one row and nothing to interpolate.
//
// Every gradient here is one of two shapes, alpha_r x_c - beta_r y_c with coefficients per pixel,
// or the cross entropy's, whose labelled class is different.
#pragma once

#include "../math/distillation.h"
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

// alpha_r x_c - beta_r y_c; x, y: tiles [kRows][C][N], alpha, beta: [kRows][N].
template <typename T, int kRows, bool kUpsample>
void pair_gradient(int64_t classes, const T* x, const T* y, const T* alpha, const T* beta,
                   const T* fraction, const Sink<T>& sink) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const int64_t tile = classes * N;
  F a[kRows], b[kRows];
  for (int r = 0; r < kRows; ++r) {
    a[r] = F::load(alpha + r * N);
    b[r] = F::load(beta + r * N);
  }
  accumulate<T, kRows, kUpsample>(classes, fraction, sink, [&](int r, int64_t c) __attribute__((always_inline)) {
    return fnma(b[r], F::load(y + r * tile + c * N), a[r] * F::load(x + r * tile + c * N));
  });
}

// hard_r q_c + (smoothing only) soft_r (weight_sum p_c - w_c) valid_r, with q from
// cross_entropy_gradient_numerator and e = tile^kPower. hard: hard / total, inverse: 1 / total.
template <typename T, int kPower, bool kSmoothing, int kRows, bool kUpsample>
void cross_entropy_gradient(int64_t classes, const T* e, const T* hard, const T* others,
                            const T* soft, const T* inverse, const int32_t* const* labels,
                            T weight_sum, const T* class_weight, const T* fraction,
                            const Sink<T>& sink) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const int64_t tile = classes * N;
  F h[kRows], o[kRows];
  Labels<T> l[kRows];
  for (int r = 0; r < kRows; ++r) {
    h[r] = F::load(hard + r * N);
    o[r] = F::load(others + r * N);
    l[r] = load_labels<T>(labels[r]);
  }
  accumulate<T, kRows, kUpsample>(classes, fraction, sink, [&](int r, int64_t c) __attribute__((always_inline)) {
    const F u = power<kPower>(F::load(e + r * tile + c * N));
    const auto is_label = is_class(l[r], static_cast<int32_t>(c));
    F g = h[r] * cross_entropy_gradient_numerator(is_label, u, o[r]);
    if constexpr (kSmoothing) {
      const F p = u * F::load(inverse + r * N);
      const F w(class_weight == nullptr ? T(1) : class_weight[c]);
      g = fma(F::load(soft + r * N), F(weight_sum) * p - w, g);
    }
    return g;
  });
}

}  // namespace heteroakd::cpu::HAKD_ISA
