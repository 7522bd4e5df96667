// Distillation of softened distributions: `kd` in reference.py.
//
//     forward  value T^2 KL(p_t || p_s)                                  g_c = T (p_s,c - p_t,c)
//     reverse  value T^2 KL(p_s || p_t)
//     js       value T^2 (beta KL(p_t || m) + (1 - beta) KL(p_s || m)),  m = beta p_t + (1 - beta) p_s
//     skew     value T^2 KL(p_t || m), with alpha in the place of beta
//              of these  g_c = T p_s,c (f_c - sum_c p_s,c f_c)
//              reverse   f_c = log p_s,c - log p_t,c
//              js        f_c = (1 - beta) (log p_s,c - log m_c)
//              skew      f_c = (1 - alpha)^2 (p_s,c - p_t,c) / m_c, or - (1 - alpha) p_t,c / m_c
//     divided by |V|
//
// Both f_c of skew differ by a constant. The first is exact to rounding where both agree, the second where
// the student's classes are none of the teacher's: a pixel has that of its student's most likely class.
//
// g_c of the last three does not change when a constant is subtracted from every f_c. It is the f_c of
// the student's most likely class, the pivot: that class of a confident pixel then gets 0 - 0, where
// it would get the difference of two numbers as large as the logits. Logarithms in f_c are in units of log2, and
// with a_c in the place of log2 p_c = a_c - log2(total), which is a constant too.
#pragma once

#include "term.h"

namespace heteroakd {

// Of standardised logits, too.
struct KdOptions : TermDefaults {
  static constexpr int kNumberCount = 3, kChoiceCount = 2;
  static constexpr NumberRange kNumbers[] = {
      kTemperatureRange, {"beta", 0.0, 1.0}, {"alpha", 0.0, 1.0}};
  static constexpr ChoiceRange kChoices[] = {{"divergence", 4}, {"standardize", 2}};
};

struct KdTerm : KdOptions {
  HAKD_FN static constexpr bool takes(const int32_t* choice) { return choice[1] == 0; }
  enum Variant : int32_t { kForward, kReverse, kJs, kSkew };
  static constexpr int32_t kVariants = 4;

  template <typename S>
  struct Numbers {
    S beta, one_minus_beta;  // of skew alpha
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S) {
    const double beta = o.number[o.choice[0] == kSkew ? 2 : 1];
    return {static_cast<S>(beta), static_cast<S>(1.0 - beta)};
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
    F ratio;  // total_s / total_t; total_s m_c = beta ratio e_t,c + (1 - beta) e_s,c
    F first;  // skew: 1, or 0 of a pixel with the second f_c
  };
  template <typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t variant, const Numbers<S>& n, const PassNumbers<S>&,
                                const Totals<F>& t) {
    Known<F> k;
    if (variant == kReverse) k.pivot = reverse_ratio(F(0), t.teacher_at_top);
    if (variant == kJs || variant == kSkew) {
      k.ratio = t.student_total * t.teacher_inverse;
      const F e_t = exp2(t.teacher_at_top);
      if (variant == kJs) {
        k.pivot = F(0) - log2_of_share(fma(F(n.beta) * k.ratio, e_t, F(n.one_minus_beta)));
      } else {
        const F p_t = k.ratio * e_t;
        const F m = fma(F(n.beta), p_t, F(n.one_minus_beta));
        k.first = select(less(p_t, F(0.5) * m), F(0), F(1));
        k.pivot = (k.first - p_t) * reciprocal(m);
      }
    }
    return k;
  }

  template <typename F>
  struct Own {
    F student, teacher;  // sum_c e_s (f_c - pivot); js: sum_c e_t (a_t - log2 m_c)
                         // skew: sum_c e_t log2(p_t,c / m_c)
  };
  template <typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t variant, const Numbers<S>& n, const PassNumbers<S>&,
                               const Known<F>& k, const Class<F, M>& c, const First<F>&,
                               Own<F>& own) {
    F f;
    if (variant == kReverse) {
      f = reverse_ratio(c.student_a, c.teacher_a);
    } else if (variant == kJs) {
      const F log2_m = log2_of_share(
          mixed_target(F(n.beta) * k.ratio, c.teacher_e, F(n.one_minus_beta), c.student_e));
      own.teacher = fma(c.teacher_e, c.teacher_a - log2_m, own.teacher);
      f = c.student_a - log2_m;
    } else {  // all of it times total_s
      const F p_t = k.ratio * c.teacher_e;
      const F m = mixed_target(F(n.beta), p_t, F(n.one_minus_beta), c.student_e);
      const F inverse = reciprocal(max(F(1e-37), m));
      own.teacher = fma(c.teacher_e, log2_of_share(p_t * inverse), own.teacher);
      f = (k.first * c.student_e - p_t) * inverse;
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
    } else if (variant == kSkew) {
      value = own.teacher * t.teacher_inverse;
      const F more = select(less(F(0), known.first), F(n.one_minus_beta), F(1));
      k.other = (F(0) - per_p) * t.student_inverse * F(n.one_minus_beta) * more;
    }
    k.student = k.other * mean;
    k.value = square * (F(kLn2) * value);
    return k;
  }
};

}  // namespace heteroakd
