// The way back to low resolution: what the pixels of a cell owe to its four corners goes into the
// rows of saved gradients.
//
// Saved: [gradients, B, C, chunks, chunk_rows + 1, width]; row t of a chunk is the top of its cell row t
// and the bottom of the one above; the last cell row's bottom is a row of its own, which
// combine_gradients adds to the next chunk's first. A row is written and read again by one thread,
// the owner of the column, which walks down: no atomics, no barrier, and one order for every sum.
// Cost per class, term and step of a cell: 2 shuffles, up to 2 loads (issued a whole class ahead of
// their use), 2 stores; the bytes are those of the low-resolution gradient.
#pragma once

#include "cells.h"

namespace heteroakd::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;

// Sums over the pixels of a cell, of gradients times bilinear weights.
template <typename F>
struct Corners {
  F top_left, top_right, bottom_left, bottom_right;
};

// Where the gradients of a lane's column go.
template <typename F>
struct RowWriter {
  F* top;           // class 0, gradient 0, the row of the cell's top
  int64_t gradient_stride, class_stride;
  int32_t width;
  bool written;     // the lane owns a column that exists
  bool from_above;  // the cell above left something for the top
  bool again;       // a later step of the same cell: both rows have been written
};

// Walks through the classes of one gradient.
template <typename F>
class RowCursor {
 public:
  RowCursor() = default;
  // gradient < 0: nothing is read or written.
  HAKD_DEVICE RowCursor(const RowWriter<F>& rows, int32_t gradient, int32_t c)
      : top_(rows.top + (gradient < 0 ? 0 : gradient) * rows.gradient_stride + c * rows.class_stride),
        class_stride_(rows.class_stride),
        width_(rows.width),
        used_(gradient >= 0),
        written_(rows.written),
        reads_top_(used_ && rows.written && (rows.from_above || rows.again)),
        reads_bottom_(used_ && rows.written && rows.again) {}

  // What is there: asked for at the beginning of a class, needed at its end.
  HAKD_DEVICE void begin() {
    before_top_ = reads_top_ ? top_[0] : F(0);
    before_bottom_ = reads_bottom_ ? top_[width_] : F(0);
  }

  // All lanes of the warp take part. Then comes the next class.
  HAKD_DEVICE void add(const Corners<F>& g) {
    if (!used_) return;
    // The halo lane gets its own value back, and does not write.
    const F top_of_left = __shfl_up_sync(kAllLanes, g.top_right, 1);
    const F bottom_of_left = __shfl_up_sync(kAllLanes, g.bottom_right, 1);
    if (written_) {
      top_[0] = before_top_ + (g.top_left + top_of_left);
      top_[width_] = before_bottom_ + (g.bottom_left + bottom_of_left);
    }
    top_ += class_stride_;
  }

 private:
  F* top_;
  int64_t class_stride_;
  int32_t width_;
  bool used_, written_, reads_top_, reads_bottom_;
  F before_top_, before_bottom_;
};

// For cell row t of a lane's column.
template <typename F>
HAKD_DEVICE RowWriter<F> row_writer(const Pass& p, int32_t image, const Column& column, int32_t t) {
  const int64_t width = p.student.width;
  const int64_t chunks = p.columns / p.per_row;
  const int64_t plane = chunks * (p.chunk_rows + 1) * width;
  RowWriter<F> rows;
  rows.class_stride = plane;
  rows.gradient_stride = plane * p.classes * p.batch;
  rows.width = p.student.width;
  rows.top = static_cast<F*>(p.saved) + image * (p.classes * plane) +
             (column.chunk * (p.chunk_rows + 1) + t) * width + column.cell;
  rows.written = column.own && column.cell >= 0;
  rows.from_above = t > 0;
  rows.again = false;
  return rows;
}

}  // namespace heteroakd::cuda
