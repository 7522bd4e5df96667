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

template <typename T>
HAKD_FN ChainLink<Lanes<T>> chain_start(const ChainSide<T>& side, int64_t c, Lanes<T> lo_reference,
                                        Lanes<T> hi_reference, Lanes<T> scale) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const F lo = (F::load(side.lo + c * N) - lo_reference) * scale;
  const F difference = fnma(scale, hi_reference - F::load(side.hi + c * N), F(T(0)) - lo);
  ChainLink<F> link;
  link.a = fma(F(side.fraction), difference, lo);
  link.da = F(side.step) * difference;
  link.e = exp2(link.a);
  link.ratio = exp2(link.da);
  return link;
}

// As two_models (and, without a teacher, one_model), for rows r = 0..3 of tiles e[4][C][N]. With
// kHard > 0 kPower must be 1, 2 or 4. scratch: 6 tiles [C][N].
template <typename T, int kPower, int kHard, bool kCross, bool kTeacher>
void chain(int64_t classes, const ChainSide<T>& student, const ChainSide<T>& teacher, T* student_e,
           T* teacher_e, T scale, const int32_t* const* labels, T* scratch,
           Statistics<Lanes<T>>* const* statistics) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const int64_t tile = classes * N;
  const F k(scale);
  const F student_lo = F::load(student.lo_range);
  const F student_hi = F::load(student.hi_range);
  F teacher_lo(T(0)), teacher_hi(T(0));
  if constexpr (kTeacher) {
    teacher_lo = F::load(teacher.lo_range);
    teacher_hi = F::load(teacher.hi_range);
  }
  T* student_ratio = scratch;
  T* student_da = scratch + tile;
  T* student_a = scratch + 2 * tile;
  T* teacher_ratio = scratch + 3 * tile;
  T* gap = scratch + 4 * tile;  // a_t - a_s
  T* gap_step = scratch + 5 * tile;

  for (int half = 0; half < 2; ++half) {
    Statistics<F> sums[2];
    Labels<T> label[2];
    for (int r = 0; r < 2; ++r) {
      label[r] = load_labels<T>(labels[2 * half + r]);
      const F zero(T(0));
      sums[r] = {zero, zero, zero, zero, zero, zero, zero};
    }
    T* student_out = student_e + 2 * half * tile;
    T* teacher_out = teacher_e + 2 * half * tile;
    for (int64_t c = 0; c < classes; ++c) {
      ChainLink<F> s, t;
      F w(T(0)), dw(T(0));
      if (half == 0) {
        s = chain_start(student, c, student_lo, student_hi, k);
        if constexpr (kTeacher) {
          t = chain_start(teacher, c, teacher_lo, teacher_hi, k);
          w = t.a - s.a;
          dw = t.da - s.da;
        }
      } else {
        s.ratio = F::load(student_ratio + c * N);
        s.e = F::load(student_out - tile + c * N) * s.ratio;
        if constexpr (kTeacher) {
          s.a = F::load(student_a + c * N);
          s.da = F::load(student_da + c * N);
          t.ratio = F::load(teacher_ratio + c * N);
          t.e = F::load(teacher_out - tile + c * N) * t.ratio;
          w = F::load(gap + c * N);
          dw = F::load(gap_step + c * N);
        }
      }
      for (int r = 0; r < 2; ++r) {
        Statistics<F>& sum = sums[r];
        s.e.store(student_out + r * tile + c * N);
        sum.student_total = sum.student_total + s.e;
        if constexpr (kTeacher) {
          t.e.store(teacher_out + r * tile + c * N);
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
          s.a = s.a + s.da;
          w = w + dw;
        }
      }
      if (half == 0) {
        s.ratio.store(student_ratio + c * N);
        if constexpr (kTeacher) {
          s.a.store(student_a + c * N);
          s.da.store(student_da + c * N);
          t.ratio.store(teacher_ratio + c * N);
          w.store(gap + c * N);
          dw.store(gap_step + c * N);
        }
      }
    }
    *statistics[2 * half] = sums[0];
    *statistics[2 * half + 1] = sums[1];
  }
}

}  // namespace heteroakd::cpu::HAKD_ISA
