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

// Where a model's logits lie under a segment.
template <typename F, int S>
struct Under {
  int64_t top, bottom;         // rows of the image's first class, as offsets
  int32_t left[S], right[S];   // columns; of kCells only the first, of kLabels only the left
  F fraction_y, fraction_x[S];
};

template <typename F, int S>
HAKD_DEVICE Under<F, S> under(const Pass& p, const Logits& model, int32_t image,
                              const Segment<F, S>& at, int32_t cell_y, int32_t cell_x) {
  Under<F, S> u;
  const int64_t base = image * model.batch_stride;
  if (model.source == Source::kCells) {
    u.top = base + (cell_y < 0 ? 0 : cell_y) * model.row_stride;
    u.bottom = base + (cell_y + 1 < model.height ? cell_y + 1 : model.height - 1) * model.row_stride;
    for (int s = 0; s < S; ++s) {
      u.left[s] = cell_x < 0 ? 0 : cell_x;
      u.right[s] = cell_x + 1 < model.width ? cell_x + 1 : model.width - 1;
      u.fraction_x[s] = at.fraction_x[s];
    }
    u.fraction_y = at.fraction_y;
    return u;
  }
  const int32_t y = at.y < p.label_height ? at.y : p.label_height - 1;
  if (model.source == Source::kLabels) {
    u.top = u.bottom = base + y * model.row_stride;
    for (int s = 0; s < S; ++s) {
      u.left[s] = u.right[s] = at.x + s < p.label_width ? at.x + s : p.label_width - 1;
      u.fraction_x[s] = F(0);
    }
    u.fraction_y = F(0);
    return u;
  }
  const Taps<F> row = taps_of_position<F>(axis_of(model.height, p.label_height, p.align_corners), y);
  u.top = base + row.lower * model.row_stride;
  u.bottom = base + row.upper * model.row_stride;
  u.fraction_y = row.fraction;
  const Axis axis = axis_of(model.width, p.label_width, p.align_corners);
  for (int s = 0; s < S; ++s) {
    const int32_t x = at.x + s < p.label_width ? at.x + s : p.label_width - 1;
    const Taps<F> column = taps_of_position<F>(axis, x);
    u.left[s] = column.lower;
    u.right[s] = column.upper;
    u.fraction_x[s] = column.fraction;
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

// One pixel of one class, the careful way. Rare, and not worth a copy in every loop.
template <typename F>
__device__ __noinline__ F read_carefully(const void* data, Dtype dtype, Source source, int64_t top,
                                         int64_t bottom, int64_t left, int64_t right, F fraction_y,
                                         F fraction_x) {
  if (source == Source::kLabels) return load_logit<F>(data, dtype, top + left);
  const F z00 = load_logit<F>(data, dtype, top + left);
  const F z01 = load_logit<F>(data, dtype, top + right);
  const F z10 = load_logit<F>(data, dtype, bottom + left);
  const F z11 = load_logit<F>(data, dtype, bottom + right);
  return between_huge(between_huge(z00, z10, fraction_y), between_huge(z01, z11, fraction_y),
                      fraction_x);
}

template <typename F, int S>
HAKD_DEVICE F read_pixel_carefully(const Logits& model, const Under<F, S>& u, int32_t c, int s) {
  const int64_t plane = c * model.class_stride;
  return read_carefully<F>(model.data, model.dtype, model.source, plane + u.top, plane + u.bottom,
                           u.left[s] * model.column_stride, u.right[s] * model.column_stride,
                           u.fraction_y, u.fraction_x[s]);
}

// One class at all pixels; 0 where not valid.
template <typename F, int S>
HAKD_DEVICE void read(const Logits& model, const Under<F, S>& u, int32_t c, bool careful,
                      const int32_t (&label)[S], F (&z)[S]) {
  const int64_t top = u.top + c * model.class_stride;
  if (careful) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      z[s] = label[s] >= 0 ? read_pixel_carefully(model, u, c, s) : F(0);
    }
    return;
  }
  if (model.source == Source::kLabels) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      z[s] = load_logit<F>(model.data, model.dtype, top + u.left[s] * model.column_stride);
    }
  } else {
    const int64_t bottom = u.bottom + c * model.class_stride;
    F left = F(0), across = F(0);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (s == 0 || model.source == Source::kGather) {
        const int64_t l = u.left[s] * model.column_stride;
        const int64_t r = u.right[s] * model.column_stride;
        left = between(load_logit<F>(model.data, model.dtype, top + l),
                       load_logit<F>(model.data, model.dtype, bottom + l), u.fraction_y);
        across = between(load_logit<F>(model.data, model.dtype, top + r),
                         load_logit<F>(model.data, model.dtype, bottom + r), u.fraction_y) -
                 left;
      }
      z[s] = fma(u.fraction_x[s], across, left);
    }
  }
#pragma unroll
  for (int s = 0; s < S; ++s) z[s] = label[s] >= 0 ? z[s] : F(0);
}

}  // namespace heteroakd::cuda
