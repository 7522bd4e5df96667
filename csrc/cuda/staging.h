// Low-resolution logits in shared memory, ready to be interpolated and exponentiated.
//
// A warp has a region of its own: no warp waits for another one. It holds, for the columns of its
// lanes and one more and the rows of their chunk, both models' logits of `staged_classes` classes
// at a time (all of them, once per chunk, where they fit; otherwise the loops over classes bring
// them in by blocks). What lies there is not z but
//
//     a = max((z - m) log2(e) / T, -limit),    m: the maximum over the classes at that logit.
//
// Interpolated, m bounds the logits of a pixel from above, so that exponentials cannot overflow; it
// is subtracted here, where it costs one operation per logit, and not per pixel. The limit keeps
// every exponential normal and every product of exponentials finite (cell_pass.h); a logit beyond it
// (or infinite, or NaN) raises the flag of its place, and the pixels around are done with care
// (pixels.h). Logits of 16 bits are widened here, once.
//
// Cost per logit and model: a load and a maximum, then a load, a multiply-add, a minimum, a maximum
// and a store, and the addresses. Each is used by 4 cells of up to 16 pixels.
#pragma once

#include "adjoint.h"
#include "memory.h"

namespace heteroakd::cuda {

constexpr int kRows = kChunkRows + 1;   // rows of logits around a chunk
constexpr int kPitch = kWarpSize + 1;   // lane l has the cell between columns l and l + 1
constexpr int kPlane = kRows * kPitch;  // floats of a class of a model

// a of a staged logit is no smaller, in units of the larger exponent (that of T or of 1).
constexpr float kLimit = 120.0f;

// The region of a warp, in floats: [models][kRows][kPitch] maxima, [kRows][kPitch] flags, and
// [staged_classes][models][kRows][kPitch] logits.
template <int kModels>
struct Region {
  float* maxima;
  uint32_t* flags;
  float* logits;

  HAKD_DEVICE explicit Region(float* memory)
      : maxima(memory),
        flags(reinterpret_cast<uint32_t*>(memory + kModels * kPlane)),
        logits(memory + (kModels + 1) * kPlane) {}
};

// Where the logits that a lane stages lie in a plane: its column, and the warp's last one, whose
// rows the first lanes take.
struct Places {
  int64_t own[kRows];
  int64_t last;
  int32_t last_row;  // which of them, or -1
};

HAKD_DEVICE int32_t clamp(int32_t i, int32_t size) { return i < 0 ? 0 : i >= size ? size - 1 : i; }

HAKD_DEVICE Places places_of(const Logits& model, const Column& own, const Column& last,
                             int32_t lane) {
  Places places;
  for (int k = 0; k < kRows; ++k) {
    const int32_t row = clamp(own.chunk * kChunkRows + k - 1, model.height);
    places.own[k] = row * model.row_stride + clamp(own.cell, model.width) * model.column_stride;
  }
  places.last_row = lane < kRows ? lane : -1;
  const int32_t row = clamp(last.chunk * kChunkRows + lane - 1, model.height);
  places.last = row * model.row_stride + clamp(last.cell, model.width) * model.column_stride;
  return places;
}

// Walks through the classes of the logits that a lane stages. E: float, or uint16_t for both dtypes
// of 16 bits.
template <typename E>
struct ClassCursor {
  const E* own[kRows];
  const E* last;
  int64_t class_stride;
  bool is_half;

  HAKD_DEVICE ClassCursor(const Logits& model, int64_t image, const Places& places, int32_t c)
      : class_stride(model.class_stride), is_half(model.dtype == Dtype::kHalf) {
    const E* first =
        static_cast<const E*>(model.data) + (image * model.batch_stride + c * model.class_stride);
#pragma unroll
    for (int k = 0; k < kRows; ++k) own[k] = first + places.own[k];
    last = first + places.last;
  }
  HAKD_DEVICE void advance() {
#pragma unroll
    for (int k = 0; k < kRows; ++k) own[k] += class_stride;
    last += class_stride;
  }
  HAKD_DEVICE float value(const float* p) const { return *p; }
  HAKD_DEVICE float value(const uint16_t* p) const {
    return is_half ? half_from_bits(*p) : bfloat16_from_bits(*p);
  }
};

// Maxima over all classes.
template <typename E>
HAKD_DEVICE void stage_maxima(const Logits& model, int32_t classes, int64_t image,
                              const Places& places, float* maxima, int32_t lane) {
  float own[kRows];
  float last = -INFINITY;
#pragma unroll
  for (int k = 0; k < kRows; ++k) own[k] = -INFINITY;
  ClassCursor<E> at(model, image, places, 0);
#pragma unroll 4
  for (int32_t c = 0; c < classes; ++c) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) own[k] = max_number(own[k], at.value(at.own[k]));
    if (places.last_row >= 0) last = max_number(last, at.value(at.last));
    at.advance();
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) maxima[k * kPitch + lane] = own[k];
  if (places.last_row >= 0) maxima[places.last_row * kPitch + kWarpSize] = last;
}

