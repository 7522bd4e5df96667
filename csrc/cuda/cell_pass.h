// The loops over classes of the usual terms (ce, forward kd, hetero of the preset softmax-kl), for
// R x S pixels of a cell per thread, from logits that lie in shared memory (staging.h).
//
// Cost per pixel and class for ce + hetero at T = 2, R = S = 4, in instructions (docs/cuda.md has the
// counts read off the machine code; the kinds of work in brackets are per thread and class):
//
//     statistics   interpolation and exponentials 2.8 per model [8 shared loads, 16 for the sides,
//                  4 columns x (2 fma, 2 exponentials, 3 products)], sums 3 per model, difference 2.3
//     gradients    the same exponentials, mixed target and its logarithm 6, two gradients 5, their
//                  way to the corners 3.5 each
//
// Exponentials: a pixel column inside a cell is R evenly spaced numbers, so e of each row is the one
// above times q = 2^step: 2 instead of R special functions, on the unit that would bind otherwise.
// Staged logits are at least -kLimit, which makes this safe: no e underflows, no q overflows where
// cells are at least 3 pixels high, and a pixel is never worse than 4 roundings of the textbook way.
#pragma once

#include "pixel.h"
#include "staging.h"

namespace heteroakd::cuda {

// Where the pixels of a step lie in their cell.
template <int R, int S>
struct Fractions {
  float y[R];
  float y_step;
  float x[S];
};

// One class of one model: the left side of the cell and what must be added to come to the right
// one, at the first row of pixels, and both steps from a row to the next.
struct Sides {
  float left, across, left_step, across_step;
};

HAKD_DEVICE Sides sides_of(const float* corner, float first_y, float y_step) {
  const float left_drop = corner[kPitch] - corner[0];
  const float right_drop = corner[kPitch + 1] - corner[1];
  const float left = fma(first_y, left_drop, corner[0]);
  const float right = fma(first_y, right_drop, corner[1]);
  const float left_step = y_step * left_drop;
  return {left, right - left, left_step, fma(y_step, right_drop, 0.0f - left_step)};
}

// A column of pixels: a = first + r step.
struct Slope {
  float first, step;
};

HAKD_DEVICE Slope slope_at(const Sides& sides, float x) {
  return {fma(x, sides.across, sides.left), fma(x, sides.across_step, sides.left_step)};
}

// 2^(factor (first + r step))
template <int R>
HAKD_DEVICE void exponentials(const Slope& slope, float (&e)[R]) {
  e[0] = exp2(slope.first);
  const float q = exp2(slope.step);
#pragma unroll
  for (int r = 1; r < R; ++r) e[r] = e[r - 1] * q;
}

// e at T = 1 from e at T. kPower = 0: by exponentials of their own.
template <int kPower, int R>
HAKD_DEVICE void hard_exponentials(const Slope& slope, float exponent, const float (&e)[R],
                                   float (&h)[R]) {
  if constexpr (kPower == 0) {
    exponentials({slope.first * exponent, slope.step * exponent}, h);
  } else {
#pragma unroll
    for (int r = 0; r < R; ++r) h[r] = kPower == 2 ? e[r] * e[r] : e[r];
  }
}

// Sums over the classes [begin, end), whose logits are the first ones at `corner`.
template <class Set, int kPower, int R, int S>
HAKD_DEVICE void cell_statistics(const Pass& p, const float* corner, int32_t begin, int32_t end,
                                 const Fractions<R, S>& at, float hard_exponent,
                                 const int32_t (&label)[R][S],
                                 Totals<float> (&sums)[R][S]) {
  constexpr int kModels = Set::kTeacher ? 2 : 1;
#pragma unroll 1
  for (int32_t c = begin; c < end; ++c) {
    const Sides student = sides_of(corner, at.y[0], at.y_step);
    Sides teacher = student;
    if (Set::kTeacher) teacher = sides_of(corner + kPlane, at.y[0], at.y_step);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const Slope student_a = slope_at(student, at.x[s]);
      float student_e[R], teacher_e[R], student_h[R], teacher_h[R];
      exponentials(student_a, student_e);
      hard_exponentials<kPower>(student_a, hard_exponent, student_e, student_h);
      float difference = 0.0f, difference_step = 0.0f;
      if (Set::kTeacher) {
        const Slope teacher_a = slope_at(teacher, at.x[s]);
        exponentials(teacher_a, teacher_e);
        hard_exponentials<kPower>(teacher_a, hard_exponent, teacher_e, teacher_h);
        difference = teacher_a.first - student_a.first;
        difference_step = teacher_a.step - student_a.step;
      }
#pragma unroll
      for (int r = 0; r < R; ++r) {
        Totals<float>& sum = sums[r][s];
        const bool is_label = label[r][s] == c;
        if (soft<Set>(p)) sum.student_total += student_e[r];
        if (Set::kTeacher) {
          sum.teacher_total += teacher_e[r];
          if (r > 0) difference += difference_step;
          sum.difference = fma(teacher_e[r], difference, sum.difference);
        }
        if (!is_label) {
          if (Set::kNeeds.student_nll) sum.student_others += student_h[r];
          if (Set::kNeeds.teacher_nll) sum.teacher_others += teacher_h[r];
        }
      }
    }
    corner += kModels * kPlane;
  }
}

