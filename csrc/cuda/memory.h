// Loads and stores of any dtype. Offsets are 64 bits wide; the dtype is a value, not a template
// argument: the branch is uniform, and an instance per pair of dtypes would be sixteen of each.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cells.h"
#include "elementary.h"

namespace heteroakd::cuda {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

HAKD_DEVICE float bfloat16_from_bits(uint32_t bits) { return from_bits(bits << 16); }
HAKD_DEVICE float half_from_bits(uint16_t bits) {
  return static_cast<float>(Half(bits, Half::from_bits()));
}

// An element as it is stored; uint16_t stands for both dtypes of 16 bits.
HAKD_DEVICE float widen(float z, bool) { return z; }
HAKD_DEVICE double widen(double z, bool) { return z; }
HAKD_DEVICE float widen(uint16_t bits, bool is_half) {
  return is_half ? half_from_bits(bits) : bfloat16_from_bits(bits);
}

// One logit of at most 32 bits.
HAKD_DEVICE float load_narrow(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kFloat) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == Dtype::kBFloat16 ? bfloat16_from_bits(bits) : half_from_bits(bits);
}

// One logit, in the type of the arithmetic: the student's, whatever the teacher's.
template <typename T>
HAKD_DEVICE T load_logit(const void* data, Dtype dtype, int64_t index) {
  if (dtype == Dtype::kDouble) return static_cast<T>(static_cast<const double*>(data)[index]);
  if (dtype == Dtype::kFloat) return static_cast<T>(static_cast<const float*>(data)[index]);
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return static_cast<T>(dtype == Dtype::kBFloat16 ? bfloat16_from_bits(bits)
                                                  : half_from_bits(bits));
}

template <typename T>
HAKD_DEVICE void store_logit(void* data, Dtype dtype, int64_t index, T value) {
  switch (dtype) {
    case Dtype::kDouble: static_cast<double*>(data)[index] = static_cast<double>(value); break;
    case Dtype::kFloat: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case Dtype::kHalf: static_cast<Half*>(data)[index] = Half(static_cast<float>(value)); break;
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(data)[index] = BFloat16(static_cast<float>(value));
      break;
  }
}

// pixel_weight at a place of [B, H, W].
template <typename F>
HAKD_DEVICE F weight_at(const Pass& p, int64_t place) {
  return static_cast<const F*>(p.pixel_weight)[place];
}
HAKD_DEVICE int64_t place_of(const Pass& p, int32_t image, int32_t y, int32_t x) {
  return (static_cast<int64_t>(image) * p.label_height + y) * p.label_width + x;
}

template <typename Raw, int R, int S>
HAKD_DEVICE void load_labels_as(const Pass& p, int64_t first, int32_t high, int32_t wide,
                                int32_t (&label)[R][S], int32_t& valid, int32_t& bad) {
  const Raw* row = static_cast<const Raw*>(p.target.data) + first;
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const Raw* at = row;
#pragma unroll
    for (int s = 0; s < S; ++s) {
      label[r][s] = kIgnored;
      if (r < high && s < wide) {
        const auto raw = static_cast<int64_t>(*at);
        const LabelKind kind = label_kind(raw, p.classes, p.ignore_index, p.ignore_index);
        if (kind == LabelKind::kClass) label[r][s] = static_cast<int32_t>(raw);
        if (kind == LabelKind::kOutOfRange) bad += 1;
        valid += kind == LabelKind::kClass;
      }
      at += p.target.column_stride;
    }
    row += p.target.row_stride;
  }
}

// Which pixels of a rectangle have no label, and which have a weight of 0: a bit each. Not inlined,
// because most calls have neither, and labels of 64 bits that are looked at once more take registers.
struct SecondLook {
  uint32_t unlabelled, weightless;
};
template <typename F>
static __device__ __noinline__ SecondLook look_again(const Pass& p, int32_t image, int32_t y, int32_t x,
                                                     int32_t high, int32_t wide, int32_t row_bits) {
  SecondLook found{0, 0};
  for (int32_t r = 0; r < high; ++r) {
    for (int32_t s = 0; s < wide; ++s) {
      const uint32_t bit = 1u << (r * row_bits + s);
      const int64_t at = image * p.target.batch_stride + (y + r) * p.target.row_stride +
                         (x + s) * p.target.column_stride;
      const int64_t raw =
          p.target.dtype == LabelDtype::kUint8   ? static_cast<const uint8_t*>(p.target.data)[at]
          : p.target.dtype == LabelDtype::kInt32 ? static_cast<const int32_t*>(p.target.data)[at]
                                                 : static_cast<const int64_t*>(p.target.data)[at];
      if (raw == p.unlabelled_index && raw != p.ignore_index) found.unlabelled |= bit;
      if (p.pixel_weight == nullptr) continue;
      if (weight_at<F>(p, place_of(p, image, y + r, x + s)) == F(0)) found.weightless |= bit;
    }
  }
  return found;
}

// Labels of R x S pixels, of which high x wide exist, as ../math/labels.h has them; ignored where the
// weight, in the arithmetic's type, is 0. Counts the others, and labels out of range.
template <typename F, int R, int S>
HAKD_DEVICE void load_labels(const Pass& p, int32_t image, int32_t y, int32_t x, int32_t high,
                             int32_t wide, int32_t (&label)[R][S], int32_t& valid, int32_t& bad) {
  static_assert(R * S <= 32, "a bit for each pixel");
  const int64_t first = image * p.target.batch_stride + y * p.target.row_stride +
                        x * p.target.column_stride;
  switch (p.target.dtype) {
    case LabelDtype::kUint8:
      load_labels_as<uint8_t>(p, first, high, wide, label, valid, bad);
      break;
    case LabelDtype::kInt32:
      load_labels_as<int32_t>(p, first, high, wide, label, valid, bad);
      break;
    default: load_labels_as<int64_t>(p, first, high, wide, label, valid, bad);
  }
  if (p.unlabelled_index == p.ignore_index && p.pixel_weight == nullptr) return;
  const SecondLook found =
      look_again<F>(p, image, y, x, high < R ? high : R, wide < S ? wide : S, S);
#pragma unroll
  for (int r = 0; r < R; ++r) {
#pragma unroll
    for (int s = 0; s < S; ++s) {
      const bool unlabelled = (found.unlabelled >> (r * S + s) & 1u) != 0;
      const bool weightless = (found.weightless >> (r * S + s) & 1u) != 0;
      bad -= unlabelled;
      valid += (unlabelled && !weightless) - (weightless && label[r][s] >= 0);
      label[r][s] = weightless ? kIgnored : unlabelled ? p.classes : label[r][s];
    }
  }
}

}  // namespace heteroakd::cuda
