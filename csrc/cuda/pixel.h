// What is done once per pixel, between the loops over classes: sums over classes become values and
// the coefficients of the gradients. The formulas are in ../math/distillation.h; here they stand in
// the order of `kernels/distillation.py`: totals, cross entropy, kd, reliability, discrepancy, hetero.
#pragma once

#include "elementary.h"
#include "memory.h"

namespace heteroakd::cuda {

// Which terms a kernel is compiled for. `Any` asks the call.
struct Any {
  HAKD_DEVICE static bool ce(const Pass& p) { return p.ce; }
  HAKD_DEVICE static bool smoothing(const Pass& p) { return p.ce && p.smoothing != 0.0; }
  HAKD_DEVICE static Divergence kd(const Pass& p) { return p.kd; }
  HAKD_DEVICE static Hetero hetero(const Pass& p) { return p.hetero; }
  HAKD_DEVICE static Mix mix(const Pass& p) { return p.mix; }
  HAKD_DEVICE static bool feature(const Pass& p) { return p.feature; }
  HAKD_DEVICE static bool teacher(const Pass& p) { return p.teacher.source != Source::kNone; }
  static constexpr bool kTogether = false;  // whether ce and kd have one slot, where a call has both
};

// Terms that are known when the kernel is compiled; a call may have fewer. No label smoothing, no
// feature term.
template <bool kCe_, Divergence kKd_, Hetero kHetero_, Mix kMix_ = Mix::kProbs>
struct Fixed {
  HAKD_DEVICE static constexpr bool ce(const Pass&) { return kCe_; }
  HAKD_DEVICE static constexpr bool smoothing(const Pass&) { return false; }
  HAKD_DEVICE static constexpr Divergence kd(const Pass&) { return kKd_; }
  HAKD_DEVICE static constexpr Hetero hetero(const Pass&) { return kHetero_; }
  HAKD_DEVICE static constexpr Mix mix(const Pass&) { return kMix_; }
  HAKD_DEVICE static constexpr bool feature(const Pass&) { return false; }
  HAKD_DEVICE static constexpr bool teacher(const Pass&) { return kTeacher; }
  static constexpr bool kTogether = true;
  static constexpr bool kTeacher = kKd_ != Divergence::kNone || kHetero_ != Hetero::kNone;
};

using Ce = Fixed<true, Divergence::kNone, Hetero::kNone>;
using CeKd = Fixed<true, Divergence::kForward, Hetero::kNone>;
using CeHetero = Fixed<true, Divergence::kNone, Hetero::kSoftmaxKl>;
using CeKdHetero = Fixed<true, Divergence::kForward, Hetero::kSoftmaxKl>;

// What a set implies; names as in `kernels/distillation.py`.
template <class Set>
HAKD_DEVICE bool knowledge(const Pass& p) {
  return Set::hetero(p) == Hetero::kSoftmaxKl;
}
template <class Set>
HAKD_DEVICE bool pair(const Pass& p) {
  return Set::kd(p) != Divergence::kNone || knowledge<Set>(p);
}
template <class Set>
HAKD_DEVICE bool soft(const Pass& p) {
  return pair<Set>(p) || Set::hetero(p) == Hetero::kPaper;
}

// Numbers of the call, in the type of the arithmetic.
template <typename F>
struct Numbers {
  F temperature, inverse_tau, scale;  // scale: log2(e) / T, or log2(e) where no T is used
  F to_logits;                        // 1 / scale
  F hard_exponent;                    // e at T = 1 is e to this power
  F beta, one_minus_beta;             // of js
  F term_scale[kTerms];               // of a term's gradient
};

template <class Set, typename F>
HAKD_DEVICE Numbers<F> numbers_of(const Pass& p) {
  Numbers<F> n;
  const bool softened = soft<Set>(p);
  n.temperature = static_cast<F>(p.temperature);
  n.inverse_tau = F(1) / static_cast<F>(p.tau);
  n.scale = softened ? F(kLog2E) / n.temperature : F(kLog2E);
  n.to_logits = F(1) / n.scale;
  n.hard_exponent = softened ? n.temperature : F(1);
  n.beta = static_cast<F>(p.beta);
  n.one_minus_beta = static_cast<F>(1.0 - p.beta);
  for (int k = 0; k < kTerms; ++k) {
    n.term_scale[k] = static_cast<F>(p.weight[k]);
    if (p.grad_totals != nullptr && p.group[k] >= 0) {
      n.term_scale[k] = static_cast<F>(p.weight[k] * p.grad_totals[p.group[k]]);
    }
  }
  return n;
}

// Sums over the classes of a pixel. a, e: see ../math/distillation.h.
template <typename F>
struct Statistics {
  F student_total, teacher_total;    // sum e at T
  F student_others, teacher_others;  // sum e at T = 1, without the label
  F difference;                      // sum e_t (a_t - a_s)
  F teacher_at_top;                  // a_t of the class where a_s is 0
  F weighted;                        // sum w_c a_s (label smoothing)
};

template <typename F>
HAKD_DEVICE Statistics<F> no_statistics() {
  return {F(0), F(0), F(0), F(0), F(0), F(0), F(0)};
}

template <typename F>
struct Totals {
  F hard_total, hard_inverse, student_nll, teacher_nll;
  F student_inverse, teacher_inverse, student_log2, teacher_log2;
  F total_ratio;  // student_total / teacher_total
  F kl_teacher_student;
};

// student_label, teacher_label: z_label - m. Of an invalid pixel harmless numbers.
template <class Set, typename F>
HAKD_DEVICE Totals<F> totals_of(const Pass& p, const Statistics<F>& s, F student_label,
                                F teacher_label, bool valid) {
  const bool hard = Set::ce(p) || knowledge<Set>(p);
  F student_e = F(0), teacher_e = F(0);
  if (hard) student_e = exp2(max(F(-1e30), student_label) * F(kLog2E));
  if (knowledge<Set>(p)) teacher_e = exp2(max(F(-1e30), teacher_label) * F(kLog2E));
  Totals<F> t;
  if (hard) {
    t.hard_total = valid ? s.student_others + student_e : F(1);
    t.hard_inverse = reciprocal(t.hard_total);
    t.student_nll = negative_log_likelihood(s.student_others, student_e, student_label);
    t.student_nll = valid ? t.student_nll : F(0);
  }
  if (knowledge<Set>(p)) {
    t.teacher_nll = negative_log_likelihood(s.teacher_others, teacher_e, teacher_label);
    t.teacher_nll = valid ? t.teacher_nll : F(0);
  }
  if (soft<Set>(p)) {
    const F total = valid ? s.student_total : F(1);
    t.student_inverse = reciprocal(total);
    t.student_log2 = log2(total);
  }
  if (pair<Set>(p)) {
    const F total = valid ? s.teacher_total : F(1);
    t.teacher_inverse = reciprocal(total);
    t.teacher_log2 = log2(total);
    t.total_ratio = (valid ? s.student_total : F(1)) * t.teacher_inverse;
    t.kl_teacher_student = kl(s.difference, t.teacher_inverse, t.teacher_log2, t.student_log2);
  }
  return t;
}

// Of a few pixels.
template <typename F>
struct Sums {
  F of_term[kTerms];
  F weight_of_labels, hetero_weight;
  int32_t valid, bad;
};

// Of all pixels of a thread, which may be a whole image: float would stop growing at 2^24.
struct ThreadSums {
  double of_term[kTerms] = {0.0, 0.0, 0.0, 0.0};
  double weight_of_labels = 0.0, hetero_weight = 0.0;
  int64_t valid = 0, bad = 0;

