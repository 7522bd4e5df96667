// Channel-wise distillation: `cwd` in reference.py. Softmaxes p over the valid pixels of each image
// and class, at a temperature of the term's own.
//
//     value    T^2 sum_c p_t (log p_t - log p_s)         g_c = T (p_s,c - p_t,c)
//     divided by images with a valid pixel times C
//
// What is summed is p_t l - p_t + p_s with l = log p_t - log p_s, which is the same, because both p
// sum to 1 over the pixels: no addend is negative, and near agreement, where l is small, each is p_t
// times a series that starts with l^2 / 2. An error of l, whose totals are sums over a whole image,
// then counts times l.
#pragma once

#include "term.h"

namespace heteroakd {

struct CwdTerm : TermDefaults {
  static constexpr int kNumberCount = 1;
  static constexpr NumberRange kNumbers[] = {kTemperatureRange};
  static constexpr bool kOwnTemperature = true;
  static constexpr int kFirsts = 2;

  template <typename S>
  struct Numbers {
    S temperature, inverse;
  };
  template <typename S>
  HAKD_FN static Numbers<S> numbers(const Options& o, S) {
    return {static_cast<S>(o.number[0]), static_cast<S>(1.0 / o.number[0])};
  }

  HAKD_FN static constexpr Needs needs(int32_t) {
    Needs n;
    n.teacher = n.logits = n.raw_logits = true;
    return n;
  }
  HAKD_FN static constexpr Denominator denominator(int32_t, bool) { return Denominator::kImages; }
  HAKD_FN static constexpr From student(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr bool has_value_loop(int32_t) { return true; }
  static constexpr bool kHasValueLoop = true, kOverSpace = true;
  HAKD_FN static constexpr int spaces(int32_t) { return 2; }

  // z_s / T and z_t / T.
  template <typename S, typename F, typename M>
  HAKD_FN static First<F> first(int32_t, const Numbers<S>& n, const PassNumbers<S>&, Known<F>&,
                                const Class<F, M>& c) {
    return {c.student_z * F(n.inverse), c.teacher_z * F(n.inverse)};
  }

  template <typename F>
  struct Own {
    F sum;
  };
  template <typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t, const Numbers<S>& n, const PassNumbers<S>&, const Known<F>&,
                               const Class<F, M>& c, const First<F>&, Own<F>& own) {
    const F p_s = c.space[0], p_t = c.space[1];
    const F l = fma(F(n.inverse), c.teacher_z - c.student_z, c.space_log[0] - c.space_log[1]);
    const F series = exponential_series(F(0) - l);  // (l - 1 + e^-l) / l^2 where l is small
    // of what has no share l may be infinite
    const F weighted = select(less(F(0), p_t), p_t * l, F(0));
    own.sum = own.sum + select(less(abs(l), F(kSmallExponent<S>)), p_t * (l * l * series), weighted - p_t + p_s);
    return {p_s, p_t};
  }

  template <typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t, const Numbers<S>& n, const PassNumbers<S>&,
                                       const Totals<F>&, const Known<F>&, const Own<F>&, S scale) {
    Coefficients<F> k;
    k.value = F(n.temperature * n.temperature);
    k.student = k.other = F(scale * n.temperature);
    return k;
  }
};

}  // namespace heteroakd
