// HeteroAKD, preset paper (Eq. 5 to 10): `_evaluate_paper` and `hetero` in reference.py.
//
//     errors       H = BCE(sigmoid(z_c), [c = y]), of student and teacher
//     reliability  r_t,c = (H_s + eps) / (H_t + H_s + 2 eps)
//     target       z_h = r_t z_t + (1 - r_t) z_s, or z_t
//     discrepancy  dH = max(0, H_s - H_h); W = softmax(H_s + dH) over classes, or over space
//     value        -sum_c W_c m_c log p_s,c,  m = softmax_T(z_h)      q_c = W_c m_c,
//                  g_c = (p_s,c sum_c q_c - q_c) / T                  divided by |V|
//     no label     r_t = 1, and no errors: H_s + dH is 0 of every class
//     over space   T^2 sum_c W_c KL(sigmoid(z_h / T) || sigmoid(z_s / T)), divided by images x C,
//                  g_c = T W_c (sigmoid(z_s / T) - sigmoid(z_h / T)); without evaluation W = 1 / C
//                  and it is divided by |V|
#pragma once

#include "hetero.h"

namespace heteroakd {

struct PaperTerm : HeteroOptions {
  HAKD_FN static constexpr bool takes(const int32_t* choice) {
    return choice[kPreset] == 1 && choice[kMix] != kProbs;
  }
  enum Variant : int32_t { kMixes = 1, kEvaluates = 2, kSpace = 4 };  // bits
  static constexpr int32_t kVariants = 8, kFirstBits = kMixes;
  static constexpr int kFirsts = 2;

  HAKD_FN static constexpr int32_t variant(const Options& o) {
    return (o.choice[kMix] == kLogits ? kMixes : 0) | (o.choice[kEvaluation] == 0 ? kEvaluates : 0) |
           (o.choice[kWeightAxis] == 1 ? kSpace : 0);
  }
  HAKD_FN static constexpr Needs needs(int32_t variant) {
    Needs n;
    n.teacher = n.logits = n.raw_logits = true;
    n.student_total = (variant & kSpace) == 0;
    return n;
  }
  HAKD_FN static constexpr Denominator denominator(int32_t variant, bool) {
    return spaces(variant) > 0 ? Denominator::kImages : Denominator::kValid;
  }
  static constexpr bool kOwnGradient = true;
  HAKD_FN static constexpr From student(int32_t variant) {
    return (variant & kSpace) != 0 ? From::kNone : From::kStudent;
  }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr bool has_loop(int32_t variant) { return (variant & kSpace) == 0; }
  HAKD_FN static constexpr bool has_value_loop(int32_t variant) { return (variant & kSpace) != 0; }
  static constexpr bool kHasValueLoop = true, kOverSpace = true;
  HAKD_FN static constexpr int bounds(int32_t variant) { return (variant & kSpace) != 0 ? 0 : 2; }
  HAKD_FN static constexpr int spaces(int32_t variant) {
    return (variant & kSpace) != 0 && (variant & kEvaluates) != 0 ? 1 : 0;
  }

  template <typename F>
  struct Known {
    F reliability, discrepancy;  // of the labelled class
  };
  template <typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t, const Numbers<S>&, const PassNumbers<S>&,
                                const Totals<F>&) {
    return {F(0), F(0)};
  }

  // H_s + dH and z_h.
  template <typename S, typename F, typename M>
  HAKD_FN static First<F> first(int32_t variant, const Numbers<S>&, const PassNumbers<S>&,
                                Known<F>& k, const Class<F, M>& c) {
    const F h_s = binary_cross_entropy(c.student_z, c.is_label);
    const F h_t = binary_cross_entropy(c.teacher_z, c.is_label);
    const F r_t = select(c.unlabelled, F(1), class_reliability(h_t, h_s));
    F z_h = c.teacher_z;  // without a product by 0 that an infinite z_s would turn into NaN
    if ((variant & kMixes) != 0) {
      z_h = select(c.unlabelled, z_h, mixed_target(r_t, z_h, F(1) - r_t, c.student_z));
    }
    const F gap = class_discrepancy(h_s, binary_cross_entropy(z_h, c.is_label));
    k.reliability = select(either(c.is_label, c.unlabelled), r_t, k.reliability);
    k.discrepancy = select(c.is_label, gap, k.discrepancy);
    return {select(c.unlabelled, F(0), h_s + gap), z_h};
  }

  template <typename F>
  struct Own {
    F weight_total, mixed_total, q, q_a;  // without the denominators of W and m; q_a: sum q_c a_s,c
    F sum;                                // over space
  };
  template <typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t variant, const Numbers<S>&, const PassNumbers<S>& pass,
                               const Known<F>&, const Class<F, M>& c, const First<F>& first,
                               Own<F>& own) {
    if ((variant & kSpace) == 0) {
      F q = exp2(first.v[1] * F(pass.scale));
      own.mixed_total = own.mixed_total + q;
      if ((variant & kEvaluates) != 0) {
        const F w = exp2(first.v[0] * F(kLog2E));
        own.weight_total = own.weight_total + w;
        q = q * w;
      }
      own.q = own.q + q;
      own.q_a = fma(q, c.student_a, own.q_a);
      return {F(0), q};
    }
    const F a = first.v[1] * F(pass.inverse_temperature);
    const F b = c.student_z * F(pass.inverse_temperature);
    F kl = bernoulli_kl(a, b);
    F g = bernoulli_kl_gradient(a, b);
    if (spaces(variant) > 0) {
      kl = c.space[0] * kl;
      g = c.space[0] * g;
    }
    own.sum = own.sum + kl;
    return {F(0), g};
  }
  static constexpr bool kRescales = true;
  template <typename S, typename F>
  HAKD_FN static void rescale(int32_t variant, const PassNumbers<S>& pass, Own<F>& own,
                              const F* drop) {
    F both = exp2(drop[1] * F(pass.scale));
    own.mixed_total = own.mixed_total * both;
    if ((variant & kEvaluates) != 0) {
      const F factor = exp2(drop[0] * F(kLog2E));
      own.weight_total = own.weight_total * factor;
      both = both * factor;
    }
    own.q = own.q * both;
    own.q_a = own.q_a * both;
  }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t variant, const Numbers<S>&,
                                       const PassNumbers<S>& pass, const Totals<F>& t,
                                       const Known<F>&, const Own<F>& own, S scale) {
    Coefficients<F> k;
    if ((variant & kSpace) != 0) {
      const S mean = spaces(variant) > 0 ? S(1) : S(1) / pass.classes;
      k.value = F(pass.temperature * pass.temperature * mean);
      k.student = F(0);
      k.other = F(S(0) - scale * pass.temperature * mean);
      return k;
    }
    const bool evaluates = (variant & kEvaluates) != 0;
    const F inverse =
        reciprocal(evaluates ? own.weight_total * own.mixed_total : own.mixed_total);
    k.value = F(kLn2) * (t.student_log2 * own.q - own.q_a) * inverse;
    k.other = F(scale * pass.inverse_temperature) * inverse;
    k.student = k.other * own.q * t.student_inverse;
    return k;
  }
};

}  // namespace heteroakd
