// One-for-all distillation: `ofa` in reference.py. With p = softmax_T(z), eps the exponent, and the label's
// indicator 0 at an unlabelled pixel:
//
//     w_c      p_t,c^eps, of the label (1 + p_t,y)^eps - 1
//     value    - sum_c w_c log p_s,c
//     g_c      (W p_s,c - w_c) / T,   W = sum_c w_c
//     divided by |V|
//
// Sums are of the classes that are not the label's, so that W p_s,y - w_y of the label is p_s,y times
// their w less w_y times their p_s.
#pragma once

#include "term.h"

namespace heteroakd {

struct OfaTerm : TermDefaults {
  static constexpr int kNumberCount = 2;
  static constexpr NumberRange kNumbers[] = {{"eps", 0.01, 16.0}, kTemperatureRange};

  template <typename S>
  struct Numbers {
    S eps;
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S) {
    return {static_cast<S>(o.number[0])};
  }

  HAKD_FN static constexpr Needs needs(int32_t) {
    Needs n;
    n.teacher = n.pair = n.logits = true;
    return n;
  }
  HAKD_FN static constexpr bool is_divergence(int32_t) { return false; }
  HAKD_FN static constexpr From student(int32_t) { return From::kStudent; }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr bool has_label(int32_t) { return true; }
  HAKD_FN static constexpr bool has_loop(int32_t) { return true; }

  template <typename F>
  struct Known {
    F log2_total;  // of the teacher
  };
  template <typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t, const Numbers<S>&, const PassNumbers<S>&,
                                const Totals<F>& t) {
    return {t.teacher_log2};
  }

  template <typename F>
  struct Own {
    F power, cross, student;  // of the others: sum w, - sum w a_s, sum e_s
    F student_label, teacher_label, label_a;  // of the label: e_s, e_t, a_s; 0 without one
  };
  template <typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t, const Numbers<S>& n, const PassNumbers<S>&,
                               const Known<F>& known, const Class<F, M>& c, const First<F>&,
                               Own<F>& own) {
    const F zero(0);
    const F power = select(c.is_label, zero, exp2(F(n.eps) * (c.teacher_a - known.log2_total)));
    own.power = own.power + power;
    own.cross = fnma(power, c.student_a, own.cross);
    own.student = own.student + select(c.is_label, zero, c.student_e);
    own.student_label = own.student_label + select(c.is_label, c.student_e, zero);
    own.teacher_label = own.teacher_label + select(c.is_label, c.teacher_e, zero);
    own.label_a = own.label_a + select(c.is_label, c.student_a, zero);
    return {zero, power};
  }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t, const Numbers<S>& n, const PassNumbers<S>& pass,
                                       const Totals<F>& t, const Known<F>&, const Own<F>& own,
                                       S scale) {
    const F label = 
        exponential_less_one<S>(F(n.eps) * log1p_unit(min(F(1), own.teacher_label * t.teacher_inverse)));
    const F nll = negative_log_likelihood(own.student, own.student_label, own.label_a * F(kLn2));
    const F per_w(scale * pass.inverse_temperature);
    Coefficients<F> k;
    k.value = fma(F(kLn2), fma(own.power, t.student_log2, own.cross),
                  select(less(F(0), label), label * nll, F(0)));
    k.student = per_w * (own.power + label) * t.student_inverse;
    k.other = per_w;
    k.label = per_w * t.student_inverse * (own.power * own.student_label - label * own.student);
    return k;
  }
};

}  // namespace heteroakd