// What the gradients need to know of a pixel; 0 where not valid.
template <int R, int S>
struct CellCoefficients {
  float ce_hard[R][S], ce_label[R][S];
  float kd_student[R][S], kd_other[R][S];
  float hetero_student[R][S], hetero_other[R][S];
  float teacher_weight[R][S], student_weight[R][S];
  float late[R][S];  // sum_c x_c (log2 x_c - a_s,c)
};

// Adds a column of pixels, which has the weight x on the right side.
template <int R>
struct Adjoint {
  float all = 0.0f, right = 0.0f, bottom = 0.0f, bottom_right = 0.0f;

  HAKD_DEVICE void add(const float (&g)[R], const float (&y)[R], float x) {
    float column = g[0];
    float below = y[0] * g[0];
#pragma unroll
    for (int r = 1; r < R; ++r) {
      column += g[r];
      below = fma(y[r], g[r], below);
    }
    all += column;
    bottom += below;
    right = fma(x, column, right);
    bottom_right = fma(x, below, bottom_right);
  }

  HAKD_DEVICE Corners<float> corners() const {
    const float top_right = right - bottom_right;
    const float bottom_left = bottom - bottom_right;
    return {(all - right) - bottom_left, top_right, bottom_left, bottom_right};
  }
};

// m_c of two e that have underflowed, so that its logarithm is finite; it is lost in any sum.
constexpr float kTiny = 1e-37f;

// Gradients of the classes [begin, end), and what of hetero's value takes a logarithm per class.
// All lanes of the warp take part.
template <class Set, int kPower, bool kGrad, int R, int S>
HAKD_DEVICE void cell_gradients(const Pass& p, const float* corner, int32_t begin, int32_t end,
                                const Fractions<R, S>& at, float hard_exponent,
                                const int32_t (&label)[R][S], CellCoefficients<R, S>& k,
                                const RowWriter<float>& rows) {
  constexpr int kModels = Set::kTeacher ? 2 : 1;
  const bool ce = kGrad && Set::template has<CrossEntropyTerm>(p);
  const bool kd = kGrad && Set::template has<KdTerm>(p);
  const bool hetero = Set::template has<HeteroTerm>(p);
  constexpr int kCe = index_of<CrossEntropyTerm>, kKd = index_of<KdTerm>;
  // ce and kd have one gradient, where the call has both
  RowCursor<float> hard_rows, hetero_rows;
  if (ce || kd) hard_rows = {rows, p.gradient_of[kCe] >= 0 ? p.gradient_of[kCe] : p.gradient_of[kKd], begin};
  if (kGrad && hetero) hetero_rows = {rows, p.gradient_of[index_of<HeteroTerm>], begin};
#pragma unroll 1
  for (int32_t c = begin; c < end; ++c) {
    if (ce || kd) hard_rows.begin();
    if (kGrad && hetero) hetero_rows.begin();
    Adjoint<R> of_hard, of_hetero;

    const Sides student = sides_of(corner, at.y[0], at.y_step);
    Sides teacher = student;
    if (Set::kTeacher) teacher = sides_of(corner + kPlane, at.y[0], at.y_step);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const Slope student_a = slope_at(student, at.x[s]);
      float student_e[R], teacher_e[R], g[R];
      exponentials(student_a, student_e);
      if (Set::kTeacher) exponentials(slope_at(teacher, at.x[s]), teacher_e);
      if (ce) {
        float h[R];
        hard_exponentials<kPower == 0 ? 0 : 1>(student_a, hard_exponent, student_e, h);
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const bool is_label = label[r][s] == c;
          g[r] = k.ce_hard[r][s] * h[r];
          if (kPower == 2) g[r] *= h[r];  // in this order: the coefficient may be 0
          if (is_label) g[r] = k.ce_label[r][s];
        }
      }
      if (kd) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float own = k.kd_student[r][s] * student_e[r];
          g[r] = fnma(k.kd_other[r][s], teacher_e[r], ce ? g[r] + own : own);
        }
      }
      if (ce || kd) of_hard.add(g, at.y, at.x[s]);
      if (hetero) {
        float a = student_a.first;
#pragma unroll
        for (int r = 0; r < R; ++r) {
          const float weighted = fma(k.teacher_weight[r][s], teacher_e[r], kTiny);
          const float m = mixed_target(1.0f, weighted, k.student_weight[r][s], student_e[r]);
          k.late[r][s] = fma(m, fast_log2(m) - a, k.late[r][s]);
          a += student_a.step;
          g[r] = fnma(k.hetero_other[r][s], weighted, k.hetero_student[r][s] * student_e[r]);
        }
        if (kGrad) of_hetero.add(g, at.y, at.x[s]);
      }
    }
    if (ce || kd) hard_rows.add(of_hard.corners());
    if (kGrad && hetero) hetero_rows.add(of_hetero.corners());
    corner += kModels * kPlane;
  }
}

}  // namespace heteroakd::cuda
