// Distillation of softened distributions: `kd` in reference.py.
//
//     forward  value T^2 KL(p_t || p_s)                                  g_c = T (p_s,c - p_t,c)
//     reverse  value T^2 KL(p_s || p_t)
//     js       value T^2 (beta KL(p_t || m) + (1 - beta) KL(p_s || m))
//              of both   g_c = T p_s,c (f_c - sum_c p_s,c f_c)
//              reverse   f_c = log p_s,c - log p_t,c
//              js        f_c = (1 - beta) (log p_s,c - log m_c)
//     divided by |V|
//
// g_c of the last two does not change when a constant is subtracted from every f_c. It is the f_c of
// the student's most likely class, the pivot: that class of a confident pixel then gets 0 - 0, where
// it would get the difference of two numbers as large as the logits. f_c is in units of log2, and
// with a_c in the place of log2 p_c = a_c - log2(total), which is a constant too.
#pragma once

#include "term.h"

namespace heteroakd {

struct KdTerm : TermDefaults {
  static constexpr int kNumberCount = 2, kChoiceCount = 1;
  static constexpr NumberRange kNumbers[] = {kTemperatureRange, {"beta", 0.0, 1.0}};
  static constexpr ChoiceRange kChoices[] = {{"divergence", 3}};
  enum Variant : int32_t { kForward, kReverse, kJs };
  static constexpr int32_t kVariants = 3;

  template <typename S>
  struct Numbers {
    S beta, one_minus_beta;
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S) {
    return {static_cast<S>(o.number[1]), static_cast<S>(1.0 - o.number[1])};
  }

  HAKD_FN static constexpr int32_t variant(const Options& o) { return o.choice[0]; }
  HAKD_FN static constexpr Needs needs(int32_t variant) {
    Needs n;
    n.teacher = n.pair = true;
    n.teacher_at_top = n.logits = variant != kForward;
    return n;
  }
  HAKD_FN static constexpr From student(int32_t) { return From::kStudent; }
  HAKD_FN static constexpr From other_from(int32_t variant) {
    return variant == kForward ? From::kTeacher : From::kOwn;
  }
  HAKD_FN static constexpr bool has_loop(int32_t variant) { return variant != kForward; }

  template <typename F>
  struct Known {
    F pivot;
    F teacher, student;  // js: total_s m_c = teacher e_t,c + student e_s,c
  };
  template <typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t variant, const Numbers<S>& n, const PassNumbers<S>&,
                                const Totals<F>& t) {
    Known<F> k;
    if (variant == kReverse) k.pivot = reverse_ratio(F(0), t.teacher_at_top);
    if (variant == kJs) {
      k.teacher = F(n.beta) * (t.student_total * t.teacher_inverse);
      k.student = F(n.one_minus_beta);
      k.pivot = F(0) - log2_of_share(fma(k.teacher, exp2(t.teacher_at_top), k.student));
    }
    return k;
  }

  template <typename F>
  struct Own {
    F student, teacher;  // sum_c e_s (f_c - pivot); js: sum_c e_t (a_t - log2 m_c)
  };
  template <typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t variant, const Numbers<S>&, const PassNumbers<S>&,
                               const Known<F>& k, const Class<F, M>& c, const First<F>&,
                               Own<F>& own) {
    F f;
    if (variant == kReverse) {
      f = reverse_ratio(c.student_a, c.teacher_a);
    } else {
      const F log2_m = log2_of_share(mixed_target(k.teacher, c.teacher_e, k.student, c.student_e));
      own.teacher = fma(c.teacher_e, c.teacher_a - log2_m, own.teacher);
      f = c.student_a - log2_m;
    }
    const F y = c.student_e * (f - k.pivot);
    own.student = own.student + y;
    return {F(0), y};
  }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t variant, const Numbers<S>& n,
                                       const PassNumbers<S>& pass, const Totals<F>& t,
                                       const Known<F>& known, const Own<F>& own, S scale) {
    const F per_p(scale * pass.temperature);
    const F square(pass.temperature * pass.temperature);
    Coefficients<F> k;
    if (variant == kForward) {
      k.value = square * t.kl;
      k.student = per_p * t.student_inverse;
      k.other = per_p * t.teacher_inverse;
      return k;
    }
    const F log2_ratio = t.student_log2 - t.teacher_log2;
    const F mean = own.student * t.student_inverse;
    k.other = (F(0) - per_p) * F(kLn2) * t.student_inverse;
    F value = mean + known.pivot - log2_ratio;
    if (variant == kJs) {
      value = fma(F(n.beta), fma(own.teacher, t.teacher_inverse, log2_ratio),
                  F(n.one_minus_beta) * (mean + known.pivot));
      k.other = k.other * F(n.one_minus_beta);
    }
    k.student = k.other * mean;
    k.value = square * (F(kLn2) * value);
    return k;
  }
};

}  // namespace heteroakd
