// Tversky loss: `tversky` in reference.py, of the sums of dice.h.
//
//     value    C m^gamma, m = 1 / C sum over the classes that occur of
//              (a FP + b FN) / (TP + a FP + b FN + s)
//     g_c      as in dice.h
//     divided by C
#pragma once

#include "dice.h"

namespace heteroakd {

struct TverskyTerm : DiceTerm {
  static constexpr int kNumberCount = 4, kChoiceCount = 0;
  static constexpr NumberRange kNumbers[] = {
      {"alpha", 0.0, 1e6}, {"beta", 0.0, 1e6}, {"gamma", 0.01, 100.0}, {"smooth", 0.0, 1e6}};
  static constexpr ChoiceRange kChoices[] = {{"", 0}};

  HAKD_FN static Settled settle(const Options& o, const double* sums) {
    return overlap(sums, o.number[0], o.number[1], o.number[3], false);
  }
  HAKD_FN static Conclusion conclude(const Options& o, double value, double classes) {
    const double mean = value / classes, gamma = o.number[2];
    if (mean <= 0.0) return {0.0, 0.0};
    return {classes * ::pow(mean, gamma), gamma * ::pow(mean, gamma - 1.0)};
  }
};

}  // namespace heteroakd
