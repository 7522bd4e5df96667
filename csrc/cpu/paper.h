// The preset `paper` for one vector of pixels: one-vs-rest reliability per class (Eq. 5 to 10).
#pragma once

#include "statistics.h"

namespace heteroakd::cpu::HAKD_ISA {

template <typename F>
struct PaperPixel {
  F reliability, discrepancy;  // of the labelled class
  F strength_maximum, mixed_maximum;
};

// z_h into mixed[C][N] and H_s + dH into strength[C][N]. kMixes: not mix = teacher, where z_h is z_t,
// without a product by 0 that an infinite z_s would turn into NaN.
template <typename T, bool kMixes>
PaperPixel<Lanes<T>> paper_knowledge(int64_t classes, const T* student_z, const T* teacher_z,
                                     Labels<T> labels, T* mixed, T* strength) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const F lowest(-kInfinity<T>);
  PaperPixel<F> pixel{F(T(0)), F(T(0)), lowest, lowest};
  for (int64_t c = 0; c < classes; ++c) {
    const auto is_label = is_class(labels, static_cast<int32_t>(c));
    const F z_s = F::load(student_z + c * N);
    const F z_t = F::load(teacher_z + c * N);
    const F h_s = binary_cross_entropy(z_s, is_label);
    const F h_t = binary_cross_entropy(z_t, is_label);
    const F r_t = class_reliability(h_t, h_s);
    F z_h = z_t;
    if constexpr (kMixes) z_h = mixed_target(r_t, z_t, F(T(1)) - r_t, z_s);
    const F gap = class_discrepancy(h_s, binary_cross_entropy(z_h, is_label));
    const F v = h_s + gap;
    z_h.store(mixed + c * N);
    v.store(strength + c * N);
    pixel.strength_maximum = max(v, pixel.strength_maximum);
    pixel.mixed_maximum = max(z_h, pixel.mixed_maximum);
    pixel.reliability = select(is_label, r_t, pixel.reliability);
    pixel.discrepancy = select(is_label, gap, pixel.discrepancy);
  }
  return pixel;
}

template <typename F>
struct PaperSums {
  F inverse;  // 1 / (sum W~ sum m~): what q lacks
  F q, q_a;   // sum_c q_c and sum_c q_c a_s,c
};

// q_c = W_c m_c, without their denominators, into q[C][N] (q may be mixed).
template <typename T, bool kEvaluation>
PaperSums<Lanes<T>> paper_products(int64_t classes, const T* student_z, Lanes<T> student_m, T scale,
                                   const PaperPixel<Lanes<T>>& pixel, const T* mixed,
                                   const T* strength, T* q) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  F weight_total(T(0)), mixed_total(T(0));
  PaperSums<F> sums{F(T(1)), F(T(0)), F(T(0))};
  for (int64_t c = 0; c < classes; ++c) {
    const F student_a = (F::load(student_z + c * N) - student_m) * F(scale);
    F x = exp2((F::load(mixed + c * N) - pixel.mixed_maximum) * F(scale));
    mixed_total = mixed_total + x;
    if constexpr (kEvaluation) {
      const F w = exp2((F::load(strength + c * N) - pixel.strength_maximum) * F(T(kLog2E)));
      weight_total = weight_total + w;
      x = x * w;
    }
    x.store(q + c * N);
    sums.q = sums.q + x;
    sums.q_a = fma(x, student_a, sums.q_a);
  }
  sums.inverse = F(T(1)) / (kEvaluation ? weight_total * mixed_total : mixed_total);
  return sums;
}

// weight_axis = space, first sweep: maximum and sum of exp of the strengths over pixels, per class
// and lane, with a running maximum.
template <typename T>
void space_collect(int64_t classes, const T* strength, Mask<T> valid, T* maximum, T* sum) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  for (int64_t c = 0; c < classes; ++c) {
    const F v = select(valid, F::load(strength + c * N), F(T(-1e30)));
    const F before = F::load(maximum + c * N);
    const F now = max(v, before);
    // a NaN must show; max drops one in its first operand
    const F total = F::load(sum + c * N) * exp2((before - now) * F(T(kLog2E)));
    const F more = select(valid, exp2((v - now) * F(T(kLog2E))), F(T(0)));
    now.store(maximum + c * N);
    (total + more).store(sum + c * N);
  }
}

// weight_axis = space, second sweep: sum_c W_c KL(sigmoid(z_h / T) || sigmoid(z_s / T)) of a pixel;
// W_c (sigmoid(z_s / T) - sigmoid(z_h / T)) into g[C][N]. shift and weight: [C], null for W = 1.
template <typename T>
Lanes<T> space_products(int64_t classes, const T* student_z, const T* mixed, const T* strength,
                        T inverse_temperature, const T* shift, const T* weight, T* g) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  F sum(T(0));
  for (int64_t c = 0; c < classes; ++c) {
    const F a = F::load(mixed + c * N) * F(inverse_temperature);
    const F b = F::load(student_z + c * N) * F(inverse_temperature);
    F w(T(1));
    if (weight != nullptr) {
      w = exp2((F::load(strength + c * N) - F(shift[c])) * F(T(kLog2E))) * F(weight[c]);
    }
    sum = fma(w, bernoulli_kl(a, b), sum);
    (w * bernoulli_kl_gradient(a, b)).store(g + c * N);
  }
  return sum;
}

}  // namespace heteroakd::cpu::HAKD_ISA
