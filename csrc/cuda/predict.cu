// Argmax of bilinearly upsampled logits without the upsampled logits, stored or counted.
//
// A thread has a patch of R x S pixels within a cell (the pixels between four neighbouring logits,
// cells.h), and the cell's four corners of one class after the other in registers. No class can win in
// a cell whose largest corner is below what the largest logit exceeds everywhere
// (cpu/predict_kernel.h): a first loop finds that bound, the second interpolates the classes that
// reach it, the candidates.
//
// Cost: in both loops 4 loads per class and patch, in the first 16 operations and in the second 4; per
// pixel and candidate about 5 operations (a quarter of an interpolation in the column, one in the row,
// a comparison, two selections). With R S = 16: 0.5 loads and 1.3 + 5 operations per pixel and class
// where all classes are candidates (random logits), 1.3 where one to three of many are (confident
// ones). Of the loads a half or less goes past the first cache. Bytes: each logit once from memory for each row of
// cells that it borders, unless a cache keeps it; each prediction (1 or 8 bytes) once.
//
// Where cells are small (logits no coarser than half the labels) a patch is one pixel, and there is one
// loop: two more loads per class would cost more than they save.
//
// Counts: integers, so that additions in any order give one table. A thread adds up neighbouring
// pixels of the same label and prediction, and a block counts in shared memory where the table fits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>
#include <vector>

#include "adjoint.h"
#include "memory.h"
#include "runtime.h"
#include "tensors.h"
#include "warp_sums.h"

namespace heteroakd::cuda {
namespace {

struct Prediction {
  int32_t batch, classes, label_height, label_width;
  Logits logits;
  Labels target;
  int64_t ignore_index;
  bool align_corners;
  bool bytes;             // of the predictions: uint8, else int64
  void* out;              // [B, H, W], dense; null: count
  unsigned long long* table;   // int64 [C, C] of label and prediction, added to
  unsigned long long* report;  // int64 [4], added to: see heteroakd_fast/labels.py
  // how an image is cut: patches of pixels, each within one cell
  int32_t rows_per_cell, columns_per_cell;  // patches, at most
  int64_t patches;        // of an image
  int64_t per_row;
};

constexpr int kPredictThreads = 128;
// A table of uint32 in shared memory: up to 96 classes.
constexpr int64_t kTableBytes = 36 * 1024 + 1024;
// Blocks that have a table of their own walk over several patches per thread.
constexpr int64_t kMostCountingBlocks = 2048;

template <typename F>
constexpr F kLargestLogit = sizeof(F) == 4 ? F(0x1p126) : F(0x1p1022);
template <typename F>
constexpr F kBelowAll = -std::numeric_limits<F>::infinity();
template <typename F>
constexpr F kInPlaceOfNan = sizeof(F) == 4 ? F(0x1p127) : F(0x1p1023);

// Infinities as numbers, so that no product is NaN; a NaN as twice the largest number.
template <typename F>
HAKD_DEVICE F packed(F z) {
  constexpr F most = kLargestLogit<F>;
  if (z != z) return kInPlaceOfNan<F>;
  return z < -most ? -most : z > most ? most : z;
}

template <typename F>
struct Four {
  F z00, z01, z10, z11;
};

// Offsets of the corners in a plane.
struct Places {
  int64_t o00, o01, o10, o11;
};

template <typename F>
HAKD_DEVICE Four<F> corners_of(const Prediction& p, int64_t plane, const Places& at) {
  return {packed(load_logit<F>(p.logits.data, p.logits.dtype, plane + at.o00)),
          packed(load_logit<F>(p.logits.data, p.logits.dtype, plane + at.o01)),
          packed(load_logit<F>(p.logits.data, p.logits.dtype, plane + at.o10)),
          packed(load_logit<F>(p.logits.data, p.logits.dtype, plane + at.o11))};
}

template <typename F>
HAKD_DEVICE F largest(const Four<F>& z) {
  const F top = z.z00 > z.z01 ? z.z00 : z.z01;
  const F bottom = z.z10 > z.z11 ? z.z10 : z.z11;
  return top > bottom ? top : bottom;
}

template <typename F>
HAKD_DEVICE F smallest(const Four<F>& z) {
  const F top = z.z00 < z.z01 ? z.z00 : z.z01;
  const F bottom = z.z10 < z.z11 ? z.z10 : z.z11;
  return top < bottom ? top : bottom;
}

// The pixels of a patch, and the cell's corners.
template <typename F, int R, int S>
struct Patch {
  int32_t y, x;         // of the first pixel
  int32_t high, wide;   // pixels that exist
  F fraction_y[R], fraction_x[S];
  Places places;

