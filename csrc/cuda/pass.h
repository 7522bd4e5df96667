// What one pass is, as plain data: the border between the operators (operators.cu) and the kernels,
// which get it by value.
//
// Pixels, cells and who owns them: see cells.h.
#pragma once

#include <cstdint>

// The scalar operations come before the terms, which are templates that use them.
#include "elementary.h"
//
#include "../spec.h"

namespace heteroakd::cuda {

enum class Dtype : int32_t { kFloat, kDouble, kHalf, kBFloat16 };
enum class LabelDtype : int32_t { kUint8, kInt32, kInt64 };

// How the logits of a model lie under the pixels.
enum class Source : int32_t {
  kNone,
  kCells,    // on the grid of cells: four corners serve all pixels of a thread
  kGather,   // on another grid: four taps per pixel
  kLabels,   // on the label grid: one tap per pixel
};

// Rows of cells that a warp walks down (a chunk): two, or one where cells are large, because they are
// few then and warps would be idle. The edge between two chunks costs half a row of saved gradients;
// more rows save little of that and leave a longer tail.
constexpr int kMostChunkRows = 2;
constexpr int kWarpSize = 32;

// A warp's row of `partials`, float64: numerators of the terms, then their shares of denominators of
// their own (`share_index_of`), pixels with or without a label and labels out of range.
enum Partial : int32_t { kFirstShare = kTerms, kValid = kTerms + kShares, kBad, kPartials };

// Logits [B, C, height, width], strides in elements.
struct Logits {
  const void* data;
  int64_t batch_stride, class_stride, row_stride, column_stride;
  int32_t height, width;
  Dtype dtype;
  Source source;
  bool vectors;  // four neighbours of a row can be moved at once, wherever the first is 4 k
};

// Labels [B, H, W], strides in elements.
struct Labels {
  const void* data;
  int64_t batch_stride, row_stride, column_stride;
  LabelDtype dtype;
};

struct Pass {
  int32_t batch, classes, label_height, label_width;
  Logits student, teacher;
  Labels target;
  int64_t ignore_index, unlabelled_index;  // the same where no pixel is unlabelled
  const void* pixel_weight;  // [B, H, W] of the arithmetic's type, or null
  bool align_corners;

  // How the cells of an image are cut: `columns` of cells, numbered through its chunks.
  int32_t rows;        // of cells: height + 1; of labels where the student lies on their grid
  int32_t per_row;     // cells of a row
  int32_t chunk_rows;  // rows of cells of a chunk
  int32_t columns;     // per_row times chunks
  int32_t programs;    // blocks per image
  int32_t rows_per_cell, columns_per_cell;  // most pixels of a cell along each axis
  bool halo;           // the first lane of a warp repeats the cell before it

  // what to compute; terms by their index in ../terms/list.h
  bool has[kTerms];  // asked for, or there for the maps alone
  bool asked[kTerms];
  int32_t variant[kTerms];
  Options options[kTerms];
  Needs needs;
  bool maps, diagnostics, gradients;
  int32_t power;  // e at T = 1 is e at T to this power; 0: neither 1, 2 nor 4
  double temperature;
  const void* class_weight;  // [C] of the arithmetic's type, or null

  // shared memory of a warp (staging.h): classes that lie there at a time, and its bytes
  int32_t staged_classes;
  int32_t warp_bytes;

  // results
  double* partials;  // [B * programs, kPartials]
  void* maps_out;    // [planes, B, H, W] (two maps, three diagnostics) of the arithmetic's type, or
  bool maps_are_float;
  bool wide;         // the arithmetic is in double
  int32_t gradient_of[kTerms];  // which saved gradient a term adds to, -1: none
  int32_t leader[kTerms];  // the first term that adds to the same one; itself, if it adds to none
  void* saved;  // [gradients, B, C, chunks, chunk_rows + 1, width] of the arithmetic's type
  // of a term's gradient: on the label grid weight[k] * grad_totals[group[k]], else weight[k]
  double weight[kTerms];
  int32_t group[kTerms];  // -1: not asked for
  const double* grad_totals;
  // on the label grid: the gradient itself, in the dtype of the logits
  Logits gradient;

  // Terms over space
  int32_t collected;               // the term whose sums over space are being collected
  void* space_found;               // [kMostFirsts, B, programs, C, 2]: maxima and sums of exp
  const void* space_shift[kTerms];    // [kMostFirsts, B, C]: the maximum over an image's pixels
  const void* space_inverse[kTerms];  // 1 / sum exp(first - shift)
  const void* space_log[kTerms];      // shift + log(sum)
  // Terms over classes: sums of the term `collected`, by warps, then space_shift and space_inverse [C]
  // are the numbers that `settle` found.
  double* tallies;  // [B * programs, kMostTallies, C]
};

}  // namespace heteroakd::cuda
