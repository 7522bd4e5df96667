// Four label rows between the same two rows of logits, without an exponential for each.
//
// Down a column, every logit is linear: z_r = z_0 + r d. So e^{z_r} is a geometric progression, two
// exponentials per class (the first row's and the ratio) serve four rows, and the sums need no
// maximum of each row: the interpolated maxima of the two rows of logits bound it from above.
//
// Exact where that bound is near the maximum and no exponential leaves the range of normal numbers:
// `chain_fits` looks at the range of the two rows before, `chain_held` at the sums afterwards.
// Elsewhere the caller takes the way of statistics.h. Errors: 3 ulp of the ratio and 3 roundings on
// top of the first exponential, at most 9 ulp in the fourth row.
#pragma once

#include "statistics.h"

namespace heteroakd::cpu::HAKD_ISA {

// One model's part: two rows of logits at the columns of a vector, [C][N], and their maxima and
// minima over the classes, [2][N].
template <typename T>
struct ChainSide {
  const T *lo, *hi;
  const T *lo_range, *hi_range;
  T fraction, step;  // of the first row; from row to row
};

// Exponents of 2 that the exponentials may span; a sum may fall this far below its bound.
template <typename T>
constexpr T kChainSpan = T(100);
template <typename T>
constexpr T kChainSlack = T(1.0 / (1 << 20));

template <typename T>
HAKD_FN bool chain_fits(const ChainSide<T>& side, T scale) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const F lo = F::load(side.lo_range) - F::load(side.lo_range + N);
  const F hi = F::load(side.hi_range) - F::load(side.hi_range + N);
  return !any(not_less(max(lo, hi) * F(scale), F(kChainSpan<T>)));
}

template <typename T>
HAKD_FN bool chain_held(Lanes<T> total, Mask<T> valid) {
  using F = Lanes<T>;
  return !any(less(select(valid, total, F(T(1))), F(kChainSlack<T>)));
}

// The bound that takes the place of the maximum in row r.
template <typename T>
HAKD_FN Lanes<T> chain_reference(const ChainSide<T>& side, T fraction) {
  using F = Lanes<T>;
  const F lo = F::load(side.lo_range);
  return fma(F(fraction), F::load(side.hi_range) - lo, lo);
}

// What one class carries from row to row.
template <typename F>
struct ChainLink {
  F e, ratio, a, da;
};

// A side's constants in registers: the compiler must not think that a store to a tile changes them.
template <typename T>
struct ChainConstants {
  using F = Lanes<T>;
  const T *lo, *hi;
  F lo_reference, hi_reference, fraction, step, scale;

  HAKD_FN ChainConstants(const ChainSide<T>& side, T k)
      : lo(side.lo), hi(side.hi), fraction(side.fraction), step(side.step), scale(k) {
    lo_reference = F::load(side.lo_range);
    hi_reference = F::load(side.hi_range);
  }

  HAKD_FN ChainLink<F> start(int64_t c) const {
    const F a = (F::load(lo + c * F::N) - lo_reference) * scale;
    const F difference = fma(F::load(hi + c * F::N) - hi_reference, scale, F(T(0)) - a);
    ChainLink<F> link;
    link.a = fma(fraction, difference, a);
    link.da = step * difference;
    link.e = exp2(link.a);
    link.ratio = exp2(link.da);
    return link;
  }
};

// The six tiles that the first two rows leave for the last two.
template <typename T>
struct ChainScratch {
  T *student_ratio, *student_a, *student_da, *teacher_ratio;
  T *gap, *gap_step;  // a_t - a_s
};

