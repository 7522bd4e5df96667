// Cross entropy of one pixel: the same formulas, names and order as `reference.py`.
//
// A pixel arrives as exponentials relative to its maximum m: e_c = exp(z_c - m),
// total = sum_c e_c, others = the same sum without the labelled class.
#pragma once

#include <cmath>

#include "macros.h"

namespace heteroakd {

// -log softmax(z)_label. For a confident pixel (z_label = m) the textbook log(total) loses the
// value's relative precision, log1p(others) keeps it; otherwise nothing cancels.
template <typename T>
HAKD_FN T negative_log_likelihood(T others, T total, T label_z_minus_m) {
  using std::log;
  using std::log1p;
  return label_z_minus_m == T(0) ? log1p(others) : log(total) - label_z_minus_m;
}

// Weights of one pixel: hard = (1 - smoothing) * w_label, soft = smoothing / C.
template <typename T>
struct CrossEntropyWeights {
  T hard;
  T soft;
  T weight_sum;  // sum over classes of w_c
};

// Weighted loss of one pixel; weighted_z = sum_c w_c (z_c - m), read only when smoothing.
template <typename T>
HAKD_FN T cross_entropy(const CrossEntropyWeights<T>& w, T others, T total, T label_z_minus_m,
                        T weighted_z) {
  using std::log;
  T loss = w.hard * negative_log_likelihood(others, total, label_z_minus_m);
  if (w.soft != T(0)) loss += w.soft * (w.weight_sum * log(total) - weighted_z);
  return loss;
}

// d loss / d z_c for a class that is not the labelled one; p = e_c / total.
template <typename T>
HAKD_FN T cross_entropy_gradient_other(const CrossEntropyWeights<T>& w, T p, T class_weight) {
  if (w.soft == T(0)) return w.hard * p;  // not 0 * weight: an absent class may weigh infinity
  return (w.hard + w.soft * w.weight_sum) * p - w.soft * class_weight;
}

// d loss / d z_label. p - 1 as minus the sum of the others: of a confident pixel it keeps its
// relative precision, where 1 - p has none left.
template <typename T>
HAKD_FN T cross_entropy_gradient_label(const CrossEntropyWeights<T>& w, T others, T total, T p,
                                       T class_weight) {
  const T hard = -w.hard * (others / total);
  return w.soft == T(0) ? hard : hard + w.soft * (w.weight_sum * p - class_weight);
}

}  // namespace heteroakd
