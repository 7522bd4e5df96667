// The formulas that several terms (../terms) or kernels share, in the names and the order of
// `reference.py`; sections as there.
//
// A pixel arrives as sums over its classes. For one model with logits z_c, their maximum m and a
// temperature T,
//     a_c = (z_c - m) log2(e) / T,   e_c = 2^a_c,   total = sum_c e_c,   softmax_T(z)_c = e_c / total.
// `others` is the same sum without the labelled class. Base 2, because that is what the machine
// has; a `log2_total` is log2(total).
//
// `F` is one pixel or a vector of pixels, `M` what a comparison of two of them gives: see scalar.h.
#pragma once

#include "elementary.h"
#include "macros.h"

namespace heteroakd {

// --- section 3: terms --------------------------------------------------------------------------

// -log softmax(z)_label = log(1 + others / e_label). The textbook log(total) - z_label loses the
// value's relative precision for a confident pixel, where others / e_label is small: there 1 + it
// is what is taken the logarithm of, and what that sum rounded away is given back, to first order.
// Where the label is unlikely, e_label may be 0, and the textbook form has nothing to lose.
template <typename F>
HAKD_FN F negative_log_likelihood(F others, F label_e, F label_z_minus_m) {
  const F ratio = quotient(others, label_e);
  const auto confident = less(ratio, F(1));
  const F u = select(confident, F(1) + ratio, others + label_e);
  return log(u) + select(confident, ratio - (u - F(1)), F(0) - label_z_minus_m);
}

// KL(a || b), from sum_c e_a,c (a_a,c - a_b,c).
template <typename F>
HAKD_FN F kl(F weighted_difference, F inverse_total_a, F log2_total_a, F log2_total_b) {
  return F(kLn2) * (weighted_difference * inverse_total_a - log2_total_a + log2_total_b);
}

// (e^x - 1 - x) / x^2 to a rounding of itself, for |x| < kSmallExponent<S>.
template <typename S>
constexpr double kSmallExponent = sizeof(S) == 8 ? 1.0 / 64 : 0.5;
template <typename F>
HAKD_FN F exponential_series(F x) {
  F series = F(1.0 / 40320);
  series = fma(series, x, F(1.0 / 5040));
  series = fma(series, x, F(1.0 / 720));
  series = fma(series, x, F(1.0 / 120));
  series = fma(series, x, F(1.0 / 24));
  series = fma(series, x, F(1.0 / 6));
  return fma(series, x, F(0.5));
}

// e^x - 1 of x >= 0, in relative precision.
template <typename S, typename F>
HAKD_FN F exponential_less_one(F x) {
  const F small = fma(x * x, exponential_series(x), x);
  return select(less(x, F(kSmallExponent<S>)), small, exp2(x * F(kLog2E)) - F(1));
}

// The root of x >= 0, exact to rounding: a step of Newton's from what logarithms give.
template <typename F>
HAKD_FN F root(F x) {
  const F near = exp2(F(0.5) * log2(max(F(1e-37), x)));
  return F(0.5) * (near + quotient(x, near));
}

// Reverse KL: f_c. Bounded so that the difference of two is finite.
template <typename F>
HAKD_FN F reverse_ratio(F student_a, F teacher_a) {
  return min(F(1e38f), max(F(-1e38f), student_a - teacher_a));
}

// --- section 4: reliability and mixed target ----------------------------------------------------

template <typename F>
struct Reliability {
  F teacher;
  F student;
};

// preset softmax-kl: softmax(-e_t / tau, -e_s / tau), each side to full relative precision.
template <typename F>
HAKD_FN Reliability<F> reliability(F teacher_e, F student_e, F inverse_tau) {
  const F a = (student_e - teacher_e) * inverse_tau * F(kLog2E);
  const F x = exp2(max(F(-1e30), F(0) - abs(a)));
  const F larger = reciprocal(F(1) + x);
  const F smaller = x * larger;
  const auto student_is_better = less(a, F(0));
  return {select(student_is_better, smaller, larger), select(student_is_better, larger, smaller)};
}

// mix = probs: total_s m_c from e_c, with r_t total_s / total_t and r_s; mix = logits: a_h,c from
// a_c, with r.
// mix = teacher needs none of it: m is p_t, z_h is z_t, and r is for looking at only.
template <typename F>
HAKD_FN F mixed_target(F teacher_weight, F teacher, F student_weight, F student) {
  return fma(teacher_weight, teacher, student_weight * student);
}

template <typename F>
HAKD_FN F softplus(F x) {
  return max(F(0), x) + log1p_unit(exp2(abs(x) * F(-kLog2E)));
}

// preset paper (Eq. 5): BCE(sigmoid(z), y) for y = 1 (the labelled class) or 0: softplus(-+z).
template <typename F, typename M>
HAKD_FN F binary_cross_entropy(F z, M is_label) {
  return softplus(select(is_label, F(0) - z, z));
}

// preset paper (Eq. 6): r_t of one class; one half where both are perfect.
template <typename F>
HAKD_FN F class_reliability(F teacher_h, F student_h) {
  constexpr double eps = 1e-6;
  return quotient(student_h + F(eps), teacher_h + student_h + F(2 * eps));
}

// --- section 5: discrepancy and the term --------------------------------------------------------

// preset paper (Eq. 8): the positive reliability gap of one class.
template <typename F>
HAKD_FN F class_discrepancy(F student_h, F mixed_h) {
  return max(F(0), student_h - mixed_h);
}

// weight_axis = space: KL(sigmoid(a) || sigmoid(b)), and its derivative by b.
template <typename F>
HAKD_FN F sigmoid(F z) {
  const F x = exp2(abs(z) * F(-kLog2E));
  const F larger = reciprocal(F(1) + x);
  return select(less(z, F(0)), x * larger, larger);
}

template <typename F>
HAKD_FN F bernoulli_kl(F a, F b) {
  // p (log sigmoid(a) - log sigmoid(b)) + (1 - p) (the same of -a, -b) = p (a - b) + softplus(b) -
  // softplus(a), since softplus(-x) = softplus(x) - x
  return sigmoid(a) * (a - b) + (softplus(b) - softplus(a));
}

template <typename F>
HAKD_FN F bernoulli_kl_gradient(F a, F b) {
  return sigmoid(b) - sigmoid(a);
}

}  // namespace heteroakd
