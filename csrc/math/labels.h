// What a label is: the index of a class, to be ignored, of a pixel that has none, or a mistake in the
// data. Kernels have labels as class indices, kIgnored (all that is negative), or, of an unlabelled
// pixel, the number of classes: an index that no class has, and not negative, because terms of
// distillation count the pixel.
#pragma once

#include <cstdint>

#include "macros.h"

namespace heteroakd {

enum class LabelKind : int32_t { kClass, kIgnored, kUnlabelled, kOutOfRange };

constexpr int32_t kIgnored = -1;

// unlabelled_index: ignore_index where no pixel is unlabelled.
HAKD_FN LabelKind label_kind(int64_t label, int64_t num_classes, int64_t ignore_index,
                             int64_t unlabelled_index) {
  if (label == ignore_index) return LabelKind::kIgnored;
  if (label == unlabelled_index) return LabelKind::kUnlabelled;
  return label >= 0 && label < num_classes ? LabelKind::kClass : LabelKind::kOutOfRange;
}

}  // namespace heteroakd