  HAKD_DEVICE void at_cell(const Prediction& p, int64_t base, int64_t number) {
    const int64_t row = divide(number, p.per_row);
    const auto column = static_cast<int32_t>(number - row * p.per_row);
    const auto i = static_cast<int32_t>(divide(row, p.rows_per_cell)) - 1;
    const int32_t j = column / p.columns_per_cell - 1;
    const Axis rows = axis_of(p.logits.height, p.label_height, p.align_corners);
    const Axis columns = axis_of(p.logits.width, p.label_width, p.align_corners);
    y = cell_start(rows, i) +
        static_cast<int32_t>(row - static_cast<int64_t>(i + 1) * p.rows_per_cell) * R;
    x = cell_start(columns, j) + (column - (j + 1) * p.columns_per_cell) * S;
    high = at_most(cell_start(rows, i + 1) - y, R);
    wide = at_most(cell_start(columns, j + 1) - x, S);
    if (high <= 0 || wide <= 0) return;
#pragma unroll
    for (int r = 0; r < R; ++r) fraction_y[r] = fraction_in_cell<F>(rows, y + r, i);
#pragma unroll
    for (int s = 0; s < S; ++s) fraction_x[s] = fraction_in_cell<F>(columns, x + s, j);
    set_places(p, base, clamp(i, p.logits.height), clamp(i + 1, p.logits.height),
               clamp(j, p.logits.width), clamp(j + 1, p.logits.width));
  }

  // One pixel, wherever its taps are.
  HAKD_DEVICE void at_pixel(const Prediction& p, int64_t base, int64_t number) {
    const int64_t row = divide(number, p.per_row);
    y = static_cast<int32_t>(row);
    x = static_cast<int32_t>(number - row * p.per_row);
    high = wide = 1;
    const Taps<F> rows = taps_of_position<F>(
        axis_of(p.logits.height, p.label_height, p.align_corners), y);
    const Taps<F> columns = taps_of_position<F>(
        axis_of(p.logits.width, p.label_width, p.align_corners), x);
    fraction_y[0] = rows.fraction;
    fraction_x[0] = columns.fraction;
    set_places(p, base, rows.lower, rows.upper, columns.lower, columns.upper);
  }

 private:
  HAKD_DEVICE static int32_t at_most(int32_t n, int32_t most) { return n < most ? n : most; }

  HAKD_DEVICE void set_places(const Prediction& p, int64_t base, int64_t top, int64_t bottom,
                              int64_t left, int64_t right) {
    const int64_t t = base + top * p.logits.row_stride;
    const int64_t b = base + bottom * p.logits.row_stride;
    const int64_t l = left * p.logits.column_stride;
    const int64_t r = right * p.logits.column_stride;
    places = {t + l, t + r, b + l, b + r};
  }
};

// What the largest logit exceeds everywhere in a cell: the smallest corner of one class, or, less its
// rounding, of the mean of the classes that win at the corners.
template <typename F>
HAKD_DEVICE F bound_of(const Prediction& p, const Places& places) {
  F bound = kBelowAll<F>;
  F best[4] = {bound, bound, bound, bound};
  int32_t winner[4] = {};
  int64_t plane = 0;
  for (int32_t c = 0; c < p.classes; ++c, plane += p.logits.class_stride) {
    const Four<F> z = corners_of<F>(p, plane, places);
    const F least = smallest(z);
    bound = least > bound ? least : bound;
    const F corners[4] = {z.z00, z.z01, z.z10, z.z11};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool better = corners[k] > best[k];
      winner[k] = better ? c : winner[k];
      best[k] = better ? corners[k] : best[k];
    }
  }
  if (largest(Four<F>{best[0], best[1], best[2], best[3]}) == kInPlaceOfNan<F>) return bound;
  F count = F(0), size = F(0);
  F mean[4] = {F(0), F(0), F(0), F(0)};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    bool known = false;
#pragma unroll
    for (int j = 0; j < k; ++j) known |= winner[j] == winner[k];
    if (known) continue;
    const Four<F> z = corners_of<F>(p, winner[k] * p.logits.class_stride, places);
    const F corners[4] = {z.z00, z.z01, z.z10, z.z11};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mean[i] += F(0.25) * corners[i];  // of four the sum is finite
      size = abs(corners[i]) > size ? abs(corners[i]) : size;
    }
    count += F(1);
  }
  if (count == F(1)) return bound;
  constexpr F slack = sizeof(F) == 4 ? F(0x1p-20) : F(0x1p-49);
  const F least = F(4) / count * smallest(Four<F>{mean[0], mean[1], mean[2], mean[3]}) - size * slack;
  return least > bound ? least : bound;
}