// Rows [first_row, first_row + row_count) of the classes [begin, end) of one model; flags are added.
template <typename E>
HAKD_DEVICE void stage_logits(const Logits& model, int64_t image, const Places& places,
                              const float* maxima, float scale, float limit, int32_t begin,
                              int32_t end, int32_t first_row, int32_t row_count, float* out,
                              int32_t class_pitch, uint32_t* flags, int32_t lane) {
  const int32_t last_row =
      places.last_row >= first_row && places.last_row < first_row + row_count ? places.last_row : -1;
  // (z - m) scale in one operation. That m scale is rounded shifts all classes of this logit alike,
  // and a softmax does not see it.
  float shift[kRows], lowest[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    shift[k] = maxima[k * kPitch + lane] * scale;
    lowest[k] = 0.0f;
  }
  const float last_shift = last_row >= 0 ? maxima[last_row * kPitch + kWarpSize] * scale : 0.0f;
  float last_lowest = 0.0f;
  ClassCursor<E> at(model, image, places, begin);
#pragma unroll 2
  for (int32_t c = begin; c < end; ++c) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (k < first_row || k >= first_row + row_count) continue;
      const float a = fma(at.value(at.own[k]), scale, -shift[k]);
      lowest[k] = min_or_nan(lowest[k], a);
      out[k * kPitch + lane] = max_number(a, -limit);
    }
    if (last_row >= 0) {
      const float a = fma(at.value(at.last), scale, -last_shift);
      last_lowest = min_or_nan(last_lowest, a);
      out[last_row * kPitch + kWarpSize] = max_number(a, -limit);
    }
    at.advance();
    out += class_pitch;
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (!(lowest[k] >= -limit)) flags[k * kPitch + lane] = 1;
  }
  if (!(last_lowest >= -limit)) flags[last_row * kPitch + kWarpSize] = 1;
}

// What a warp needs to stage its logits at any time.
template <int kModels>
struct Staging {
  Region<kModels> region;
  Column own, last;
  int32_t lane;
  float scale, limit;

  HAKD_DEVICE void begin(const Pass& p, int64_t image) const {
#pragma unroll
    for (int k = 0; k < kRows; ++k) region.flags[k * kPitch + lane] = 0;
    if (lane < kRows) region.flags[lane * kPitch + kWarpSize] = 0;
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
      const Logits& model = m == 0 ? p.student : p.teacher;
      const Places places = places_of(model, own, last, lane);
      float* maxima = region.maxima + m * kPlane;
      if (model.dtype == Dtype::kFloat) {
        stage_maxima<float>(model, p.classes, image, places, maxima, lane);
      } else {
        stage_maxima<uint16_t>(model, p.classes, image, places, maxima, lane);
      }
    }
    __syncwarp();
  }

  // Classes [begin, end) become the first ones of the region. The lanes have done with what was
  // there.
  HAKD_DEVICE void bring(const Pass& p, int64_t image, int32_t begin, int32_t end,
                         int32_t first_row, int32_t row_count) const {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
      const Logits& model = m == 0 ? p.student : p.teacher;
      const Places places = places_of(model, own, last, lane);
      const float* maxima = region.maxima + m * kPlane;
      float* out = region.logits + m * kPlane;
      if (model.dtype == Dtype::kFloat) {
        stage_logits<float>(model, image, places, maxima, scale, limit, begin, end, first_row,
                            row_count, out, kModels * kPlane, region.flags, lane);
      } else {
        stage_logits<uint16_t>(model, image, places, maxima, scale, limit, begin, end, first_row,
                               row_count, out, kModels * kPlane, region.flags, lane);
      }
    }
    __syncwarp();
  }
};

}  // namespace heteroakd::cuda