  template <typename F>
  HAKD_DEVICE void add(const Sums<F>& sums) {
#pragma unroll
    for (int k = 0; k < kTerms; ++k) of_term[k] += static_cast<double>(sums.of_term[k]);
    weight_of_labels += static_cast<double>(sums.weight_of_labels);
    hetero_weight += static_cast<double>(sums.hetero_weight);
    valid += sums.valid;
    bad += sums.bad;
  }
};

template <typename F>
HAKD_DEVICE Sums<F> no_sums() {
  return {{F(0), F(0), F(0), F(0)}, F(0), F(0), 0, 0};
}

template <typename F>
HAKD_DEVICE F class_weight(const Pass& p, int32_t c) {
  return p.class_weight == nullptr ? F(1) : static_cast<const F*>(p.class_weight)[c];
}

// Coefficients of a term's gradient; 0 where not valid.
template <typename F>
struct CrossEntropyCoefficients {
  F hard;    // g_c = hard e_c at T = 1
  F label;   // and of the label this
  F soft, weight_sum, inverse;  // label smoothing: + soft (weight_sum e_c inverse - w_c)
};

template <class Set, typename F>
HAKD_DEVICE CrossEntropyCoefficients<F> cross_entropy_pixel(const Pass& p, const Numbers<F>& n,
                                                            const Statistics<F>& s,
                                                            const Totals<F>& t, F weight_sum,
                                                            int32_t label, bool valid,
                                                            Sums<F>& sums) {
  const bool smoothed = Set::smoothing(p);
  const F smoothing = smoothed ? static_cast<F>(p.smoothing) : F(0);
  const F label_weight = valid ? class_weight<F>(p, label) : F(0);
  CrossEntropyWeights<F> w;
  w.hard = (F(1) - smoothing) * label_weight;
  w.soft = valid ? smoothing / static_cast<F>(p.classes) : F(0);
  w.weight_sum = weight_sum;
  F loss;
  if (smoothed) {
    loss = cross_entropy<true>(w, t.student_nll, log(t.hard_total), s.weighted * n.to_logits);
  } else {
    loss = cross_entropy<false>(w, t.student_nll, F(0), F(0));
  }
  sums.of_term[kCe] += valid ? loss : F(0);
  sums.weight_of_labels += label_weight;
  CrossEntropyCoefficients<F> k;
  k.hard = n.term_scale[kCe] * w.hard * t.hard_inverse;
  k.label = valid ? cross_entropy_gradient_numerator(true, F(0), s.student_others) * k.hard : F(0);
  k.soft = n.term_scale[kCe] * w.soft;
  k.weight_sum = weight_sum;
  k.inverse = t.hard_inverse;
  return k;
}

// g_c = student e_s,c - other * (what the divergence has in the place of e_t,c)
template <typename F>
struct PairCoefficients {
  F student, other;
};

template <typename F>
HAKD_DEVICE PairCoefficients<F> kd_forward_pixel(const Numbers<F>& n, const Totals<F>& t,
                                                 bool valid, Sums<F>& sums) {
  const F square = n.temperature * n.temperature;
  sums.of_term[kKd] += valid ? square * t.kl_teacher_student : F(0);
  const F on_student = valid ? n.temperature * n.term_scale[kKd] : F(0);
  return {on_student * t.student_inverse, on_student * t.teacher_inverse};
}

// preset softmax-kl, mix = probs: x_c = teacher_weight e_t,c + student_weight e_s,c, which is m_c
// times the student's total, g_c = student e_s,c - other teacher_weight e_t,c; value = other T ln 2
// sum_c x_c (log2 x_c - a_s,c) where gradients are not scaled. mix = teacher is the same with r_t = 1
// and r_s = 0, but for r_t in the maps. on_student: T times the pixel's weight.
template <typename F>
struct HeteroCoefficients {
  F student, other, teacher_weight, student_weight;
  F on_student, r_t, d;
};

template <class Set, typename F>
HAKD_DEVICE HeteroCoefficients<F> hetero_probs_pixel(const Pass& p, const Numbers<F>& n,
                                                     const Totals<F>& t, bool valid,
                                                     Sums<F>& sums) {
  const Reliability<F> r = reliability(t.teacher_nll, t.student_nll, n.inverse_tau);
  const Reliability<F> mixed = Set::mix(p) == Mix::kTeacher ? Reliability<F>{F(1), F(0)} : r;
  const F d = discrepancy(t.kl_teacher_student);
  const F weight = valid ? (p.evaluation ? d : F(1)) : F(0);
  if (p.hetero_term) sums.hetero_weight += weight;
  const F on_student = n.term_scale[kHetero] * n.temperature * weight;
  const F other = on_student * t.student_inverse;
  return {other * mixed.teacher,
          other,
          mixed.teacher * t.total_ratio,
          mixed.student,
          on_student,
          r.teacher,
          d};
}

template <typename F>
HAKD_DEVICE void write_maps(const Pass& p, int32_t image, int32_t y, int32_t x, bool valid, F r_t,
                            F d) {
  const int64_t plane = static_cast<int64_t>(p.label_height) * p.label_width;
  F* out = static_cast<F*>(p.maps_out) + image * plane + static_cast<int64_t>(y) * p.label_width + x;
  if (sizeof(F) == 8 && p.maps_are_float) {
    float* narrow = static_cast<float*>(p.maps_out) + (out - static_cast<F*>(p.maps_out));
    narrow[0] = valid ? static_cast<float>(r_t) : 0.0f;
    narrow[p.batch * plane] = valid ? static_cast<float>(d) : 0.0f;
    return;
  }
  out[0] = valid ? r_t : F(0);
  out[p.batch * plane] = valid ? d : F(0);
}

}  // namespace heteroakd::cuda
