// The loops over classes by cells, for R x S pixels of a cell per thread, from logits that lie in
// shared memory (staging.h). Of terms that read no z_c.
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

#include "pixel_terms.h"
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

// One class at a column of pixels.
template <class Set, int kPower, int R>
struct CellColumn {
  BoundedClass<float, bool> at[R];
  float student_hard[R], teacher_hard[R], difference[R];  // e at T = 1; a_t - a_s

  HAKD_DEVICE CellColumn(const Sides& student, const Sides& teacher, float x, float hard_exponent) {
    const Slope student_a = slope_at(student, x);
    float e[R], a = student_a.first;
    exponentials(student_a, e);
    hard_exponentials<kPower>(student_a, hard_exponent, e, student_hard);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      at[r].student_e = e[r];
      at[r].student_a = a;
      a += student_a.step;
    }
    if (!Set::kTeacher) return;
    const Slope teacher_a = slope_at(teacher, x);
    exponentials(teacher_a, e);
    hard_exponentials<kPower>(teacher_a, hard_exponent, e, teacher_hard);
    float gap = teacher_a.first - student_a.first;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      at[r].teacher_e = e[r];
      difference[r] = gap;
      gap += teacher_a.step - student_a.step;
    }
  }
};

// Sums over the classes [begin, end), whose logits are the first ones at `corner`.
template <class Set, int kPower, int R, int S>
HAKD_DEVICE void cell_statistics(const Pass& p, const float* corner, int32_t begin, int32_t end,
                                 const Fractions<R, S>& at, float hard_exponent,
                                 const int32_t (&label)[R][S], Totals<float> (&sums)[R][S]) {
  constexpr int kModels = Set::kTeacher ? 2 : 1;
#pragma unroll 1
  for (int32_t c = begin; c < end; ++c) {
    const Sides student = sides_of(corner, at.y[0], at.y_step);
    Sides teacher = student;
    if (Set::kTeacher) teacher = sides_of(corner + kPlane, at.y[0], at.y_step);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      CellColumn<Set, kPower, R> column(student, teacher, at.x[s], hard_exponent);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        column.at[r].is_label = label[r][s] == c;
        const auto hard = [&](int m) {
          return m == 0 ? column.student_hard[r] : column.teacher_hard[r];
        };
        add_class<Set>(p, column.at[r], hard, column.difference[r], 0.0f, sums[r][s]);
      }
    }
    corner += kModels * kPlane;
  }
}

// Adds a column of pixels, which has the weight x on the right side.
template <int R>
struct Adjoint {
  float all = 0.0f, right = 0.0f, bottom = 0.0f, bottom_right = 0.0f;

  HAKD_DEVICE void add(int term, const float (&g)[R][kTerms], const float (&y)[R], float x) {
    float column = g[0][term];
    float below = y[0] * column;
#pragma unroll
    for (int r = 1; r < R; ++r) {
      column += g[r][term];
      below = fma(y[r], g[r][term], below);
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

// Gradients of the classes [begin, end), and what of values takes a loop. All lanes of the warp take
// part.
template <class Set, int kPower, bool kGrad, int R, int S>
HAKD_DEVICE void cell_gradients(const Pass& p, const float* corner, int32_t begin, int32_t end,
                                const Fractions<R, S>& at, float hard_exponent,
                                const int32_t (&label)[R][S], PixelTerms<float, Set, R * S>& terms,
                                const RowWriter<float>& rows) {
  constexpr int kModels = Set::kTeacher ? 2 : 1;
  RowCursor<float> cursor[kTerms];  // of the terms that lead
#pragma unroll
  for (int k = 0; k < kTerms; ++k) {
    if (kGrad && Set::leads(p, k)) cursor[k] = {rows, gradient_of<Set>(p, k), begin};
  }
#pragma unroll 1
  for (int32_t c = begin; c < end; ++c) {
    Adjoint<R> adjoint[kTerms];
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      if (kGrad && Set::leads(p, k)) cursor[k].begin();
    }
    const Sides student = sides_of(corner, at.y[0], at.y_step);
    Sides teacher = student;
    if (Set::kTeacher) teacher = sides_of(corner + kPlane, at.y[0], at.y_step);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      CellColumn<Set, kPower, R> column(student, teacher, at.x[s], hard_exponent);
      float g[R][kTerms];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        column.at[r].is_label = label[r][s] == c;
        terms.find_gradients(c, column.at[r], column.student_hard[r], r * S + s,
                             label[r][s] >= 0, g[r]);
      }
#pragma unroll
      for (int k = 0; k < kTerms; ++k) {
        if (kGrad && Set::leads(p, k)) adjoint[k].add(k, g, at.y, at.x[s]);
      }
    }
#pragma unroll
    for (int k = 0; k < kTerms; ++k) {
      if (kGrad && Set::leads(p, k)) cursor[k].add(adjoint[k].corners());
    }
    corner += kModels * kPlane;
  }
}

}  // namespace heteroakd::cuda
