// Logits at neighbouring pixels of a label row, read through any strides from any grid.
//
// The careful way is exact for any corners: huge, infinite or NaN ones; a warp takes it when the
// plain way has found some. Nothing of an invalid pixel comes through in either.
#pragma once

#include "adjoint.h"
#include "memory.h"

namespace heteroakd::cuda {

// S neighbouring pixels of a label row that one thread has.
template <typename F, int S>
struct Segment {
  int32_t y, x;  // of the first
  F fraction_y, fraction_x[S];  // in the student's cell
  int32_t label[S];             // -1: not valid
  bool inside[S];               // the pixel exists, and is this thread's
};

// Where a model's logits lie under a segment: rows of class 0 and columns in them, in bytes.
template <typename F, int S>
struct Under {
  const char* top;
  const char* bottom;
  int64_t left[S], right[S];  // of kCells only the first, of kLabels only the left
  F fraction_y, fraction_x[S];
};

HAKD_DEVICE int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

template <typename F, int S>
HAKD_DEVICE Under<F, S> under(const Pass& p, const Logits& model, int32_t image,
                              const Segment<F, S>& at, int32_t cell_y, int32_t cell_x) {
  Under<F, S> u;
  const int64_t size = bytes_of(model.dtype);
  const char* base = static_cast<const char*>(model.data) + image * model.batch_stride * size;
  const int64_t row = model.row_stride * size;
  const int64_t column = model.column_stride * size;
  if (model.source == Source::kCells) {
    u.top = base + (cell_y < 0 ? 0 : cell_y) * row;
    u.bottom = base + (cell_y + 1 < model.height ? cell_y + 1 : model.height - 1) * row;
    for (int s = 0; s < S; ++s) {
      u.left[s] = (cell_x < 0 ? 0 : cell_x) * column;
      u.right[s] = (cell_x + 1 < model.width ? cell_x + 1 : model.width - 1) * column;
      u.fraction_x[s] = at.fraction_x[s];
    }
    u.fraction_y = at.fraction_y;
    return u;
  }
  const int32_t y = at.y < p.label_height ? at.y : p.label_height - 1;
  if (model.source == Source::kLabels) {
    u.top = u.bottom = base + y * row;
    for (int s = 0; s < S; ++s) {
      u.left[s] = u.right[s] = (at.x + s < p.label_width ? at.x + s : p.label_width - 1) * column;
      u.fraction_x[s] = F(0);
    }
    u.fraction_y = F(0);
    return u;
  }
  const Taps<F> rows = taps_of_position<F>(axis_of(model.height, p.label_height, p.align_corners), y);
  u.top = base + rows.lower * row;
  u.bottom = base + rows.upper * row;
  u.fraction_y = rows.fraction;
  const Axis axis = axis_of(model.width, p.label_width, p.align_corners);
  for (int s = 0; s < S; ++s) {
    const int32_t x = at.x + s < p.label_width ? at.x + s : p.label_width - 1;
    const Taps<F> columns = taps_of_position<F>(axis, x);
    u.left[s] = columns.lower * column;
    u.right[s] = columns.upper * column;
    u.fraction_x[s] = columns.fraction;
  }
  return u;
}

template <typename F>
HAKD_DEVICE F between(F a, F b, F f) {
  return fma(f, b - a, a);
}

// `between` where b - a may overflow, and 0 * inf must not turn a finite pixel into NaN.
template <typename F>
HAKD_DEVICE F between_huge(F a, F b, F f) {
  constexpr F huge = F(1e37);
  if (abs(a) < huge && abs(b) < huge) return between(a, b, f);  // false for NaN
  if (f == F(0)) return a;
  if (f == F(1)) return b;
  return fma(f, b, (F(1) - f) * a);
}

template <typename F>
HAKD_DEVICE F load_at(const char* p, Dtype dtype) {
  return load_logit<F>(p, dtype, 0);
}

// One pixel of one class, the careful way. Rare, and not worth a copy in every loop.
template <typename F>
__device__ __noinline__ F read_carefully(Dtype dtype, Source source, const char* top,
                                         const char* bottom, int64_t left, int64_t right,
                                         F fraction_y, F fraction_x) {
  if (source == Source::kLabels) return load_at<F>(top + left, dtype);
  const F z00 = load_at<F>(top + left, dtype);
  const F z01 = load_at<F>(top + right, dtype);
  const F z10 = load_at<F>(bottom + left, dtype);
  const F z11 = load_at<F>(bottom + right, dtype);
  return between_huge(between_huge(z00, z10, fraction_y), between_huge(z01, z11, fraction_y),
                      fraction_x);
}

template <typename F, int S>
HAKD_DEVICE F read_pixel_carefully(const Logits& model, const Under<F, S>& u, int32_t c, int s) {
  const int64_t plane = c * (model.class_stride * bytes_of(model.dtype));
  return read_carefully<F>(model.dtype, model.source, u.top + plane, u.bottom + plane, u.left[s],
                           u.right[s], u.fraction_y, u.fraction_x[s]);
}

template <typename E, typename F>
HAKD_DEVICE F element_at(const char* p, bool is_half) {
  return static_cast<F>(widen(__ldg(reinterpret_cast<const E*>(p)), is_half));  // nobody writes logits
}

// One class at all pixels, the plain way. E: float, double, or uint16_t for both dtypes of 16 bits.
template <typename E, typename F, int S>
HAKD_DEVICE void read_plainly(const Logits& model, const Under<F, S>& u, int64_t plane, F (&z)[S]) {
  const bool is_half = model.dtype == Dtype::kHalf;
  const char* top = u.top + plane;
  if (model.source == Source::kLabels) {
#pragma unroll
    for (int s = 0; s < S; ++s) z[s] = element_at<E, F>(top + u.left[s], is_half);
    return;
  }
  const char* bottom = u.bottom + plane;
  if (model.source == Source::kCells) {
    const F left = between(element_at<E, F>(top + u.left[0], is_half),
                           element_at<E, F>(bottom + u.left[0], is_half), u.fraction_y);
    const F right = between(element_at<E, F>(top + u.right[0], is_half),
                            element_at<E, F>(bottom + u.right[0], is_half), u.fraction_y);
#pragma unroll
    for (int s = 0; s < S; ++s) z[s] = between(left, right, u.fraction_x[s]);
    return;
  }
#pragma unroll
  for (int s = 0; s < S; ++s) {
    const F left = between(element_at<E, F>(top + u.left[s], is_half),
                           element_at<E, F>(bottom + u.left[s], is_half), u.fraction_y);
    const F right = between(element_at<E, F>(top + u.right[s], is_half),
                            element_at<E, F>(bottom + u.right[s], is_half), u.fraction_y);
    z[s] = between(left, right, u.fraction_x[s]);
  }
}

// One class at all pixels. What is infinite or NaN at an invalid pixel makes a warp careful, too, and
// then is 0.
template <typename F, int S>
HAKD_DEVICE void read(const Logits& model, const Under<F, S>& u, int32_t c, bool careful,
                      const int32_t (&label)[S], F (&z)[S]) {
  const int64_t plane = c * (model.class_stride * bytes_of(model.dtype));
  if (careful || (sizeof(F) == 4 && model.dtype == Dtype::kDouble)) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      z[s] = label[s] >= 0 ? read_pixel_carefully(model, u, c, s) : F(0);
    }
    return;
  }
  if (sizeof(F) == 8 && model.dtype == Dtype::kDouble) {
    read_plainly<double>(model, u, plane, z);
  } else if (model.dtype == Dtype::kFloat) {
    read_plainly<float>(model, u, plane, z);
  } else {
    read_plainly<uint16_t>(model, u, plane, z);
  }
}

// S numbers of a thread in shared memory, of those that its block keeps [class][model][thread].
template <typename F, int S>
struct alignas(sizeof(F) * S) Held {
  F v[S];
};

}  // namespace heteroakd::cuda
