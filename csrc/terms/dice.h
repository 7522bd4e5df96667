// Soft Dice loss: `dice` in reference.py, a function of three sums over the labelled pixels for each
// class: FP of p_c at pixels of other classes, FN of 1 - p_c and TP of p_c at its own; p = softmax(z_s).
//
//     value    sum over the classes that occur of m / (TP + m + s), m = (FP + FN) / 2, or -log of
//              the rest
//     g_c      p_c (f_c - sum p f),    f_c = u_c, of the label -v_c
//     divided by C
//
// u_c and v_c are the derivatives of the value by FP_c and FN_c. 1 - p_y is the sum of the others.
#pragma once

#include <cmath>

#include "term.h"

namespace heteroakd {

constexpr double kOverlapEps = 1e-7;  // least denominator, and before its logarithm least overlap

struct DiceTerm : TermDefaults {
  static constexpr int kNumberCount = 1, kChoiceCount = 1;
  static constexpr NumberRange kNumbers[] = {{"smooth", 0.0, 1e6}};
  static constexpr ChoiceRange kChoices[] = {{"log", 2}};
  static constexpr bool kNeedsLabel = true;
  static constexpr int kTallies = 3;

  HAKD_FN static constexpr Needs needs(int32_t) {
    Needs n;
    n.student_nll = true;
    return n;
  }
  HAKD_FN static constexpr Denominator denominator(int32_t, bool) { return Denominator::kClasses; }
  HAKD_FN static constexpr From student(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr bool has_loop(int32_t) { return true; }
  static constexpr int kFirsts = 1;
  HAKD_FN static constexpr int bounds(int32_t) { return 1; }

  template <typename F, typename M>
  HAKD_FN static Tally<F> tally(const Totals<F>& t, const Class<F, M>& c) {
    const F zero(0);
    return {{select(c.is_label, zero, c.student_hard * t.hard_inverse),
             select(c.is_label, t.student_others * t.hard_inverse, zero),
             select(c.is_label, t.label_e * t.hard_inverse, zero)}};
  }

  // A fraction missed / whole, whose parts are right + smooth and a FP + b FN; of a class without pixels
  // there is none. log: -log of the rest.
  HAKD_FN static Settled overlap(const double* sums, double a, double b, double smooth, bool log) {
    const double missed = a * sums[0] + b * sums[1], right = sums[2] + smooth;
    if (sums[1] + sums[2] == 0.0) return {0.0, {0.0, 0.0}};
    double whole = right + missed, value = missed / whole, per_right = missed / (whole * whole);
    double u = right / (whole * whole) * a, v = right / (whole * whole) * b + per_right;
    if (whole < kOverlapEps) {
      value = 1.0 - right / kOverlapEps;
      u = 0.0;
      v = 1.0 / kOverlapEps;
    }
    if (log) {
      const double rest = 1.0 - value;
      const bool least = rest < kOverlapEps;
      value = least ? -::log(kOverlapEps) : -::log1p(-value);
      u = least ? 0.0 : u / rest;
      v = least ? 0.0 : v / rest;
    }
    return {value, {u, v}};
  }
  HAKD_FN static Settled settle(const Options& o, const double* sums) {
    return overlap(sums, 0.5, 0.5, o.number[0], o.choice[0] != 0);
  }

  // The derivative by p of the class with the largest e so far, which all others are taken relative to:
  // what a confident pixel's classes share cancels in the gradient.
  template <typename F>
  struct Known {
    F top, pivot;
  };
  template <typename S, typename N, typename F>
  HAKD_FN static Known<F> begin(int32_t, const N&, const PassNumbers<S>&, const Totals<F>&) {
    return {F(-1), F(0)};
  }
  template <typename F, typename M>
  HAKD_FN static F slope(const Class<F, M>& c) {
    return select(c.is_label, F(0) - c.space[1], c.space[0]);
  }
  template <typename N, typename S, typename F, typename M>
  HAKD_FN static First<F> first(int32_t, const N&, const PassNumbers<S>&, Known<F>& k,
                                const Class<F, M>& c) {
    const M above = less(k.top, c.student_hard);
    k.top = select(above, c.student_hard, k.top);
    k.pivot = select(above, slope(c), k.pivot);
    return {{c.student_hard, F(0)}};
  }
  static constexpr bool kRescales = true;  // `other` does
  template <typename S, typename O, typename F>
  HAKD_FN static void rescale(int32_t, const PassNumbers<S>&, O&, const F*) {}

  template <typename F>
  struct Own {
    F sum, total, pivot;  // sum e (slope - pivot), sum e
  };
  template <typename N, typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t, const N&, const PassNumbers<S>&, const Known<F>& known,
                               const Class<F, M>& c, const First<F>&, Own<F>& own) {
    const F x = c.student_hard * (slope(c) - known.pivot);
    own.sum = fma(own.pivot - known.pivot, own.total, own.sum) + x;
    own.total = own.total + c.student_hard;
    own.pivot = known.pivot;
    return {x, c.student_hard};
  }

  template <typename N, typename S, typename K, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t, const N&, const PassNumbers<S>&, const Totals<F>& t,
                                       const K&, const Own<F>& own, S scale) {
    const F per_e = F(scale) * t.hard_inverse;
    Coefficients<F> k;
    k.value = k.share = k.label = F(0);
    k.student = per_e;
    k.other = per_e * (own.sum * t.hard_inverse);
    return k;
  }
};

}  // namespace heteroakd
