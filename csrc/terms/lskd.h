// Distillation of standardised logits: `kd` in reference.py with `standardize`. With the mean and the standard
// deviation of a side's logits over the classes (that of C - 1), eps 1e-7 and p = softmax(u / T):
//
//     u_c      (z_c - mean) / (eps + deviation)
//     value    T^2 KL(p_t || p_s)
//     g_c      T / (eps + deviation) (D_c - slope (z_c - mean)),   D = p_s - p_t,
//              slope = sum_c D_c (z_c - mean) / ((C - 1) deviation (eps + deviation))
//     divided by |V|
//
// z is a here; all but its scale comes out the same. Moments are those of Welford: of sums of squares, what
// is left beside one logit far above all others has no digits.
#pragma once

#include "kd.h"

namespace heteroakd {

struct LskdTerm : KdOptions {
  HAKD_FN static constexpr bool takes(const int32_t* choice) { return choice[1] != 0; }

  HAKD_FN static constexpr Needs needs(int32_t) {
    Needs n;
    n.teacher = n.logits = true;
    return n;
  }
  HAKD_FN static constexpr From student(int32_t) { return From::kOwn; }
  HAKD_FN static constexpr From other_from(int32_t) { return From::kNone; }
  HAKD_FN static constexpr bool has_loop(int32_t) { return true; }
  static constexpr bool kGathers = true;

  template <typename F>
  struct Known {
    F student_scale, teacher_scale;  // (a_c - mean) scale = log2(e) u_c / T
    F mean, slope;                   // of the student
    F student_inverse, teacher_inverse;
  };
  template <typename N, typename S, typename F>
  HAKD_FN static Known<F> begin(int32_t, const N&, const PassNumbers<S>&, const Totals<F>&) {
    return {F(0), F(0), F(0), F(0), F(0), F(0)};
  }

  template <typename F>
  struct Own {
    F student, teacher;                // means, then sums of e
    F student_square, teacher_square;  // sums of squares around them, then sum e_s a_s, sum e_t a_s
    F last;                            // classes so far, then sum e_t (b_t - b_s), b = a scale
  };
  template <typename N, typename S, typename F, typename M>
  HAKD_FN static void gather(int32_t, const N&, const PassNumbers<S>&, const Class<F, M>& c,
                             Own<F>& own) {
    own.last = own.last + F(1);
    const F share = reciprocal(own.last);
    const F student = c.student_a - own.student, teacher = c.teacher_a - own.teacher;
    own.student = fma(student, share, own.student);
    own.teacher = fma(teacher, share, own.teacher);
    own.student_square = fma(student, c.student_a - own.student, own.student_square);
    own.teacher_square = fma(teacher, c.teacher_a - own.teacher, own.teacher_square);
  }
  template <typename N, typename S, typename F>
  HAKD_FN static void learn(int32_t, const N&, const PassNumbers<S>& pass, Known<F>& k,
                            const Own<F>& own) {
    const S freedom = pass.classes > S(1) ? pass.classes - S(1) : S(1);
    const F student = root(own.student_square * F(S(1) / freedom));
    const F teacher = root(own.teacher_square * F(S(1) / freedom));
    const F eps(S(1e-7) * pass.scale), per_u(static_cast<S>(kLog2E) * pass.inverse_temperature);
    k.student_scale = per_u * reciprocal(eps + student);
    k.teacher_scale = per_u * reciprocal(eps + teacher);
    k.mean = own.student;
    k.slope = reciprocal(F(freedom) * student * (eps + student));
  }

  template <typename N, typename S, typename F, typename M>
  HAKD_FN static Pair<F> other(int32_t, const N&, const PassNumbers<S>&, const Known<F>& k,
                               const Class<F, M>& c, const First<F>&, Own<F>& own) {
    const F b_s = max(F(-1e30), c.student_a * k.student_scale);
    const F b_t = max(F(-1e30), c.teacher_a * k.teacher_scale);
    const F e_s = exp2(b_s), e_t = exp2(b_t);
    own.student = own.student + e_s;
    own.teacher = own.teacher + e_t;
    own.student_square = fma(e_s, c.student_a, own.student_square);
    own.teacher_square = fma(e_t, c.student_a, own.teacher_square);
    own.last = fma(e_t, b_t - b_s, own.last);
    const F gap = fma(e_s, k.student_inverse, (F(0) - e_t) * k.teacher_inverse);
    return {fnma(k.slope, c.student_a - k.mean, gap), F(0)};
  }
  template <typename N, typename S, typename F>
  HAKD_FN static void close(int32_t, const N&, const PassNumbers<S>&, Known<F>& k,
                            const Own<F>& own) {
    k.student_inverse = reciprocal(own.student);
    k.teacher_inverse = reciprocal(own.teacher);
    const F rises = fma(own.student_square, k.student_inverse,
                        (F(0) - own.teacher_square) * k.teacher_inverse);
    k.slope = k.slope * rises;
  }

  template <typename N, typename S, typename F>
  HAKD_FN static Coefficients<F> pixel(int32_t, const N&, const PassNumbers<S>& pass,
                                       const Totals<F>&, const Known<F>& known, const Own<F>& own,
                                       S scale) {
    Coefficients<F> k;
    k.value = F(pass.temperature * pass.temperature) *
              kl(own.last, known.teacher_inverse, log2(own.teacher), log2(own.student));
    // T / (eps + deviation) of z
    const S per_scale =
        scale * pass.temperature * pass.temperature * pass.scale * static_cast<S>(kLn2);
    k.student = F(per_scale) * known.student_scale;
    k.other = F(0);
    return k;
  }
};

}  // namespace heteroakd
