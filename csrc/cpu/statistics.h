// Loops over the classes of one vector of pixels that end in sums per pixel.
//
// Arrays are tiles [C][N]: class by class, N pixels each. What a call does not need is compiled
// away; the variants are few because a loop knows only its own flags, not the loss's.
#pragma once

#include "../terms/list.h"
#include "pass.h"

namespace heteroakd::cpu::HAKD_ISA {

template <typename T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <typename T>  // the smallest normal number
constexpr T kTiny = static_cast<T>(sizeof(T) == 4 ? 1.17549435e-38 : 2.2250738585072014e-308);

// log2 of a share that may have underflowed.
template <typename T>
HAKD_FN Lanes<T> log2_of_share(Lanes<T> x) {
  return log2(max(Lanes<T>(kTiny<T>), x));
}

// a + f (b - a) where a or b is huge, infinite or NaN; elsewhere y, which is that. A difference
// could overflow, and 0 * inf must not turn a finite pixel into NaN. Lane by lane, so that what an
// ordinary pixel gets does not depend on its neighbours.
template <typename T>
HAKD_FN Lanes<T> between_huge(Lanes<T> a, Lanes<T> b, Lanes<T> f, T huge, Lanes<T> y) {
  using F = Lanes<T>;
  const F limit(huge);
  const auto bad = either(not_less(abs(a), limit), not_less(abs(b), limit));
  const F mixed = fma(f, b, (F(T(1)) - f) * a);
  return select(bad, select(equal(f, F(T(0))), a, mixed), y);
}

// Rows [kRows] between two rows of logits: z = lo + f (hi - lo), and the maximum over the classes.
// Pixels that are not valid get 0, so that whatever they hold ends here.
template <typename T, int kRows>
void interpolate(int64_t classes, const T* lo, const T* hi, const T* fraction,
                 const Mask<T>* valid, bool careful, T huge, T* z, T* maximum) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const int64_t tile = classes * N;
  F m[kRows];
  F f[kRows];
  for (int r = 0; r < kRows; ++r) {
    f[r] = F(fraction[r]);
    m[r] = F(-kInfinity<T>);
  }
  for (int64_t c = 0; c < classes; ++c, lo += N, hi += N) {
    const F a = F::load(lo);
    const F b = F::load(hi);
    const F d = b - a;
    for (int r = 0; r < kRows; ++r) {
      F y = fma(f[r], d, a);
      if (careful) y = between_huge(a, b, f[r], huge, y);
      y = select(valid[r], y, F(T(0)));
      y.store(z + r * tile + c * N);
      m[r] = max(y, m[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) m[r].store(maximum + r * N);
}

// z - m instead of z, bounded from below, so that huge and infinite logits stay finite, times
// `scale` too. Softmax does not see the difference; terms that read logits themselves are not
// normalised.
template <typename T>
void normalise(int64_t classes, T scale, T* z, T* maximum) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const F m = F::load(maximum);
  const T largest = sizeof(T) == 4 ? T(2e38) : T(1e300);
  const F lowest(scale > T(1) ? -largest / scale : -largest);
  for (int64_t c = 0; c < classes; ++c) {
    max(lowest, F::load(z + c * N) - m).store(z + c * N);
  }
  F(T(0)).store(maximum);
}

template <int kPower, typename F>
HAKD_FN F power(F x) {
  static_assert(kPower == 1 || kPower == 2 || kPower == 4);
  if constexpr (kPower == 1) return x;
  if constexpr (kPower == 2) return x * x;
  return (x * x) * (x * x);
}

// One model. e receives the exponentials at T, hard (if kPower is 0) those at T = 1; otherwise
// these are e^kPower. e may be z.
template <typename T, int kPower, bool kSoft, bool kHard>
void one_model(int64_t classes, const T* z, T* e, T* hard, Lanes<T> m, T scale, T hard_scale,
               Labels<T> labels, ClassSums<Lanes<T>>& s) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  F total(T(0)), others(T(0));
  for (int64_t c = 0; c < classes; ++c) {
    const F x = F::load(z + c * N) - m;
    const F u = exp2(x * F(scale));
    u.store(e + c * N);
    if constexpr (kSoft) total = total + u;
    if constexpr (kHard) {
      F h;
      if constexpr (kPower == 0) {
        h = exp2(x * F(hard_scale));
        h.store(hard + c * N);
      } else {
        h = power<kPower>(u);
      }
      others = add_unless(is_class(labels, static_cast<int32_t>(c)), others, h);
    }
  }
  s.student_total = total;
  s.student_others = others;
}

// Both models at once. kHard: 0 none, 1 the student's, 2 both; kCross: the sums that the value of
// KL(m || p_s) takes besides its logarithms.
template <typename T, int kPower, int kHard, bool kCross>
void two_models(int64_t classes, const T* student_z, const T* teacher_z, T* student_e,
                T* teacher_e, T* student_hard, Lanes<T> student_m, Lanes<T> teacher_m, T scale,
                T hard_scale, Labels<T> labels, ClassSums<Lanes<T>>& s) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  F student_total(T(0)), teacher_total(T(0)), difference(T(0));
  F student_others(T(0)), teacher_others(T(0)), teacher_cross(T(0)), student_self(T(0));
  for (int64_t c = 0; c < classes; ++c) {
    const F student_x = F::load(student_z + c * N) - student_m;
    const F teacher_x = F::load(teacher_z + c * N) - teacher_m;
    const F student_a = student_x * F(scale);
    const F teacher_a = teacher_x * F(scale);
    const F student_u = exp2(student_a);
    const F teacher_u = exp2(teacher_a);
    student_u.store(student_e + c * N);
    teacher_u.store(teacher_e + c * N);
    student_total = student_total + student_u;
    teacher_total = teacher_total + teacher_u;
    difference = fma(teacher_u, teacher_a - student_a, difference);
    if constexpr (kCross) {
      teacher_cross = fma(teacher_u, student_a, teacher_cross);
      student_self = fma(student_u, student_a, student_self);
    }
    if constexpr (kHard > 0) {
      const auto label = is_class(labels, static_cast<int32_t>(c));
      F h;
      if constexpr (kPower == 0) {
        h = exp2(student_x * F(hard_scale));
        h.store(student_hard + c * N);
      } else {
        h = power<kPower>(student_u);
      }
      student_others = add_unless(label, student_others, h);
      if constexpr (kHard > 1) {
        F t;
        if constexpr (kPower == 0) {
          t = exp2(teacher_x * F(hard_scale));
        } else {
          t = power<kPower>(teacher_u);
        }
        teacher_others = add_unless(label, teacher_others, t);
      }
    }
  }
  s = {student_total,  teacher_total, student_others, teacher_others,
       difference,     teacher_cross, student_self};
}

// sum_c w_c (z_c - m), for label smoothing; w_c = 1 without class weights.
template <typename T>
Lanes<T> weighted_logits(int64_t classes, const T* z, Lanes<T> m, const T* class_weight) {
  using F = Lanes<T>;
  F sum(T(0));
  for (int64_t c = 0; c < classes; ++c) {
    const F x = F::load(z + c * F::N) - m;
    sum = class_weight == nullptr ? sum + x : fma(F(class_weight[c]), x, sum);
  }
  return sum;
}

// a_t of the class where z_s is largest, and a_s therefore 0.
template <typename T>
Lanes<T> teacher_at_top(int64_t classes, const T* student_z, const T* teacher_z,
                        Lanes<T> student_m, Lanes<T> teacher_m, T scale) {
  using F = Lanes<T>;
  F z = teacher_m;
  for (int64_t c = 0; c < classes; ++c) {
    const auto top = equal(F::load(student_z + c * F::N), student_m);
    z = select(top, F::load(teacher_z + c * F::N), z);
  }
  return (z - teacher_m) * F(scale);
}

}  // namespace heteroakd::cpu::HAKD_ISA