// Rows 0 and 1 (kSecond false) or 2 and 3.
template <typename T, int kPower, int kHard, bool kCross, bool kTeacher, bool kSecond>
void chain_rows(int64_t classes, const ChainSide<T>& student_side,
                const ChainSide<T>& teacher_side, T* student_e, T* teacher_e, T scale,
                const int32_t* const* labels, const ChainScratch<T>& scratch,
                ClassSums<Lanes<T>>* const* statistics) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const int64_t tile = classes * N;
  const ChainConstants<T> student(student_side, scale);
  const ChainConstants<T> teacher(kTeacher ? teacher_side : student_side, scale);
  const ChainScratch<T> saved = scratch;
  const F zero(T(0));
  ClassSums<F> sums[2] = {{zero, zero, zero, zero, zero, zero, zero},
                           {zero, zero, zero, zero, zero, zero, zero}};
  const Labels<T> label[2] = {load_labels<T>(labels[0]), load_labels<T>(labels[1])};
  for (int64_t c = 0; c < classes; ++c) {
    ChainLink<F> s, t;
    F w(T(0)), dw(T(0));
    if constexpr (!kSecond) {
      s = student.start(c);
      s.ratio.store(saved.student_ratio + c * N);
      if constexpr (kTeacher) {
        t = teacher.start(c);
        t.ratio.store(saved.teacher_ratio + c * N);
        w = t.a - s.a;
        dw = t.da - s.da;
      }
    } else {
      s.ratio = F::load(saved.student_ratio + c * N);
      s.e = F::load(student_e - tile + c * N) * s.ratio;
      if constexpr (kTeacher) {
        t.ratio = F::load(saved.teacher_ratio + c * N);
        t.e = F::load(teacher_e - tile + c * N) * t.ratio;
        w = F::load(saved.gap + c * N);
        dw = F::load(saved.gap_step + c * N);
        if constexpr (kCross) {
          s.a = F::load(saved.student_a + c * N);
          s.da = F::load(saved.student_da + c * N);
        }
      }
    }
    for (int r = 0; r < 2; ++r) {
      ClassSums<F>& sum = sums[r];
      s.e.store(student_e + r * tile + c * N);
      sum.student_total = sum.student_total + s.e;
      if constexpr (kTeacher) {
        t.e.store(teacher_e + r * tile + c * N);
        sum.teacher_total = sum.teacher_total + t.e;
        sum.difference = fma(t.e, w, sum.difference);
        if constexpr (kCross) {
          sum.teacher_cross = fma(t.e, s.a, sum.teacher_cross);
          sum.student_self = fma(s.e, s.a, sum.student_self);
        }
      }
      if constexpr (kHard > 0) {
        const auto is_label = is_class(label[r], static_cast<int32_t>(c));
        sum.student_others = add_unless(is_label, sum.student_others, power<kPower>(s.e));
        if constexpr (kHard > 1) {
          sum.teacher_others = add_unless(is_label, sum.teacher_others, power<kPower>(t.e));
        }
      }
      if (r == 0) s.e = s.e * s.ratio;
      if constexpr (kTeacher) {
        if (r == 0) t.e = t.e * t.ratio;
        w = w + dw;
        if constexpr (kCross) s.a = s.a + s.da;
      }
    }
    if constexpr (!kSecond && kTeacher) {
      w.store(saved.gap + c * N);
      dw.store(saved.gap_step + c * N);
      if constexpr (kCross) {
        s.a.store(saved.student_a + c * N);
        s.da.store(saved.student_da + c * N);
      }
    }
  }
  *statistics[0] = sums[0];
  *statistics[1] = sums[1];
}

// As two_models (and, without a teacher, one_model), for rows r = 0..3 of tiles e[4][C][N], with
// e^kPower in place of the exponentials at T = 1. scratch: 6 tiles [C][N].
template <typename T, int kPower, int kHard, bool kCross, bool kTeacher>
void chain(int64_t classes, const ChainSide<T>& student, const ChainSide<T>& teacher, T* student_e,
           T* teacher_e, T scale, const int32_t* const* labels, T* scratch,
           ClassSums<Lanes<T>>* const* statistics) {
  const int64_t tile = classes * Lanes<T>::N;
  const ChainScratch<T> saved{scratch,            scratch + tile,     scratch + 2 * tile,
                              scratch + 3 * tile, scratch + 4 * tile, scratch + 5 * tile};
  chain_rows<T, kPower, kHard, kCross, kTeacher, false>(
      classes, student, teacher, student_e, teacher_e, scale, labels, saved, statistics);
  chain_rows<T, kPower, kHard, kCross, kTeacher, true>(
      classes, student, teacher, student_e + 2 * tile, teacher_e + 2 * tile, scale, labels + 2,
      saved, statistics + 2);
}

}  // namespace heteroakd::cpu::HAKD_ISA
