// What one pass is, as plain data: the border between the operators (runner.h, compiled
// for every processor) and the kernels (compiled once per instruction set).
//
// No inline function with a body lives here: what two translation units of different instruction
// sets share must not be code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../math/labels.h"
#include "../spec.h"

namespace heteroakd::cpu {

enum class Dtype : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

// Logits [B, C, h, w] in memory, any strides (in elements).
struct LogitsView {
  const char* data;
  Dtype dtype;
  int64_t stride[4];
};

// Vectors of pixels. A row of labels is cut into vectors of `lanes` pixels; lane l of vector i is
// the pixel at column `pixel[i * lanes + l]`, or none (-1). Where the columns of the logits are an
// integer times sparser than the labels', the lanes of a vector lie that many pixels apart: they
// then fall between consecutive columns of the logits.
enum class ColumnMode : int32_t {
  kConsecutive,  // lane l lies between columns base + l and base + l + 1
  kPermuted,     // all lanes lie within columns [base, base + 2 lanes)
  kScattered,
};

// Where the label grid falls in the logits of one model. A fraction f at lower column j means
// (1 - f) row[j] + f row[j + 1]; a row is padded, so that j = -1 and j + 1 = width exist and repeat
// the row's ends.
template <typename T>
struct Geometry {
  int64_t height, width;
  int64_t padded;               // elements of a padded row
  const int32_t* row_lower;     // [H]
  const T* row_fraction;        // [H]
  const int32_t* column_lower;  // [vectors][lanes]
  const T* column_fraction;     // [vectors][lanes]
  const int32_t* column_base;   // [vectors]
  const ColumnMode* column_mode;  // [vectors]
  int64_t max_rows;             // of logits, that one band can touch
};

// Over a set of pixels; places are flat indices into [B, H, W], or -1.
struct LabelReport {
  int64_t labelled = 0, distilled = 0;  // distilled: the labelled and the unlabelled ones
  int64_t bad_labels = 0, bad_weights = 0;
  int64_t first_bad_label = -1, first_bad_weight = -1;
  double labelled_weight = 0.0, distilled_weight = 0.0;  // of pixel_weight, where there is one
};

enum class LabelDtype : int32_t { kUint8, kInt32, kInt64 };

// Labels [B, H, W] in memory, any strides (in elements).
struct LabelsView {
  const char* data;
  LabelDtype dtype;
  int64_t stride[3];
  int64_t num_classes, ignore_index, unlabelled_index;
  const void* reader;
};

// Reads one row of labels as the kernels have them (../math/labels.h), out of range as ignored; any
// strides.
using ReadLabels = void (*)(const void* reader, int64_t b, int64_t y, int32_t* out,
                            LabelReport& report);

template <typename T>
struct Pass {
  int64_t batch, classes, label_height, label_width;
  int64_t lanes, vectors, apart;  // apart: of the pixels in neighbouring lanes
  const int32_t* pixel;  // [vectors][lanes]

  LogitsView student_logits, teacher_logits;
  Geometry<T> student, teacher;
  bool has_teacher;
  bool identity;  // every model's grid is the label grid

  LabelsView labels;
  ReadLabels read_labels;
  const T* class_weight;  // [C] or null
  const T* pixel_weight;  // [B][H][W] or null
  bool unlabelled;        // whether there may be pixels without a label

  // what to compute; terms by their index in ../terms/list.h
  bool has[kTerms];       // also of one that is there for the maps alone
  bool asked[kTerms];
  bool has_shares[kTerms];  // whether the term's denominator is a sum over pixels of its own
  int32_t variant[kTerms];
  TermNumbers<T> term_numbers;
  PassNumbers<T> numbers;
  Needs needs;
  bool maps, diagnostics, values, gradients;
  double huge;     // logits beyond this take the overflow-safe way

  // Bands of student rows: the units of work. Unless identity: bands * band_rows rows.
  int64_t bands_per_image, band_rows;
  const int64_t* first_label_row;  // [bands_per_image + 1]

  // results
  int32_t gradient_of[kTerms];  // which gradient a term adds to, -1: none
  bool begins[kTerms];    // whether a term is the first one that adds to its gradient, and
  bool ends[kTerms];      // the last one
  int32_t gradient_count;
  T scale[kTerms];        // of a term's gradient
  T* gradient;            // not identity: [gradient_count][B][C][h][w]
  T* edges;               // not identity: [gradient_count][B * bands][C][w], for the next band's first row
  bool streams;           // identity: the gradient is too large to stay in a cache
  LogitsView out;         // identity: the gradient itself, written through const_cast
  double* sums;           // [B * bands][kTerms][2]: numerator, denominator
  T* map_values;          // [planes][B][H][W]: two maps, three diagnostics

  // Terms over space: maximum and sum of exp over the valid pixels of an image and class, by band
  // while they are collected (of the term `collected`, or -1), then of the whole image.
  int32_t collected;
  T* space_maximum;  // [kMostFirsts][B * bands][C]
  T* space_sum;
  const T* space_shift[kTerms];    // [kMostFirsts][B][C]: the maximum
  const T* space_inverse[kTerms];  // 1 / sum
  const T* space_log[kTerms];      // maximum + log(sum)
  // Terms over classes: their sums while they are collected, then space_shift and space_inverse [C] are
  // the numbers that `settle` found.
  double* tallies;  // [kMostTallies][B * bands][C]
};

// dst = sum over gradients of scale[k] * gradient[k], row by row of the logits; see combine().
struct Combine {
  const void* gradient;  // [count][B][C][h][w], float or double
  int32_t count;
  const double* scale;
  int64_t batch, classes, height, width;
  LogitsView out;
};

template <typename T>
struct Kernels {
  const char* isa;
  int64_t lanes;
  size_t (*workspace_bytes)(const Pass<T>&);
  void (*run_band)(const Pass<T>&, int64_t band, void* workspace, LabelReport& report);
  void (*combine)(const Combine&, int64_t plane);  // plane: b * C + c
  // Checks and adds up the weights of a row of labels, whose first pixel is `place`; a pixel of weight 0
  // becomes one that is ignored.
  void (*weigh_row)(const T* weights, int64_t place, int64_t count, int64_t num_classes,
                    int32_t* labels, LabelReport& report);
  // which: 0 exp2, 1 log, 2 log2, 3 log1p, 4 log1p_unit; count a multiple of the lanes
  void (*elementary)(int64_t which, const T* x, T* out, int64_t count);
};

// One per translation unit; null where the compiler could not build it.
const Kernels<float>* kernels_avx512();
const Kernels<float>* kernels_avx2();
const Kernels<float>* kernels_portable();
const Kernels<double>* kernels_double();

}  // namespace heteroakd::cpu
