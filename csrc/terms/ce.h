// Cross entropy: `cross_entropy` in reference.py; of the teacher's logits in a pass over those.
//
//     value    w_y (1 - s) nll + s / C (W log(total) - sum_c w_c (z_c - m)),    W = sum_c w_c
//     g_c      ((1 - s) w_y + s W / C) p_c - (s / C) w_c; of the label (1 - s) w_y (p_y - 1) + ...
//     divided by |V|, or the sum of w_y over V
#pragma once

#include "term.h"

namespace heteroakd {

struct CrossEntropyTerm : TermDefaults {
  static constexpr int kNumberCount = 1;
  static constexpr NumberRange kNumbers[] = {{"label_smoothing", 0.0, 1.0}};
  enum Variant : int32_t { kPlain, kSmoothed };
  static constexpr int32_t kVariants = 2;

  template <typename S>
  struct Numbers {
    S hard, soft;  // 1 - s, s / C
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S classes) {
    return {static_cast<S>(1.0 - o.number[0]), static_cast<S>(o.number[0]) / classes};
  }

  HAKD_FN static constexpr int32_t variant(const Options& o) {
    return o.number[0] != 0.0 ? kSmoothed : kPlain;
  }
  HAKD_FN static constexpr Needs needs(int32_t variant) {
    Needs n;
    n.student_nll = true;
    n.weighted_z = variant == kSmoothed;
    return n;
  }
  HAKD_FN static constexpr Denominator denominator(int32_t, bool weighted) {
    return weighted ? Denominator::kClassWeight : Denominator::kValid;
  }
  static constexpr bool kHasShares = true, kNeedsLabel = true;
  HAKD_FN static constexpr bool is_divergence(int32_t) { return false; }
  HAKD_FN static constexpr From student(int32_t) { return From::kStudentHard; }
  HAKD_FN static constexpr From other_from(int32_t variant) {
    return variant == kSmoothed ? From::kClassWeight : From::kNone;
  }
  HAKD_FN static constexpr bool has_label(int32_t) { return true; }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t variant, const Numbers<S>& n,
                                       const PassNumbers<S>& pass, const Totals<F>& t,
                                       const Known<F>&, const Own<F>&, S scale) {
    const F hard = F(n.hard) * t.label_weight;
    const F per_e = F(scale) * hard * t.hard_inverse;
    Coefficients<F> k;
    k.value = hard * t.student_nll;
    k.share = t.label_weight;
    k.student = per_e;
    k.other = F(0);
    // p - 1 of a confident pixel keeps its relative precision in the sum of the others
    k.label = (F(0) - t.student_others) * per_e;
    if (variant == kSmoothed) {
      const F soft = F(n.soft) * F(scale);
      const F weight_sum(pass.weight_sum);
      k.value = k.value + F(n.soft) * (weight_sum * log(t.hard_total) - t.weighted_z);
      k.student = fma(soft * weight_sum, t.hard_inverse, k.student);
      k.other = soft;
      k.label = fma(soft, weight_sum * (t.label_e * t.hard_inverse) - t.label_weight, k.label);
    }
    return k;
  }
};

}  // namespace heteroakd
