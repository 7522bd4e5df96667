// HeteroAKD, preset softmax-kl: `hetero` and `_evaluate_softmax_kl` in reference.py.
//
//     reliability  (r_t, r_s) = softmax(-nll_t / tau, -nll_s / tau)
//     target       m = r_t p_t + r_s p_s ("probs"), softmax(r_t z_t + r_s z_s) ("logits") or p_t
//     discrepancy  d = KL(p_t || p_s), or 1 without evaluation
//     value        d T^2 KL(m || p_s)            g_c = d T (p_s,c - m_c), r and d held fixed;
//                                                of "probs" d T r_t (p_s,c - p_t,c)
//     divided by the sum of d over V
#pragma once

#include "term.h"

namespace heteroakd {

// Of both presets.
struct HeteroOptions : TermDefaults {
  static constexpr int kNumberCount = 2, kChoiceCount = 4;
  static constexpr NumberRange kNumbers[] = {kTemperatureRange, {"tau", 1e-4, 1e4}};
  static constexpr ChoiceRange kChoices[] = {
      {"preset", 2}, {"mix", 3}, {"evaluation", 2}, {"weight_axis", 2}};
  enum ChoiceIndex { kPreset, kMix, kEvaluation, kWeightAxis };
  enum Mix : int32_t { kProbs, kLogits, kTeacherOnly };
  static constexpr bool kMapped = true;
};

struct HeteroTerm : HeteroOptions {
  HAKD_FN static constexpr bool takes(const int32_t* choice) {
    return choice[kPreset] == 0 && choice[kWeightAxis] == 0;
  }
  static constexpr int32_t kVariants = 3;  // Mix
  static constexpr int kFirsts = 1;

  template <typename S>
  struct Numbers {
    S inverse_tau;
    bool evaluates;
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S) {
    return {S(1) / static_cast<S>(o.number[1]), o.choice[kEvaluation] == 0};
  }

  HAKD_FN static constexpr int32_t variant(const Options& o) { return o.choice[kMix]; }
  HAKD_FN static constexpr Needs needs(int32_t mix) {
    Needs n;
    n.teacher = n.student_nll = n.teacher_nll = n.pair = true;
    n.mixture = mix == kProbs;
    n.logits = mix == kLogits;
    return n;
  }
  HAKD_FN static constexpr Denominator denominator(int32_t, bool) { return Denominator::kShares; }
  static constexpr bool kOwnGradient = true, kHasShares = true;
  HAKD_FN static constexpr From student(int32_t) { return From::kStudent; }
  HAKD_FN static constexpr From other_from(int32_t mix) {
    return mix == kLogits ? From::kOwn : From::kTeacher;
  }
  HAKD_FN static constexpr bool has_loop(int32_t mix) { return mix == kLogits; }
  HAKD_FN static constexpr bool has_value_loop(int32_t mix) { return mix == kProbs; }
  static constexpr bool kHasValueLoop = true;
  HAKD_FN static constexpr int bounds(int32_t mix) { return mix == kLogits ? 1 : 0; }

  template <typename F>
  struct Known {
    F reliability, discrepancy;
    // probs: total_s m_c = teacher e_t,c + student e_s,c; logits: a_h,c = teacher a_t,c + student a_s,c
    F teacher, student;
  };
  template <typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t mix, const Numbers<S>& n, const PassNumbers<S>&,
                                const Totals<F>& t) {
    const Reliability<F> r = heteroakd::reliability(t.teacher_nll, t.student_nll, F(n.inverse_tau));
    Known<F> k;
    k.reliability = r.teacher;
    k.discrepancy = max(F(0), t.kl);  // a KL is never negative, its rounding may be
    k.teacher = mix == kProbs ? r.teacher * (t.student_total * t.teacher_inverse) : r.teacher;
    k.student = r.student;
    return k;
  }

  template <typename S, typename F, typename M>
  HAKD_FN static First<F> first(int32_t, const Numbers<S>&, const PassNumbers<S>&, Known<F>& k,
                                const Class<F, M>& c) {
    return {mixed_target(k.teacher, c.teacher_a, k.student, c.student_a), F(0)};
  }

  template <typename F>
  struct Own {
    F sum;                // probs: sum_c x_c (log2 x_c - a_s,c), x_c = total_s m_c
    F total, difference;  // logits: sum_c e_h, sum_c e_h (a_h - a_s)
  };
  // Of probs: what is left of the sum where loops have no a_s at hand.
  template <typename F>
  HAKD_FN static void start(int32_t mix, const Known<F>& k, const Totals<F>& t, Own<F>& own) {
    if (mix != kProbs) return;
    own.sum = F(0) - mixed_target(k.teacher, t.teacher_cross, k.student, t.student_self);
  }
  template <typename S, typename F, class AnyClass>
  HAKD_FN static Pair<F> other(int32_t mix, const Numbers<S>&, const PassNumbers<S>&,
                               const Known<F>& k, const AnyClass& c, const First<F>& first,
                               Own<F>& own) {
    if constexpr (AnyClass::kBounded) {
      if (mix == kProbs) {  // what keeps the logarithm finite is lost in any sum, and costs nothing
        const F x = fma(k.teacher, c.teacher_e, fma(k.student, c.student_e, F(1e-37)));
        own.sum = fma(x, fast_log2(x) - c.student_a, own.sum);
        return {F(0), F(0)};
      }
    } else if (mix == kProbs) {
      const F x = mixed_target(k.teacher, c.teacher_e, k.student, c.student_e);
      own.sum = fma(x, log2_of_share(x) - c.student_a, own.sum);
      return {F(0), F(0)};
    }
    const F a = first.v[0];
    const F e = exp2(a);
    own.total = own.total + e;
    own.difference = fma(e, a - c.student_a, own.difference);
    return {F(0), e};
  }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t mix, const Numbers<S>& n,
                                       const PassNumbers<S>& pass, const Totals<F>& t,
                                       const Known<F>& known, const Own<F>& own, S scale) {
    const F square(pass.temperature * pass.temperature);
    Coefficients<F> k;
    k.share = n.evaluates ? known.discrepancy : F(1);
    F per_p = F(scale * pass.temperature) * k.share;
    F value = t.kl, inverse = t.teacher_inverse;
    if (mix == kProbs) {
      value = F(kLn2) * t.student_inverse;
      per_p = per_p * known.reliability;
    } else if (mix == kLogits) {
      inverse = reciprocal(own.total);
      value = kl(own.difference, inverse, log2(own.total), t.student_log2);
    }
    k.value = k.share * square * value;
    k.student = per_p * t.student_inverse;
    k.other = per_p * inverse;
    return k;
  }
};

}  // namespace heteroakd
