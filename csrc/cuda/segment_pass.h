// Every term, for the pixels of a segment: the loops over classes with each pixel's exact maximum.
//
// This is the kernel for what has no faster one (docs/cuda.md says which calls those are), and for
// the pixels that the faster one hands over. Where all classes of a thread's pixels fit into shared
// memory they are interpolated once and held there, where nobody else looks (no barrier); otherwise
// each loop reads and interpolates the logits again. Loops:
//
//     maxima       and whether all logits are finite
//     statistics   what softmax, KL and reliability need to know of a pixel
//     (feature, js, mixed logits, paper)   a loop each, where asked for
//     gradients    and the values that take a logarithm per class
#pragma once

#include "pixel.h"
#include "segment.h"

namespace heteroakd::cuda {

// a = (z - m) scale with the exact maximum m; finite for huge and infinite logits.
template <typename F>
HAKD_DEVICE F exactly_scaled(F z, F m, F scale) {
  constexpr F largest = sizeof(F) == 8 ? F(1e300) : F(2e38);
  const F least = F(0) - largest / max(scale, F(1.4427));
  return max_or_nan(least, z - m) * scale;
}

// preset paper, one class: H_s + dH, z_h, r_t and dH. mixes: not mix = teacher, where z_h is z_t,
// without a product by 0 that an infinite z_s would turn into NaN.
template <typename F>
struct PaperClass {
  F strength, z_h, r_t, gap;
};

template <typename F>
HAKD_DEVICE PaperClass<F> paper_class(F z_s, F z_t, bool is_label, bool mixes) {
  const F h_s = binary_cross_entropy(z_s, is_label);
  const F h_t = binary_cross_entropy(z_t, is_label);
  const F r_t = class_reliability(h_t, h_s);
  const F z_h = mixes ? mixed_target(r_t, z_t, F(1) - r_t, z_s) : z_t;
  const F gap = class_discrepancy(h_s, binary_cross_entropy(z_h, is_label));
  return {h_s + gap, z_h, r_t, gap};
}

constexpr double kSmallestNormal = 1.1754943508222875e-38;

// preset paper: with q_c = W_c m_c, without their denominators.
template <typename F>
struct PaperSums {
  F weight_bound, mixed_bound;  // of H_s + dH and of z_h
  F weight_total, mixed_total;
  F q, q_a;                     // sum q_c, sum q_c a_s,c
  F r_t, gap;                   // of the label
};

// Whether a thread's logits are held in shared memory.
enum class Hold { kNever, kWherePossible, kAlways };

template <typename F, class Set, int S, Hold kHold>
class SegmentPass {
 public:
  HAKD_DEVICE SegmentPass(const Pass& pass, const Numbers<F>& numbers, int32_t image,
                          const Segment<F, S>& segment, int32_t cell_y, int32_t cell_x,
                          Held<F, S>* held, int32_t held_stride)
      : p(pass), n(numbers), at(segment), image_(image), held_(held), held_stride_(held_stride) {
    student_ = under(p, p.student, image, at, cell_y, cell_x);
    if (Set::teacher(p)) teacher_ = under(p, p.teacher, image, at, cell_y, cell_x);
  }

