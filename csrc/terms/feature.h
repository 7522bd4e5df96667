// Squared difference in the aligned logits space: `feature` in reference.py.
//
//     value    sum_c (z_s,c - z_t,c)^2 / C          g_c = 2 / C (z_s,c - z_t,c)
//     divided by |V|
#pragma once

#include "term.h"

namespace heteroakd {

struct FeatureTerm : TermDefaults {
  template <typename S>
  struct Numbers {
    S mean;  // 1 / C
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options&, S classes) {
    return {S(1) / classes};
  }

  HAKD_FN static constexpr Needs needs(int32_t) {
    Needs n;
    n.teacher = n.logits = n.raw_logits = true;
    return n;
  }
  HAKD_FN static constexpr bool is_divergence(int32_t) { return false; }
  HAKD_FN static constexpr From student(int32_t) { return From::kStudentZ; }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kTeacherZ; }
  HAKD_FN static constexpr bool has_value_loop(int32_t) { return true; }
  static constexpr bool kHasValueLoop = true;

  template <typename F>
  struct Own {
    F sum;
  };
  template <typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t, const Numbers<S>&, const PassNumbers<S>&, const Known<F>&,
                               const Class<F, M>& c, const First<F>&, Own<F>& own) {
    const F gap = c.student_z - c.teacher_z;
    own.sum = fma(gap, gap, own.sum);
    return {F(0), F(0)};
  }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t, const Numbers<S>& n, const PassNumbers<S>&,
                                       const Totals<F>&, const Known<F>&, const Own<F>&, S scale) {
    Coefficients<F> k;
    k.value = F(n.mean);
    k.student = k.other = F(S(2) * scale * n.mean);
    return k;
  }
};

}  // namespace heteroakd
