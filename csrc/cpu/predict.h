// Evaluation on the CPU as plain data: the border between the operators (predict.cpp) and the kernel
// (predict_kernel.h, compiled once per instruction set). No code lives here (pass.h says why).
#pragma once

#include "pass.h"

namespace heteroakd::cpu {

// Columns that one unit of work has: vectors of pixels, and the columns of logits under them.
struct ColumnChunk {
  int64_t first_vector, end_vector;  // whole groups
  int64_t first_pixel, pixels;       // of a row
  int32_t first_column;              // of the logits, from -1 on
  int32_t columns;                   // that are read; a row's ends are repeated outside it
};

// Of one call: the class of the largest upsampled logit at every pixel, stored or counted.
template <typename T>
struct Prediction {
  int64_t batch, classes, label_height, label_width;
  LogitsView logits;
  Geometry<T> grid;
  bool exact_columns;  // the logits are as wide as the labels

  // Vectors as in Pass; a group is `apart` of them, and has neighbouring pixels.
  int64_t apart;
  const int32_t* pixel;
  bool prunes;                  // whether classes that cannot win in a cell are left out
  const int32_t* first_cell;    // [groups] columns of the logits, the least lower one
  const int32_t* last_cell;     // [groups] and the largest

  // Units: image, strip of label rows, chunk of columns.
  int64_t strips, chunks;
  const int64_t* first_row;     // [strips + 1]
  const ColumnChunk* chunk;     // [chunks]
  int64_t most_pixels;          // of a row of a chunk
  int64_t step;                 // elements of a packed row
  int64_t blocks;               // of `lanes` cells, in a packed row

  void* out;                    // [B, H, W], dense, or null: count
  bool bytes;                   // uint8, else int64
  LabelsView labels;
  bool shared;                  // threads count in one table
};

template <typename T>
struct Predictor {
  const char* isa;
  int64_t lanes;
  size_t (*workspace_bytes)(const Prediction<T>&);
  // table: [C][C] of label and prediction, which is added to
  void (*run)(const Prediction<T>&, int64_t unit, void* workspace, int64_t* table,
              LabelReport& report);
};

// One per translation unit; null where the compiler could not build it.
const Predictor<float>* predictor_avx512();
const Predictor<float>* predictor_avx2();
const Predictor<float>* predictor_portable();
const Predictor<double>* predictor_double();

}  // namespace heteroakd::cpu