  // All lanes of the warp take part. rows: where gradients go unless the student lies on the label
  // grid.
  HAKD_DEVICE void run(const RowWriter<F>& rows, Sums<F>& sums) {
    find_maxima();
    Statistics<F> s[S];
#pragma unroll
    for (int i = 0; i < S; ++i) s[i] = no_statistics<F>();
    F weight_sum = F(0);
    if (soft<Set>(p) || Set::ce(p)) find_statistics(s, weight_sum);
    F squares[S];
    if (Set::feature(p)) find_squares(squares);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const bool valid = at.label[i] >= 0;
      t_[i] = totals_of<Set>(p, s[i], label_logit(p.student, student_, student_m_, i),
                             knowledge<Set>(p) ? label_logit(p.teacher, teacher_, teacher_m_, i)
                                               : F(0),
                             valid);
    }
    if (ratios()) find_ratios(s);
    if (Set::hetero(p) == Hetero::kPaper) find_paper();
#pragma unroll
    for (int i = 0; i < S; ++i) pixel(i, s[i], weight_sum, squares[i], sums);
    if (knowledge<Set>(p) && p.hetero_term && Set::mix(p) == Mix::kLogits) find_mixed(sums);
    if (p.gradients || late()) gradients(rows);
    if (late()) {
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const F factor = Set::hetero(p) == Hetero::kPaperSpace
                             ? hetero_student_[i]
                             : hetero_other_[i] * F(kLn2);
        sums.of_term[kHetero] += at.label[i] >= 0 ? factor * n.temperature * late_[i] : F(0);
      }
    }
  }

 private:
  HAKD_DEVICE static bool probs(const Pass& p) {
    return knowledge<Set>(p) && p.hetero_term && Set::mix(p) == Mix::kProbs;
  }
  // Whether kd's gradient is one of log ratios f_c.
  HAKD_DEVICE bool ratios() const {
    return Set::kd(p) == Divergence::kReverse || Set::kd(p) == Divergence::kJs;
  }
  HAKD_DEVICE bool mixes() const { return Set::mix(p) != Mix::kTeacher; }
  HAKD_DEVICE bool late() const {
    return probs(p) || (Set::hetero(p) == Hetero::kPaperSpace && p.hetero_term);
  }

  // held: [C][models][threads], of which this thread's; null: nothing is held.
  HAKD_DEVICE bool holds() const {
    return kHold == Hold::kAlways || (kHold == Hold::kWherePossible && held_ != nullptr);
  }
  HAKD_DEVICE Held<F, S>& held(int32_t c, int m) const {
    return held_[(Set::teacher(p) ? 2 * c + m : c) * held_stride_];
  }
  HAKD_DEVICE void read_student(int32_t c, F (&z)[S]) const {
    if (!holds()) return read(p.student, student_, c, careful_, at.label, z);
    const Held<F, S> h = held(c, 0);
#pragma unroll
    for (int i = 0; i < S; ++i) z[i] = h.v[i];
  }
  HAKD_DEVICE void read_teacher(int32_t c, F (&z)[S]) const {
    if (!holds()) return read(p.teacher, teacher_, c, careful_, at.label, z);
    const Held<F, S> h = held(c, 1);
#pragma unroll
    for (int i = 0; i < S; ++i) z[i] = h.v[i];
  }
  HAKD_DEVICE void hold(int32_t c, int m, const F (&z)[S]) const {
    if (!holds()) return;
    Held<F, S> h;
#pragma unroll
    for (int i = 0; i < S; ++i) h.v[i] = z[i];
    held(c, m) = h;
  }
  HAKD_DEVICE F student_a(F z, int i) const { return exactly_scaled(z, student_m_[i], n.scale); }
  HAKD_DEVICE F teacher_a(F z, int i) const { return exactly_scaled(z, teacher_m_[i], n.scale); }

  // e at T = 1 from a and e at T.
  HAKD_DEVICE F hard(F a, F e) const {
    const int32_t power = soft<Set>(p) ? p.power : 1;
    if (power == 0) return exp2(a * n.hard_exponent);
    if (power == 1) return e;
    return power == 2 ? e * e : (e * e) * (e * e);
  }

  HAKD_DEVICE void look_at(int32_t c, int m, const F (&z)[S], F (&maximum)[S], F& trace) const {
    constexpr F much = sizeof(F) == 8 ? F(1e100) : F(1e8);  // 1e30 and more is huge
    hold(c, m, z);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      maximum[i] = max_or_nan(maximum[i], z[i]);
      trace = fma(z[i], much, trace);
    }
  }

  // All classes of one model, the plain way: the only loops that read logits which are held, one for
  // each way they can lie.
  template <typename E>
  HAKD_DEVICE void sweep_cells(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                               F& trace) const {
    const bool is_half = model.dtype == Dtype::kHalf;
    const int64_t step = model.class_stride * static_cast<int64_t>(sizeof(E));
    const int64_t down = u.bottom - u.top;
    const char* at_left = u.top + u.left[0];
    const char* at_right = u.top + u.right[0];
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      const F left = between(element_at<E, F>(at_left, is_half),
                             element_at<E, F>(at_left + down, is_half), u.fraction_y);
      const F right = between(element_at<E, F>(at_right, is_half),
                              element_at<E, F>(at_right + down, is_half), u.fraction_y);
      F z[S];
#pragma unroll
      for (int i = 0; i < S; ++i) z[i] = between(left, right, u.fraction_x[i]);
      look_at(c, m, z, maximum, trace);
      at_left += step;
      at_right += step;
    }
  }

  template <typename E>
  HAKD_DEVICE void sweep_gathered(const Logits& model, const Under<F, S>& u, int m,
                                  F (&maximum)[S], F& trace) const {
    const bool is_half = model.dtype == Dtype::kHalf;
    const int64_t step = model.class_stride * static_cast<int64_t>(sizeof(E));
    const char* top = u.top;
    const char* bottom = u.bottom;
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      F z[S];
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const F left = between(element_at<E, F>(top + u.left[i], is_half),
                               element_at<E, F>(bottom + u.left[i], is_half), u.fraction_y);
        const F right = between(element_at<E, F>(top + u.right[i], is_half),
                                element_at<E, F>(bottom + u.right[i], is_half), u.fraction_y);
        z[i] = between(left, right, u.fraction_x[i]);
      }
      look_at(c, m, z, maximum, trace);
      top += step;
      bottom += step;
    }
  }

  template <typename E>
  HAKD_DEVICE void sweep_labels(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                                F& trace) const {
    const bool is_half = model.dtype == Dtype::kHalf;
    const int64_t step = model.class_stride * static_cast<int64_t>(sizeof(E));
    const char* row = u.top;
#pragma unroll 2
    for (int32_t c = 0; c < p.classes; ++c) {
      F z[S];
#pragma unroll
      for (int i = 0; i < S; ++i) z[i] = element_at<E, F>(row + u.left[i], is_half);
      look_at(c, m, z, maximum, trace);
      row += step;
    }
  }

  template <typename E>
  HAKD_DEVICE void sweep(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                         F& trace) const {
    switch (model.source) {
      case Source::kCells: sweep_cells<E>(model, u, m, maximum, trace); break;
      case Source::kLabels: sweep_labels<E>(model, u, m, maximum, trace); break;
      default: sweep_gathered<E>(model, u, m, maximum, trace);
    }
  }

  HAKD_DEVICE void find_maximum(const Logits& model, const Under<F, S>& u, int m, F (&maximum)[S],
                                F& trace) const {
#pragma unroll
    for (int i = 0; i < S; ++i) maximum[i] = F(-INFINITY);
    const bool wide = model.dtype == Dtype::kDouble;
    if (kHold == Hold::kNever || careful_ || (wide && sizeof(F) == 4)) {
#pragma unroll 1
      for (int32_t c = 0; c < p.classes; ++c) {
        F z[S];
        read(model, u, c, careful_, at.label, z);
        look_at(c, m, z, maximum, trace);
      }
    } else if (wide && sizeof(F) == 8) {
      sweep<double>(model, u, m, maximum, trace);
    } else if (model.dtype == Dtype::kFloat) {
      sweep<float>(model, u, m, maximum, trace);
    } else {
      sweep<uint16_t>(model, u, m, maximum, trace);
    }
  }

  HAKD_DEVICE bool maxima_are_finite() {
    F trace = F(0);
    find_maximum(p.student, student_, 0, student_m_, trace);
    if (Set::teacher(p)) find_maximum(p.teacher, teacher_, 1, teacher_m_, trace);
    return is_finite(trace);
  }

  HAKD_DEVICE void find_maxima() {
    careful_ = false;
    if (__any_sync(kAllLanes, !maxima_are_finite())) {
      careful_ = true;
      maxima_are_finite();
    }
  }

  HAKD_DEVICE void find_statistics(Statistics<F> (&s)[S], F& weight_sum) const {
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      if (pair<Set>(p)) read_teacher(c, z_t);
      const F w = Set::smoothing(p) ? class_weight<F>(p, c) : F(0);
      weight_sum += w;
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const bool is_label = at.label[i] == c;
        const F a_s = student_a(z_s[i], i);
        const F e_s = exp2(a_s);
        s[i].student_total += e_s;
        const F h_s = hard(a_s, e_s);
        s[i].student_others += is_label ? F(0) : h_s;
        s[i].weighted = fma(w, a_s, s[i].weighted);
        if (!pair<Set>(p)) continue;
        const F a_t = teacher_a(z_t[i], i);
        const F e_t = exp2(a_t);
        s[i].teacher_total += e_t;
        const F h_t = hard(a_t, e_t);
        s[i].teacher_others += is_label ? F(0) : h_t;
        s[i].difference = fma(e_t, a_t - a_s, s[i].difference);
        if (ratios() && a_s == F(0)) s[i].teacher_at_top = a_t;
      }
    }
  }

  HAKD_DEVICE void find_squares(F (&squares)[S]) const {
#pragma unroll
    for (int i = 0; i < S; ++i) squares[i] = F(0);
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) squares[i] = fma(z_s[i] - z_t[i], z_s[i] - z_t[i], squares[i]);
    }
  }

  // z_label - m. -inf stays -inf: the loss of a label on a masked class is infinite.
  HAKD_DEVICE F label_logit(const Logits& model, const Under<F, S>& u, const F (&m)[S], int i) const {
    if (at.label[i] < 0) return F(0);
    return read_pixel_carefully(model, u, at.label[i], i) - m[i];
  }

  // js: log2 of x_c, and of js and the reverse KL f_c; see ../math/distillation.h.
  HAKD_DEVICE F js_log2(F e_s, F e_t, int i) const {
    const F x = mixed_target(js_weights_[i].teacher, e_t, js_weights_[i].student, e_s);
    return fast_log2(max_or_nan(x, F(kSmallestNormal)));
  }
  HAKD_DEVICE F log_ratio(F a_s, F e_s, F a_t, F e_t, int i) const {
    if (Set::kd(p) == Divergence::kReverse) return reverse_ratio(a_s, a_t);
    return a_s - js_log2(e_s, e_t, i);
  }

  // Reverse KL and js: the pivot, and sum_c e_s (f_c - pivot); of js sum_c e_t (a_t - log2 x_c) too.
  HAKD_DEVICE void find_ratios(const Statistics<F> (&s)[S]) {
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const F top = s[i].teacher_at_top;
      js_weights_[i] = js_weights(n.beta, n.one_minus_beta, t_[i].total_ratio);
      pivot_[i] = log_ratio(F(0), F(1), top, exp2(top), i);
      ratios_[i] = js_teacher_[i] = F(0);
    }
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const F a_s = student_a(z_s[i], i);
        const F a_t = teacher_a(z_t[i], i);
        const F e_s = exp2(a_s);
        const F e_t = exp2(a_t);
        ratios_[i] = fma(e_s, log_ratio(a_s, e_s, a_t, e_t, i) - pivot_[i], ratios_[i]);
        if (Set::kd(p) == Divergence::kJs) {
          js_teacher_[i] = fma(e_t, a_t - js_log2(e_s, e_t, i), js_teacher_[i]);
        }
      }
    }
  }

  // Running maxima: one loop instead of two, because what is expensive here is the knowledge of a
  // class, not its two exponentials.
  HAKD_DEVICE void find_paper() {
    constexpr F lowest = sizeof(F) == 8 ? F(-1e300) : F(-2e38);
#pragma unroll
    for (int i = 0; i < S; ++i) {
      paper_[i] = {lowest, lowest, F(0), F(0), F(0), F(0), F(0), F(0)};
    }
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        PaperSums<F>& sum = paper_[i];
        const bool is_label = at.label[i] == c;
        const PaperClass<F> k = paper_class(z_s[i], z_t[i], is_label, mixes());
        sum.r_t = is_label ? k.r_t : sum.r_t;
        sum.gap = is_label ? k.gap : sum.gap;
        F bound = max_or_nan(sum.mixed_bound, k.z_h);
        F shrink = exp2((sum.mixed_bound - bound) * n.scale);
        F x = exp2((k.z_h - bound) * n.scale);
        sum.mixed_bound = bound;
        sum.mixed_total = fma(sum.mixed_total, shrink, x);
        if (p.evaluation) {
          bound = max_or_nan(sum.weight_bound, k.strength);
          const F weight_shrink = exp2((sum.weight_bound - bound) * F(kLog2E));
          const F w = exp2((k.strength - bound) * F(kLog2E));
          sum.weight_bound = bound;
          sum.weight_total = fma(sum.weight_total, weight_shrink, w);
          shrink *= weight_shrink;
          x *= w;
        }
        sum.q = fma(sum.q, shrink, x);
        sum.q_a = fma(sum.q_a, shrink, x * student_a(z_s[i], i));
      }
    }
  }

  // preset paper, weight_axis = space: r_t and dH of the label, for the maps.
  HAKD_DEVICE PaperClass<F> paper_at_label(int i) const {
    if (at.label[i] < 0) return {F(0), F(0), F(0), F(0)};
    return paper_class(read_pixel_carefully(p.student, student_, at.label[i], i),
                       read_pixel_carefully(p.teacher, teacher_, at.label[i], i), true, mixes());
  }

  HAKD_DEVICE void pixel(int i, const Statistics<F>& s, F weight_sum, F squares, Sums<F>& sums) {
    const bool valid = at.label[i] >= 0;
    const F square = n.temperature * n.temperature;
    if (Set::ce(p)) {
      ce_[i] = cross_entropy_pixel<Set>(p, n, s, t_[i], weight_sum, at.label[i], valid, sums);
    }
    if (Set::kd(p) == Divergence::kForward) {
      const PairCoefficients<F> k = kd_forward_pixel(n, t_[i], valid, sums);
      kd_student_[i] = k.student;
      kd_other_[i] = k.other;
    } else if (ratios()) {
      const F on_student = valid ? n.temperature * n.term_scale[kKd] : F(0);
      const F log2_ratio = t_[i].student_log2 - t_[i].teacher_log2;
      const F mean = ratios_[i] * t_[i].student_inverse;
      F value = mean + pivot_[i] - log2_ratio;
      kd_other_[i] = F(0) - on_student * F(kLn2) * t_[i].student_inverse;
      if (Set::kd(p) == Divergence::kJs) {
        value = fma(n.beta, fma(js_teacher_[i], t_[i].teacher_inverse, log2_ratio),
                    n.one_minus_beta * (mean + pivot_[i]));
        kd_other_[i] *= n.one_minus_beta;
      }
      kd_student_[i] = valid ? kd_other_[i] * mean : F(0);
      sums.of_term[kKd] += valid ? square * (F(kLn2) * value) : F(0);
    }
    if (Set::feature(p)) {
      const F classes = static_cast<F>(p.classes);
      sums.of_term[kFeature] += valid ? squares / classes : F(0);
      feature_[i] = valid ? n.term_scale[kFeature] * feature_gradient_scale(classes) : F(0);
    }
    F r_t = F(0), d = F(0);
    if (knowledge<Set>(p)) {
      const HeteroCoefficients<F> k = hetero_probs_pixel<Set>(p, n, t_[i], valid, sums);
      hetero_student_[i] = k.student;
      hetero_other_[i] = Set::mix(p) == Mix::kLogits ? k.on_student : k.other;
      teacher_weight_[i] = k.teacher_weight;
      student_weight_[i] = k.student_weight;
      late_[i] = F(0);
      if (!mixes() && p.hetero_term) {  // KL(m || p_s) is known; on_student: as in find_mixed
        const F value = t_[i].kl_teacher_student;
        sums.of_term[kHetero] += valid ? k.on_student * n.temperature * value : F(0);
      }
      r_t = k.r_t;
      d = k.d;
    } else if (Set::hetero(p) == Hetero::kPaper) {
      const PaperSums<F>& sum = paper_[i];
      r_t = sum.r_t;
      d = sum.gap;
      F inverse = F(1) / sum.mixed_total;
      if (p.evaluation) inverse = inverse / sum.weight_total;
      inverse = valid ? inverse : F(0);
      const F value = F(kLn2) * (t_[i].student_log2 * sum.q - sum.q_a) * inverse;
      if (p.hetero_term) sums.of_term[kHetero] += valid ? value : F(0);
      hetero_other_[i] = inverse * (n.term_scale[kHetero] / n.temperature);
      hetero_student_[i] = valid ? hetero_other_[i] * sum.q * t_[i].student_inverse : F(0);
    } else if (Set::hetero(p) == Hetero::kPaperSpace) {
      if (p.maps) {
        const PaperClass<F> k = paper_at_label(i);
        r_t = k.r_t;
        d = k.gap;
      }
      // evaluation = none: a mean over pixels and classes, as the weights' own is
      const F mean = p.evaluation ? F(1) : F(1) / static_cast<F>(p.classes);
      hetero_student_[i] = valid ? n.term_scale[kHetero] * n.temperature * mean : F(0);
      late_[i] = F(0);
    }
    if (p.maps && at.inside[i]) write_maps(p, image_, at.y, at.x + i, valid, r_t, d);
  }

  // preset softmax-kl, mix = logits: a_h = r_t a_t + r_s a_s. a_h <= 0, but its maximum may lie far
  // below: the exact one is found first. (student_weight_ becomes r_s, teacher_weight_ r_t.)
  HAKD_DEVICE void find_mixed(Sums<F>& sums) {
    F total[S], difference[S];
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const Reliability<F> r = reliability(t_[i].teacher_nll, t_[i].student_nll, n.inverse_tau);
      teacher_weight_[i] = r.teacher;
      student_weight_[i] = r.student;
      mixed_bound_[i] = F(-INFINITY);
      total[i] = difference[i] = F(0);
    }
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        mixed_bound_[i] = max_or_nan(mixed_bound_[i], mixed_a(z_s[i], z_t[i], i));
      }
    }
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
      F z_s[S], z_t[S];
      read_student(c, z_s);
      read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        const F a = mixed_a(z_s[i], z_t[i], i) - mixed_bound_[i];
        const F e = exp2(a);
        total[i] += e;
        difference[i] = fma(e, a - student_a(z_s[i], i), difference[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < S; ++i) {
      const bool valid = at.label[i] >= 0;
      const F mixed_total = valid ? total[i] : F(1);
      const F inverse = reciprocal(mixed_total);
      const F value = kl(difference[i], inverse, log2(mixed_total), t_[i].student_log2);
      // other is on_student until here (times the gradient's scale, where no value is read)
      sums.of_term[kHetero] += valid ? hetero_other_[i] * n.temperature * value : F(0);
      hetero_student_[i] = hetero_other_[i] * t_[i].student_inverse;
      hetero_other_[i] = hetero_other_[i] * inverse;
    }
  }

  HAKD_DEVICE F mixed_a(F z_s, F z_t, int i) const {
    return mixed_target(teacher_weight_[i], teacher_a(z_t, i), student_weight_[i],
                        student_a(z_s, i));
  }

  // Gradients of each term, of class c, at pixel i.
  HAKD_DEVICE F cross_entropy_gradient(int32_t c, F a_s, F e_s, int i) const {
    const F h = hard(a_s, e_s);
    F g = at.label[i] == c ? ce_[i].label : ce_[i].hard * h;
    if (Set::smoothing(p)) {
      g += ce_[i].soft * (ce_[i].weight_sum * (h * ce_[i].inverse) - class_weight<F>(p, c));
    }
    return g;
  }

  HAKD_DEVICE F kd_gradient(F a_s, F e_s, F a_t, F e_t, int i) const {
    F other = e_t;
    if (ratios()) other = e_s * (log_ratio(a_s, e_s, a_t, e_t, i) - pivot_[i]);
    return fnma(kd_other_[i], other, kd_student_[i] * e_s);
  }

  HAKD_DEVICE F hetero_gradient(int32_t c, F z_s, F z_t, F a_s, F e_s, F a_t, F e_t, int i) {
    const bool valid = at.label[i] >= 0;
    if (knowledge<Set>(p)) {
      if (Set::mix(p) != Mix::kLogits) {
        const F weighted = teacher_weight_[i] * e_t;
        const F m = mixed_target(F(1), weighted, student_weight_[i], e_s);
        late_[i] = fma(m, fast_log2(max_or_nan(m, F(kSmallestNormal))) - a_s, late_[i]);
        return fnma(hetero_other_[i], weighted, hetero_student_[i] * e_s);
      }
      const F a = mixed_target(teacher_weight_[i], a_t, student_weight_[i], a_s) - mixed_bound_[i];
      return fnma(hetero_other_[i], exp2(a), hetero_student_[i] * e_s);
    }
    const PaperClass<F> k = paper_class(z_s, z_t, at.label[i] == c, mixes());
    if (Set::hetero(p) == Hetero::kPaper) {
      F other = exp2((k.z_h - paper_[i].mixed_bound) * n.scale);
      if (p.evaluation) other *= exp2((k.strength - paper_[i].weight_bound) * F(kLog2E));
      return valid ? fnma(hetero_other_[i], other, hetero_student_[i] * e_s) : F(0);
    }
    const F a = k.z_h / n.temperature;
    const F b = z_s / n.temperature;
    F w = F(1);
    if (p.evaluation) {
      const int64_t place = static_cast<int64_t>(image_) * p.classes + c;
      w = exp2((k.strength - static_cast<const F*>(p.space_shift)[place]) * F(kLog2E)) *
          static_cast<const F*>(p.space_weight)[place];
    }
    late_[i] += valid ? w * bernoulli_kl(a, b) : F(0);
    return valid ? hetero_student_[i] * (w * bernoulli_kl_gradient(a, b)) : F(0);
  }

  HAKD_DEVICE void gradients(const RowWriter<F>& rows) {
    const bool on_labels = p.student.source == Source::kLabels;
    const bool to_rows = p.gradients && !on_labels;
    const bool wants_hetero = p.hetero_term && Set::hetero(p) != Hetero::kNone;
    const bool has[kTerms] = {Set::ce(p), Set::kd(p) != Divergence::kNone, wants_hetero,
                              Set::feature(p)};
    // Of terms that share a slot the first one's cursor writes the sum.
    const bool kd_with_ce =
        has[kKd] && has[kCe] && (Set::kTogether || share_slot(p, kKd, kCe));
    const bool feature_with_ce = has[kFeature] && has[kCe] && share_slot(p, kFeature, kCe);
    const bool feature_with_kd =
        has[kFeature] && has[kKd] && !feature_with_ce && share_slot(p, kFeature, kKd);
    const bool writes[kTerms] = {to_rows, to_rows && !kd_with_ce, to_rows,
                                 to_rows && !(feature_with_ce || feature_with_kd)};
    RowCursor<F> cursor[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      if (has[k] && !(Set::kTogether && k == kKd && has[kCe])) {
        const int32_t slot = Set::kTogether && k == kCe && p.slot[kCe] < 0 ? p.slot[kKd] : p.slot[k];
        cursor[k] = {rows, writes[k] ? slot : -1, 0};
      }
    }
#pragma unroll 1
    for (int32_t c = 0; c < p.classes; ++c) {
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        if (has[k] && !(Set::kTogether && k == kKd && has[kCe])) cursor[k].begin();
      }
      F z_s[S], z_t[S], merged[S], g[kTerms][S];
      read_student(c, z_s);
      if (Set::teacher(p)) read_teacher(c, z_t);
#pragma unroll
      for (int i = 0; i < S; ++i) {
        F a_s = F(0), e_s = F(0), a_t = F(0), e_t = F(0);
        if (soft<Set>(p) || Set::ce(p)) {
          a_s = student_a(z_s[i], i);
          e_s = exp2(a_s);
        }
        if (pair<Set>(p)) {
          a_t = teacher_a(z_t[i], i);
          e_t = exp2(a_t);
        }
        g[kCe][i] = Set::ce(p) ? cross_entropy_gradient(c, a_s, e_s, i) : F(0);
        g[kKd][i] = Set::kd(p) != Divergence::kNone ? kd_gradient(a_s, e_s, a_t, e_t, i) : F(0);
        g[kHetero][i] =
            wants_hetero ? hetero_gradient(c, z_s[i], z_t[i], a_s, e_s, a_t, e_t, i) : F(0);
        g[kFeature][i] = Set::feature(p) ? feature_[i] * (z_s[i] - z_t[i]) : F(0);
        merged[i] = (g[kCe][i] + g[kKd][i]) + (g[kHetero][i] + g[kFeature][i]);
      }
      if (!p.gradients) continue;
      if (on_labels) {
        const int64_t place = image_ * p.gradient.batch_stride + c * p.gradient.class_stride +
                              at.y * p.gradient.row_stride;
#pragma unroll
        for (int i = 0; i < S; ++i) {
          if (!at.inside[i]) continue;
          store_logit(const_cast<void*>(p.gradient.data), p.gradient.dtype,
                      place + (at.x + i) * p.gradient.column_stride, merged[i]);
        }
        continue;
      }
#pragma unroll
      for (int i = 0; i < S; ++i) {
        if (feature_with_kd) g[kKd][i] += g[kFeature][i];
        if (feature_with_ce) g[kCe][i] += g[kFeature][i];
        if (kd_with_ce) g[kCe][i] += g[kKd][i];
      }
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        if (!has[k] || (Set::kTogether && k == kKd && has[kCe])) continue;
        if (!Set::kTogether && (!writes[k] || p.slot[k] < 0)) continue;
        F all = F(0), right = F(0);
#pragma unroll
        for (int i = 0; i < S; ++i) {
          all += g[k][i];
          right = fma(at.fraction_x[i], g[k][i], right);
        }
        const F left = all - right;
        const F bottom_left = at.fraction_y * left;
        const F bottom_right = at.fraction_y * right;
        cursor[k].add({left - bottom_left, right - bottom_right, bottom_left, bottom_right});
      }
    }
  }

  const Pass& p;
  const Numbers<F>& n;
  const Segment<F, S>& at;
  int32_t image_;
  Held<F, S>* held_;
  int32_t held_stride_;
  bool careful_ = false;
  Under<F, S> student_, teacher_;
  F student_m_[S], teacher_m_[S];
  Totals<F> t_[S];
  CrossEntropyCoefficients<F> ce_[S];
  F kd_student_[S], kd_other_[S], pivot_[S], ratios_[S], js_teacher_[S];
  JsWeights<F> js_weights_[S];
  F hetero_student_[S], hetero_other_[S], teacher_weight_[S], student_weight_[S], late_[S];
  F mixed_bound_[S], feature_[S];
  PaperSums<F> paper_[S];
};

}  // namespace heteroakd::cuda