template <typename F, int R, int S>
HAKD_DEVICE void find(const Prediction& p, const Patch<F, R, S>& patch, int32_t (&index)[R][S]) {
  F best[R][S];
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      best[r][s] = kBelowAll<F>;
      index[r][s] = 0;
    }
  }
  const F bound = R * S > 1 ? bound_of<F>(p, patch.places) : kBelowAll<F>;
  int64_t plane = 0;
  for (int32_t c = 0; c < p.classes; ++c, plane += p.logits.class_stride) {
    Four<F> z = corners_of<F>(p, plane, patch.places);
    const F most = largest(z);
    if (most < bound) continue;
    // a NaN at one corner is one in the whole cell
    if (most == kInPlaceOfNan<F>) z = {most, most, most, most};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const F left = fma(patch.fraction_y[r], z.z10 - z.z00, z.z00);
      const F right = fma(patch.fraction_y[r], z.z11 - z.z01, z.z01);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const F here = fma(patch.fraction_x[s], right - left, left);
        const bool better = here > best[r][s];
        index[r][s] = better ? c : index[r][s];
        best[r][s] = better ? here : best[r][s];
      }
    }
  }
}

template <typename F, int R, int S>
HAKD_DEVICE void store(const Prediction& p, int32_t image, const Patch<F, R, S>& patch,
                       const int32_t (&index)[R][S]) {
  int64_t at = (static_cast<int64_t>(image) * p.label_height + patch.y) * p.label_width + patch.x;
#pragma unroll
  for (int r = 0; r < R; ++r, at += p.label_width) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (r >= patch.high || s >= patch.wide) continue;
      if (p.bytes) {
        static_cast<uint8_t*>(p.out)[at + s] = static_cast<uint8_t>(index[r][s]);
      } else {
        static_cast<int64_t*>(p.out)[at + s] = index[r][s];
      }
    }
  }
}

// One addition for a run of pixels with the same label and prediction.
class Counter {
 public:
  HAKD_DEVICE Counter(unsigned long long* table, unsigned int* shared)
      : table_(table), shared_(shared) {}

  HAKD_DEVICE void add(int64_t entry) {
    if (entry == entry_) {
      ++run_;
      return;
    }
    flush();
    entry_ = entry;
    run_ = 1;
  }

  HAKD_DEVICE void flush() {
    if (run_ > 0 && shared_ != nullptr) {
      atomicAdd(shared_ + entry_, run_);
    } else if (run_ > 0) {
      atomicAdd(table_ + entry_, static_cast<unsigned long long>(run_));
    }
    run_ = 0;
  }

 private:
  unsigned long long* table_;
  unsigned int* shared_;
  int64_t entry_ = -1;
  unsigned int run_ = 0;
};

HAKD_DEVICE int64_t label_at(const Labels& target, int64_t place) {
  switch (target.dtype) {
    case LabelDtype::kUint8: return static_cast<const uint8_t*>(target.data)[place];
    case LabelDtype::kInt32: return static_cast<const int32_t*>(target.data)[place];
    default: return static_cast<const int64_t*>(target.data)[place];
  }
}

