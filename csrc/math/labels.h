// What a label is: the index of a class, to be ignored, or a mistake in the data.
#pragma once

#include <cstdint>

#include "macros.h"

namespace heteroakd {

enum class LabelKind : int32_t { kClass, kIgnored, kOutOfRange };

HAKD_FN LabelKind label_kind(int64_t label, int64_t num_classes, int64_t ignore_index) {
  if (label == ignore_index) return LabelKind::kIgnored;
  return label >= 0 && label < num_classes ? LabelKind::kClass : LabelKind::kOutOfRange;
}

}  // namespace heteroakd
