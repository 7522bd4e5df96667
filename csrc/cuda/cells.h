// Which pixels a thread works on, and where they lie between the logits.
//
// A cell is what lies between four neighbouring logits of the student; the cells of an axis of n
// logits are -1 (before the first) to n - 1 (behind the last). A lane of a warp owns one column of
// cells and walks down chunk_rows of them (a chunk):
//
//     corners of cell (i, j)   (i, j)  (i, j+1)        pixels   y  start(i) .. start(i+1) - 1
//                            (i+1, j)  (i+1, j+1)               x  start(j) .. start(j+1) - 1
//
// Columns are numbered through the chunks of an image, (chunk, j) -> chunk * per_row + j, so that
// ragged widths waste no more than the end of the last warp. With a gradient, what the right side of
// a cell owes to its neighbour's logit crosses one lane. The first lane of each warp is therefore a
// halo: it repeats the last cell of the warp before (1/32 more work) and owns nothing; no warp waits
// for another one.
//
// Positions are exact: source(y) = (y * step + origin) / unit in integers, whatever the ratio. At the
// edges both taps are the same logit; the fraction is set so that the whole gradient goes to the one
// that exists: 1 before the first, 0 behind the last.
//
// Where the student lies on the label grid there are no cells: a lane owns kLabelPixels neighbouring
// pixels of a row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../math/labels.h"
#include "../math/macros.h"
#include "pass.h"

namespace heteroakd::cuda {

#define HAKD_DEVICE __device__ __forceinline__

HAKD_DEVICE int32_t clamp(int32_t i, int32_t size) { return i < 0 ? 0 : i >= size ? size - 1 : i; }

// source(position) = (position * step + origin) / unit
struct Axis {
  int64_t step, origin, unit;
  int32_t in_size, out_size;
};

HAKD_DEVICE Axis axis_of(int32_t in_size, int32_t out_size, bool align_corners) {
  const int64_t in = in_size;
  const int64_t out = out_size;
  if (align_corners) {
    return {out > 1 ? in - 1 : 0, 0, out > 1 ? out - 1 : 1, in_size, out_size};
  }
  return {2 * in, in - out, 2 * out, in_size, out_size};
}

// Of operands that are not negative: most fit in 32 bits, where a division costs a quarter.
HAKD_DEVICE int64_t divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return static_cast<int64_t>(static_cast<uint64_t>(a) / static_cast<uint64_t>(b));
}

// The first pixel of a cell, in [0, out_size].
HAKD_DEVICE int32_t cell_start(const Axis& axis, int32_t cell) {
  if (cell < 0) return 0;
  if (cell >= axis.in_size) return axis.out_size;
  // a single row of logits, or of labels under align_corners: all of it is cell 0
  if (axis.step == 0) return cell > 0 ? axis.out_size : 0;
  const int64_t at = cell * axis.unit - axis.origin;
  const int64_t first = at <= 0 ? 0 : divide(at + axis.step - 1, axis.step);
  return first < axis.out_size ? static_cast<int32_t>(first) : axis.out_size;
}

// n / unit, rounded once.
template <typename T>
HAKD_DEVICE T fraction_of(int64_t n, int64_t unit) {
  return static_cast<T>(n) / static_cast<T>(unit);
}

// The weight of the upper tap of a pixel in a cell. Positions beyond it (of pixels that do not
// exist, where a thread has more than its cell) get that of its border.
template <typename T>
HAKD_DEVICE T fraction_in_cell(const Axis& axis, int32_t position, int32_t cell) {
  if (cell < 0) return T(1);
  if (cell >= axis.in_size - 1) return T(0);
  const int64_t n = position * axis.step + axis.origin - cell * axis.unit;
  if (n <= 0) return T(0);
  return n >= axis.unit ? T(1) : fraction_of<T>(n, axis.unit);
}

// Both taps of any position. A neighbour of weight zero is not read.
template <typename T>
struct Taps {
  int32_t lower, upper;
  T fraction;
};

template <typename T>
HAKD_DEVICE Taps<T> taps_of_position(const Axis& axis, int32_t position) {
  int64_t n = position * axis.step + axis.origin;
  if (n < 0) n = 0;
  int64_t lower = divide(n, axis.unit);
  if (lower > axis.in_size - 1) lower = axis.in_size - 1;
  n -= lower * axis.unit;
  const bool between = n > 0 && lower < axis.in_size - 1;
  return {static_cast<int32_t>(lower), static_cast<int32_t>(lower) + (between ? 1 : 0),
          between ? fraction_of<T>(n, axis.unit) : T(0)};
}

// The column of cells of a lane.
struct Column {
  int32_t chunk, cell;  // cell: from -1 on
  bool exists, own;
};

HAKD_DEVICE Column column_of(const Pass& p, int32_t number, bool halo_lane) {
  const bool exists = number >= 0 && number < p.columns;
  if (number < 0) number = 0;
  if (number >= p.columns) number = p.columns - 1;
  const int32_t chunk = number / p.per_row;
  return {chunk, number - chunk * p.per_row - 1, exists, exists && !halo_lane};
}

// Where a thread of a pass stands.
struct Thread {
  int32_t lane, warp, image;
  int32_t first;  // number of the column of its warp's first lane
  int64_t row;    // of `partials`
  Column column;
};

template <int kThreads>
HAKD_DEVICE Thread this_thread(const Pass& p) {
  constexpr int kWarps = kThreads / kWarpSize;
  Thread t;
  t.lane = static_cast<int32_t>(threadIdx.x % kWarpSize);
  t.warp = static_cast<int32_t>(threadIdx.x / kWarpSize);
  t.image = static_cast<int32_t>(blockIdx.x / p.programs);
  t.row = static_cast<int64_t>(blockIdx.x) * kWarps + t.warp;
  const int32_t halo = p.halo ? 1 : 0;
  const auto program = static_cast<int32_t>(blockIdx.x % p.programs);
  t.first = (program * kWarps + t.warp) * (kWarpSize - halo) - halo;
  t.column = column_of(p, t.first + t.lane, p.halo && t.lane == 0);
  return t;
}

}  // namespace heteroakd::cuda
