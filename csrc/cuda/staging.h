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
// Cost per logit and model: a load, a maximum and a minimum, then a load, a difference, a product, a
// maximum and a store, and two additions for each address. Each is used by 4 cells of up to 16 pixels.
#pragma once

#include "adjoint.h"
#include "memory.h"

namespace heteroakd::cuda {

constexpr int kRows = kMostChunkRows + 1;  // rows of logits around a chunk, at most
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

// Where the logit of a column stands, in row k around its chunk.
HAKD_DEVICE int64_t place_of(const Logits& model, int32_t chunk_rows, const Column& column,
                             int32_t k) {
  return clamp(column.chunk * chunk_rows + k - 1, model.height) * model.row_stride +
         clamp(column.cell, model.width) * model.column_stride;
}

// One model's logits of one image, and what a lane has to do with them. E: float, or uint16_t for both
// dtypes of 16 bits.
template <typename E>
struct Plane {
  const E* first;  // of the image
  int64_t class_stride;
  bool is_half;
  int32_t lane, chunk_rows;

  HAKD_DEVICE Plane(const Pass& p, const Logits& model, int64_t image, int32_t lane_index)
      : first(static_cast<const E*>(model.data) + image * model.batch_stride),
        class_stride(model.class_stride),
        is_half(model.dtype == Dtype::kHalf),
        lane(lane_index),
        chunk_rows(p.chunk_rows) {}
};

// Whether all classes of a logit are within the limit of their maximum; false where one is NaN.
HAKD_DEVICE bool within(float smallest, float largest, float scale, float limit) {
  return (largest - smallest) * scale <= limit;
}

// Maxima over all classes, and flags, of the rows of the lanes' columns.
template <typename E>
HAKD_DEVICE void stage_maxima(const Plane<E>& plane, const Logits& model, int32_t classes,
                              const Column& own, float scale, float limit, float* maxima,
                              uint32_t* flags) {
  float largest[kRows], smallest[kRows];
  const E* at[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    largest[k] = -INFINITY;
    smallest[k] = INFINITY;
    at[k] = plane.first + place_of(model, plane.chunk_rows, own, k);
  }
#pragma unroll 4
  for (int32_t c = 0; c < classes; ++c) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const float z = widen(*at[k], plane.is_half);
      largest[k] = max_number(largest[k], z);
      smallest[k] = min_or_nan(smallest[k], z);
      at[k] += plane.class_stride;
    }
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    maxima[k * kPitch + plane.lane] = largest[k];
    if (!within(smallest[k], largest[k], scale, limit)) flags[k * kPitch + plane.lane] = 1;
  }
}

// The same of the column behind the lanes', with the classes dealt out to the lanes.
template <typename E>
HAKD_DEVICE void stage_last_maxima(const Plane<E>& plane, const Logits& model, int32_t classes,
                                   const Column& last, float scale, float limit, float* maxima,
                                   uint32_t* flags) {
#pragma unroll 1
  for (int k = 0; k < kRows; ++k) {
    const E* at = plane.first + place_of(model, plane.chunk_rows, last, k);
    float largest = -INFINITY;
    float smallest = INFINITY;
#pragma unroll 1
    for (int32_t c = plane.lane; c < classes; c += kWarpSize) {
      const float z = widen(at[c * plane.class_stride], plane.is_half);
      largest = max_number(largest, z);
      smallest = min_or_nan(smallest, z);
    }
#pragma unroll
    for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
      largest = max_number(largest, __shfl_xor_sync(kAllLanes, largest, offset));
      smallest = min_or_nan(smallest, __shfl_xor_sync(kAllLanes, smallest, offset));
    }
    if (plane.lane != 0) continue;
    maxima[k * kPitch + kWarpSize] = largest;
    if (!within(smallest, largest, scale, limit)) flags[k * kPitch + kWarpSize] = 1;
  }
}

// Rows [first_row, first_row + kCount) of the classes [begin, end). The difference comes first: it is
// exact for neighbouring numbers, however large.
template <int kCount, typename E>
HAKD_DEVICE void stage_logits(const Plane<E>& plane, const Logits& model, const Column& own,
                              const Column& last, const float* maxima, float scale, float limit,
                              int32_t begin, int32_t end, int32_t first_row, float* out,
                              int32_t class_pitch) {
  const E* first = plane.first + begin * plane.class_stride;
  const E* at[kCount];
  float largest[kCount];
  float* to = out + first_row * kPitch + plane.lane;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    at[k] = first + place_of(model, plane.chunk_rows, own, first_row + k);
    largest[k] = maxima[(first_row + k) * kPitch + plane.lane];
  }
#pragma unroll 4
  for (int32_t c = begin; c < end; ++c) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float a = (widen(*at[k], plane.is_half) - largest[k]) * scale;
      to[k * kPitch] = max_number(a, -limit);
      at[k] += plane.class_stride;
    }
    to += class_pitch;
  }
#pragma unroll 1
  for (int32_t row = first_row; row < first_row + kCount; ++row) {
    const E* of_last = first + place_of(model, plane.chunk_rows, last, row);
    const float of_row = maxima[row * kPitch + kWarpSize];
#pragma unroll 1
    for (int32_t c = plane.lane; c < end - begin; c += kWarpSize) {
      const float a = (widen(of_last[c * plane.class_stride], plane.is_half) - of_row) * scale;
      out[c * class_pitch + row * kPitch + kWarpSize] = max_number(a, -limit);
    }
  }
}

// Calls f(plane) with the element type of a model's logits.
template <typename Function>
HAKD_DEVICE void with_plane(const Pass& p, const Logits& model, int64_t image, int32_t lane,
                            const Function& f) {
  if (model.dtype == Dtype::kFloat) {
    f(Plane<float>(p, model, image, lane));
  } else {
    f(Plane<uint16_t>(p, model, image, lane));
  }
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
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
      const Logits& model = m == 0 ? p.student : p.teacher;
      float* maxima = region.maxima + m * kPlane;
      with_plane(p, model, image, lane, [&](const auto& plane) {
        stage_maxima(plane, model, p.classes, own, scale, limit, maxima, region.flags);
        stage_last_maxima(plane, model, p.classes, last, scale, limit, maxima, region.flags);
      });
    }
    __syncwarp();
  }

  // Classes [begin, end) become the first ones of the region. The lanes have done with what was
  // there.
  template <int kCount>
  HAKD_DEVICE void bring(const Pass& p, int64_t image, int32_t begin, int32_t end,
                         int32_t first_row) const {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kModels; ++m) {
      const Logits& model = m == 0 ? p.student : p.teacher;
      with_plane(p, model, image, lane, [&](const auto& plane) {
        stage_logits<kCount>(plane, model, own, last, region.maxima + m * kPlane, scale, limit,
                             begin, end, first_row, region.logits + m * kPlane, kModels * kPlane);
      });
    }
    __syncwarp();
  }
};

}  // namespace heteroakd::cuda
