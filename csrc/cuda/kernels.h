// The kernels as the operators see them: which there are, and how each is launched.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "pass.h"

namespace heteroakd::cuda {

// A way to run a pass. Results do not depend on it but for rounding.
struct Kernel {
  const char* name;
  int32_t threads;         // of a block
  int32_t pixels;          // neighbours that a lane has on the label grid
  int32_t staged_models;   // whose logits lie in shared memory; 0: nothing does
  void (*launch)(const Pass&, dim3 grid, int64_t shared_bytes, cudaStream_t, const char* name);
};

// By terms, of the preset softmax-kl with mix = probs, forward kd, without label smoothing. float.
const Kernel& cells_ce();
const Kernel& cells_ce_kd();
const Kernel& cells_ce_hetero();
const Kernel& cells_ce_kd_hetero();
// The same terms, all logits on the label grid; null where there are too many classes.
const Kernel* labels_grid(int64_t classes, bool teacher);
// Of one thread's logits held in shared memory, with these terms (and ce); null: there is none.
const Kernel* segments_fixed(const Pass&);
// Of any terms, float or double.
const Kernel& segments(const Pass&, bool wide);
// Maxima and sums of exp over each image, of the term `collected`.
const Kernel& space_statistics(bool wide);
// Sums over the labelled pixels of each class, of the term `collected`.
const Kernel& class_tallies(bool wide);

// Bytes of shared memory that a warp needs besides the staged logits, and for each staged class.
int64_t staging_bytes(int32_t models);
int64_t staging_bytes_per_class(int32_t models);

// sums.cu
struct Finish {
  const double* partials;  // [images * rows, kPartials]
  int64_t rows;            // per image
  int32_t images, classes;
  // terms by their index in ../terms/list.h
  int32_t position[kTerms];  // of a term among numerators, -1: not asked for
  int32_t group[kTerms];     // of its denominator
  Denominator denominator[kTerms];
  bool is_divergence[kTerms], needs_label[kTerms];
  const double* value[kTerms];  // of a term over classes, or null
  int32_t share_of[kTerms];  // where its share stands in a row of partials, -1: it has none
  double* numerators;
  double* denominators;
  const double* pixels;  // of `count_pixels`, or null
  bool weighted;         // by pixel_weight
  int64_t* report;       // [4], see heteroakd_fast/labels.py, or null
};
void launch_finish_sums(const Finish&, cudaStream_t);

// Where there are unlabelled pixels or weights: labelled pixels, the sums of the weights of the labelled
// and of all counted ones, and weights out of range; in counts[0 .. kPixelCounts), behind which there
// is room for as many of each of kCountBlocks blocks.
constexpr int32_t kPixelCounts = 4, kCountBlocks = 512;
void launch_count_pixels(const Pass&, double* counts, cudaStream_t);

// totals[g]: the sum of weight * numerator over the terms of group g.
struct GroupTotals {
  int32_t terms, groups;
  int32_t group[kPublicTerms];
  double weight[kPublicTerms];
  const double* numerators;
  double* totals;
};
void launch_group_totals(const GroupTotals&, cudaStream_t);

struct Combine {
  const void* saved;  // [gradients, B, C, chunks, chunk_rows + 1, width], float or double
  bool wide;
  int32_t gradients;
  int32_t group[kMostGradients];  // of each gradient
  double weight[kMostGradients];  // its scale is this times grad_totals[group]
  const double* grad_totals;
  int32_t batch, classes;
  int64_t chunks, chunk_rows;
  Logits out;
};
void launch_combine_gradients(const Combine&, cudaStream_t);

struct SpaceReduce {
  const void* found;  // [images, rows, C, 2]
  bool wide;
  int64_t rows;
  int64_t images;  // of each of a term's softmaxes
  int32_t classes;
  void* shift;    // [images, C]
  void* inverse;  // [images, C]
  void* log;      // [images, C]
};
void launch_reduce_space(const SpaceReduce&, cudaStream_t);

// What a term over classes makes of its sums.
struct Settle {
  const double* tallies;  // [rows, kMostTallies, C]
  int64_t rows;
  int32_t term, classes;
  Options options;
  bool wide;
  double* sums;   // [kMostTallies, C] in between
  double* value;  // [1] out
  void* numbers;  // [2, C] out, of the arithmetic's type
};
void launch_settle(const Settle&, cudaStream_t);

}  // namespace heteroakd::cuda
