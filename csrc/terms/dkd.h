// Decoupled distillation: `dkd` in reference.py. With b the log-odds of the label against the rest and q
// the softmax over the other classes, both at T:
//
//     value    T^2 (alpha KL(sigmoid(b_t) || sigmoid(b_s)) + beta KL(q_t || q_s))
//     g_c      T ((beta - alpha D) q_s,c - beta q_t,c), of the label T alpha D,
//              D = sigmoid(b_s) - sigmoid(b_t)
//     divided by |V|
//
// q is from the maxima of the other classes alone: a confident pixel's others would all be 0 beside
// its label.
#pragma once

#include "term.h"

namespace heteroakd {

struct DkdTerm : TermDefaults {
  static constexpr int kNumberCount = 3;
  static constexpr NumberRange kNumbers[] = {
      {"alpha", 0.0, 1e6}, {"beta", 0.0, 1e6}, kTemperatureRange};
  static constexpr int kFirsts = 2;
  static constexpr bool kNeedsLabel = true;

  template <typename S>
  struct Numbers {
    S alpha, beta;
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S) {
    return {static_cast<S>(o.number[0]), static_cast<S>(o.number[1])};
  }

  HAKD_FN static constexpr Needs needs(int32_t) {
    Needs n;
    n.teacher = n.student_total = n.logits = true;
    return n;
  }
  HAKD_FN static constexpr From student(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr bool has_label(int32_t) { return true; }
  HAKD_FN static constexpr bool has_loop(int32_t) { return true; }
  HAKD_FN static constexpr int bounds(int32_t) { return 2; }

  template <typename F>
  struct Known {
    F student_label, teacher_label;  // a of the label, and the maxima of the others
    F student_bound, teacher_bound;
  };
  template <typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t, const Numbers<S>&, const PassNumbers<S>&,
                                const Totals<F>&) {
    return {F(0), F(0), F(-1e30), F(-1e30)};
  }

  template <typename S, typename F, typename M>
  HAKD_FN static First<F> first(int32_t, const Numbers<S>&, const PassNumbers<S>&, Known<F>& k,
                                const Class<F, M>& c) {
    k.student_label = select(c.is_label, c.student_a, k.student_label);
    k.teacher_label = select(c.is_label, c.teacher_a, k.teacher_label);
    const First<F> others{
        {select(c.is_label, F(-1e30), c.student_a), select(c.is_label, F(-1e30), c.teacher_a)}};
    k.student_bound = max(k.student_bound, others.v[0]);
    k.teacher_bound = max(k.teacher_bound, others.v[1]);
    return others;
  }

  template <typename F>
  struct Own {
    F student, teacher, difference;  // of the others: sum e_s, sum e_t, sum e_t (a_t - a_s)
  };
  template <typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t, const Numbers<S>&, const PassNumbers<S>&, const Known<F>&,
                               const Class<F, M>& c, const First<F>& first, Own<F>& own) {
    const F e_s = select(c.is_label, F(0), exp2(first.v[0]));
    const F e_t = select(c.is_label, F(0), exp2(first.v[1]));
    own.student = own.student + e_s;
    own.teacher = own.teacher + e_t;
    own.difference = fma(e_t, first.v[1] - first.v[0], own.difference);
    return {e_s, e_t};
  }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t, const Numbers<S>& n, const PassNumbers<S>& pass,
                                       const Totals<F>&, const Known<F>& known, const Own<F>& own,
                                       S scale) {
    // one class has no others
    const F total_s = max(own.student, F(1e-30)), total_t = max(own.teacher, F(1e-30));
    const F log2_s = log2(total_s), log2_t = log2(total_t);
    const F inverse_t = reciprocal(total_t);
    const F b_s = F(kLn2) * (known.student_label - known.student_bound - log2_s);
    const F b_t = F(kLn2) * (known.teacher_label - known.teacher_bound - log2_t);
    // p - 1 of a confident pixel keeps its relative precision in the sum of the others
    const auto confident = less(F(0), b_t);
    const F sign = select(confident, F(-1), F(1));
    const F d = sign * (sigmoid(sign * b_s) - sigmoid(sign * b_t));
    const F alpha = F(n.alpha), beta = F(n.beta), per_p = F(scale * pass.temperature);
    Coefficients<F> k;
    k.value = F(pass.temperature * pass.temperature) *
              (alpha * bernoulli_kl(b_t, b_s) + beta * kl(own.difference, inverse_t, log2_t, log2_s));
    k.student = per_p * (beta - alpha * d) * reciprocal(total_s);
    k.other = per_p * beta * inverse_t;
    k.label = per_p * alpha * d;
    return k;
  }
};

}  // namespace heteroakd
