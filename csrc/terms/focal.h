// Focal loss: `focal` in reference.py. With p = softmax(z), q = 1 - p_y as the sum of the other classes:
//
//     value    alpha w_y q^gamma nll
//     g_c      alpha w_y f p_c, of the label - alpha w_y f q,   f = q^gamma (1 + gamma p_y nll / q)
//     divided by |V|, or the sum of w_y over V
#pragma once

#include "term.h"

namespace heteroakd {

struct FocalTerm : TermDefaults {
  static constexpr int kNumberCount = 2;
  static constexpr NumberRange kNumbers[] = {{"gamma", 0.0, 16.0}, {"alpha", 0.0, 1e6}};

  template <typename S>
  struct Numbers {
    S gamma, alpha;
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S) {
    return {static_cast<S>(o.number[0]), static_cast<S>(o.number[1])};
  }

  HAKD_FN static constexpr Needs needs(int32_t) {
    Needs n;
    n.student_nll = true;
    return n;
  }
  HAKD_FN static constexpr Denominator denominator(int32_t, bool weighted) {
    return weighted ? Denominator::kClassWeight : Denominator::kValid;
  }
  static constexpr bool kHasShares = true, kNeedsLabel = true;
  HAKD_FN static constexpr bool is_divergence(int32_t) { return false; }
  HAKD_FN static constexpr From student(int32_t) { return From::kStudentHard; }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kNone; }
  HAKD_FN static constexpr bool has_label(int32_t) { return true; }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t, const Numbers<S>& n, const PassNumbers<S>&,
                                       const Totals<F>& t, const Known<F>&, const Own<F>&, S scale) {
    // where the others underflow there is nothing to weigh
    const F q = max(t.student_others * t.hard_inverse, F(1e-37));
    const F weight = F(n.alpha) * t.label_weight * exp2(F(n.gamma) * log2(q));
    // nll / q is 1 where both vanish; where nll is infinite, p_y is 0
    const F ratio = min(F(1e30), quotient(t.student_nll, q));
    const F rises = fma(F(n.gamma) * (t.label_e * t.hard_inverse), ratio, F(1));
    Coefficients<F> k;
    k.value = weight * t.student_nll;
    k.share = t.label_weight;
    k.student = F(scale) * weight * rises * t.hard_inverse;
    k.other = F(0);
    k.label = (F(0) - t.student_others) * k.student;
    return k;
  }
};

}  // namespace heteroakd