template <typename F, int R, int S>
HAKD_DEVICE void count(const Prediction& p, int32_t image, const Patch<F, R, S>& patch,
                       const int32_t (&index)[R][S], Counter& counter, int32_t& valid,
                       int32_t& bad) {
  int64_t at = image * p.target.batch_stride + patch.y * p.target.row_stride +
               patch.x * p.target.column_stride;
#pragma unroll
  for (int r = 0; r < R; ++r, at += p.target.row_stride) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (r >= patch.high || s >= patch.wide) continue;
      const int64_t label = label_at(p.target, at + s * p.target.column_stride);
      const LabelKind kind = label_kind(label, p.classes, p.ignore_index, p.ignore_index);
      if (kind == LabelKind::kClass) {
        counter.add(label * p.classes + index[r][s]);
        valid += 1;
      }
      if (kind == LabelKind::kOutOfRange) bad += 1;
    }
  }
}

template <typename F, int R, int S, bool kCounts>
__global__ void __launch_bounds__(kPredictThreads)
    predict_kernel(const __grid_constant__ Prediction p, bool has_table) {
  HAKD_SHARED_MEMORY(unsigned int, memory);
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int64_t entries = static_cast<int64_t>(p.classes) * p.classes;
  unsigned int* const shared = kCounts && has_table ? memory : nullptr;
  if (shared != nullptr) {
    for (int64_t k = thread; k < entries; k += kPredictThreads) shared[k] = 0;
    __syncthreads();
  }
  Counter counter(p.table, shared);
  int32_t valid = 0, bad = 0;
  const int64_t all = p.patches * p.batch;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPredictThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kPredictThreads + thread; at < all;
       at += step) {
    const auto image = static_cast<int32_t>(divide(at, p.patches));
    const int64_t base = image * p.logits.batch_stride;
    Patch<F, R, S> patch;
    if (R * S > 1) {
      patch.at_cell(p, base, at - image * p.patches);
    } else {
      patch.at_pixel(p, base, at - image * p.patches);
    }
    if (patch.high <= 0 || patch.wide <= 0) continue;
    int32_t index[R][S];
    find(p, patch, index);
    if (kCounts) {
      count(p, image, patch, index, counter, valid, bad);
    } else {
      store(p, image, patch, index);
    }
  }
  if (!kCounts) return;
  counter.flush();
  const int32_t valid_of_warp = over_warp(valid);
  const int32_t bad_of_warp = over_warp(bad);
  if (thread % kWarpSize == 0) {
    atomicAdd(p.report, static_cast<unsigned long long>(valid_of_warp));
    atomicAdd(p.report + 2, static_cast<unsigned long long>(bad_of_warp));
  }
  if (shared == nullptr) return;
  __syncthreads();
  for (int64_t k = thread; k < entries; k += kPredictThreads) {
    const unsigned int n = shared[k];
    if (n != 0) atomicAdd(p.table + k, static_cast<unsigned long long>(n));
  }
}

template <typename F, int R, int S>
void start(Prediction p, cudaStream_t stream) {
  if (R * S > 1) {
    p.rows_per_cell = static_cast<int32_t>(ceil_div(p.rows_per_cell, R));
    p.columns_per_cell = static_cast<int32_t>(ceil_div(p.columns_per_cell, S));
    p.per_row = (static_cast<int64_t>(p.logits.width) + 1) * p.columns_per_cell;
    p.patches = (static_cast<int64_t>(p.logits.height) + 1) * p.rows_per_cell * p.per_row;
  } else {
    p.per_row = p.label_width;
    p.patches = static_cast<int64_t>(p.label_height) * p.label_width;
  }
  const bool counts = p.out == nullptr;
  const int64_t table = static_cast<int64_t>(p.classes) * p.classes * 4;
  // a shared counter has 32 bits: of a block's pixels it cannot overflow
  const int64_t blocks = ceil_div(p.patches * p.batch, kPredictThreads);
  const bool has_table = counts && table <= kTableBytes && blocks > 1 &&
                         p.patches * p.batch * R * S < (int64_t{1} << 40);
  const int64_t most = has_table ? kMostCountingBlocks : int64_t{1} << 30;
  const dim3 grid(static_cast<unsigned>(blocks < most ? blocks : most));
  const auto kernel =
      counts ? predict_kernel<F, R, S, true> : predict_kernel<F, R, S, false>;
  launch(kernel, grid, dim3(kPredictThreads), has_table ? static_cast<size_t>(table) : 0, stream,
         counts ? "confusion_matrix" : "predict", p, has_table);
}

