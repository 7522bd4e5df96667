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

template <typename T, int kRows, bool kUpsample, typename Gradient>
HAKD_FN void accumulate(int64_t classes, const T* fraction, T* sum, T* upper,
                        const Gradient& gradient) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  F f[kRows];
  for (int r = 0; r < kRows; ++r) f[r] = F(kUpsample ? fraction[r] : T(0));
  for (int64_t c = 0; c < classes; ++c) {
    F total = F::load(sum + c * N);
    F high(T(0));
    if constexpr (kUpsample) high = F::load(upper + c * N);
    for (int r = 0; r < kRows; ++r) {
      const F g = gradient(r, c);
      total = total + g;
      if constexpr (kUpsample) high = fma(f[r], g, high);
    }
    total.store(sum + c * N);
    if constexpr (kUpsample) high.store(upper + c * N);
  }
}

// alpha_r x_c - beta_r y_c; x, y: tiles [kRows][C][N], alpha, beta: [kRows][N].
template <typename T, int kRows, bool kUpsample>
void pair_gradient(int64_t classes, const T* x, const T* y, const T* alpha, const T* beta,
                   const T* fraction, T* sum, T* upper) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const int64_t tile = classes * N;
  F a[kRows], b[kRows];
  for (int r = 0; r < kRows; ++r) {
    a[r] = F::load(alpha + r * N);
    b[r] = F::load(beta + r * N);
  }
  accumulate<T, kRows, kUpsample>(classes, fraction, sum, upper, [&](int r, int64_t c) __attribute__((always_inline)) {
    return fnma(b[r], F::load(y + r * tile + c * N), a[r] * F::load(x + r * tile + c * N));
  });
}

// hard_r q_c + (smoothing only) soft_r (weight_sum p_c - w_c) valid_r, with q from
// cross_entropy_gradient_numerator and e = tile^kPower. hard: hard / total, inverse: 1 / total.
template <typename T, int kPower, bool kSmoothing, int kRows, bool kUpsample>
void cross_entropy_gradient(int64_t classes, const T* e, const T* hard, const T* others,
                            const T* soft, const T* inverse, const int32_t* const* labels,
                            T weight_sum, const T* class_weight, const T* fraction, T* sum,
                            T* upper) {
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
  accumulate<T, kRows, kUpsample>(classes, fraction, sum, upper, [&](int r, int64_t c) __attribute__((always_inline)) {
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