// p.rows_per_cell, p.columns_per_cell: pixels of a cell, at most.
void launch_predict(const Prediction& p, bool wide, cudaStream_t stream) {
  const int32_t high = p.rows_per_cell, broad = p.columns_per_cell;
  const bool large = high >= 2 && broad >= 2;
  if (wide) return large ? start<double, 2, 2>(p, stream) : start<double, 1, 1>(p, stream);
  if (high >= 3 && broad >= 3) return start<float, 4, 4>(p, stream);
  if (large) return start<float, 2, 2>(p, stream);
  start<float, 1, 1>(p, stream);
}

// --- operators -----------------------------------------------------------------------------------

Prediction prediction_of(const Tensor& logits, int64_t height, int64_t width, bool align_corners) {
  STD_TORCH_CHECK(logits.dim() == 4 && logits.numel() > 0 && height > 0 && width > 0,
                  "predict: expected logits [B, C, h, w] and a size, neither of them empty");
  Prediction p{};
  p.batch = narrow(logits.size(0), "batch");
  p.classes = narrow(logits.size(1), "classes");
  p.label_height = narrow(height, "height of the prediction");
  p.label_width = narrow(width, "width of the prediction");
  p.logits = logits_of(logits, "logits");
  p.align_corners = align_corners;
  p.rows_per_cell = narrow(most_pixels(logits.size(2), height, align_corners), "cell");
  p.columns_per_cell = narrow(most_pixels(logits.size(3), width, align_corners), "cell");
  return p;
}

Tensor predict(const Tensor& logits, int64_t height, int64_t width, bool align_corners,
               bool bytes) {
  Prediction p = prediction_of(logits, height, width, align_corners);
  STD_TORCH_CHECK(!bytes || p.classes <= 256, "predict: uint8 holds no more than 256 classes");
  const OnDevice device(logits.get_device_index());
  Tensor out = torch::stable::new_empty(logits, {logits.size(0), height, width},
                                        bytes ? ScalarType::Byte : ScalarType::Long);
  p.bytes = bytes;
  p.out = out.mutable_data_ptr();
  launch_predict(p, logits.scalar_type() == ScalarType::Double,
                 current_stream(logits.get_device_index()));
  return out;
}

std::tuple<Tensor, Tensor> confusion_matrix(const Tensor& logits, const Tensor& target,
                                            int64_t ignore_index, bool align_corners) {
  STD_TORCH_CHECK(target.dim() == 3 && logits.dim() == 4 && target.size(0) == logits.size(0),
                  "confusion_matrix: expected logits [B, C, h, w] and target [B, H, W]");
  check_device(logits, target, "target");
  Prediction p = prediction_of(logits, target.size(1), target.size(2), align_corners);
  const OnDevice device(logits.get_device_index());
  const auto zeros = [&](std::vector<int64_t> sizes) {
    Tensor tensor = torch::stable::new_empty(logits, sizes, ScalarType::Long);
    return torch::stable::zero_(tensor);
  };
  Tensor out = zeros({logits.size(1), logits.size(1)});
  Tensor report = zeros({4});
  p.target = labels_of(target);
  p.ignore_index = ignore_index;
  p.table = static_cast<unsigned long long*>(out.mutable_data_ptr());
  p.report = static_cast<unsigned long long*>(report.mutable_data_ptr());
  launch_predict(p, logits.scalar_type() == ScalarType::Double,
                 current_stream(logits.get_device_index()));
  return {out, report};
}

}  // namespace

HAKD_REGISTER(m) {
  m.impl("predict", TORCH_BOX(&predict));
  m.impl("confusion_matrix", TORCH_BOX(&confusion_matrix));
}

}  // namespace heteroakd::cuda
