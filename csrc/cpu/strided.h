// Reads labels of any dtype and strides, row by row.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "../math/labels.h"
#include "pass.h"

namespace heteroakd::cpu {

// The data of a tensor that may have lost its memory (a resized storage, a freed shard).
inline const char* data_of(const torch::stable::Tensor& tensor, const char* name) {
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || tensor.numel() == 0, name, ": the tensor has no memory");
  return static_cast<const char*>(data);
}

// Integers: the order of merging does not matter.
inline void merge(LabelReport& into, const LabelReport& other) {
  into.valid += other.valid;
  into.out_of_range += other.out_of_range;
  if (into.first_out_of_range < 0 ||
      (other.first_out_of_range >= 0 && other.first_out_of_range < into.first_out_of_range)) {
    into.first_out_of_range = other.first_out_of_range;
  }
}

// Labels [B, H, W] with any strides.
class StridedLabels {
 public:
  static constexpr int32_t kIgnored = -1;

  StridedLabels(const torch::stable::Tensor& target, int64_t num_classes, int64_t ignore_index)
      : data_(data_of(target, "target")),
        read_(reader(target.scalar_type())),
        dtype_(label_dtype(target.scalar_type())),
        element_size_(static_cast<int64_t>(target.element_size())),
        height_(target.size(1)),
        width_(target.size(2)),
        num_classes_(num_classes),
        ignore_index_(ignore_index) {
    for (int d = 0; d < 3; ++d) stride_[d] = target.stride(d);
  }

  // out[x] = class index, or kIgnored where the label is ignored or out of range.
  void read_row(int64_t b, int64_t y, int32_t* out, LabelReport& report) const {
    read_(*this, b, y, out, report);
  }

  LabelsView view() const {
    return {data_, dtype_, {stride_[0], stride_[1], stride_[2]}, num_classes_, ignore_index_, this};
  }

 private:
  using Reader = void (*)(const StridedLabels&, int64_t, int64_t, int32_t*, LabelReport&);

  template <typename S>
  static void read(const StridedLabels& self, int64_t b, int64_t y, int32_t* out,
                   LabelReport& report) {
    const S* in = reinterpret_cast<const S*>(
        self.data_ + (b * self.stride_[0] + y * self.stride_[1]) * self.element_size_);
    LabelReport row;
    for (int64_t x = 0; x < self.width_; ++x) {
      const int64_t label = static_cast<int64_t>(in[x * self.stride_[2]]);
      const LabelKind kind = label_kind(label, self.num_classes_, self.ignore_index_);
      out[x] = kind == LabelKind::kClass ? static_cast<int32_t>(label) : kIgnored;
      row.valid += kind == LabelKind::kClass;
      if (kind == LabelKind::kOutOfRange && row.out_of_range++ == 0) {
        row.first_out_of_range = (b * self.height_ + y) * self.width_ + x;
      }
    }
    merge(report, row);
  }

  static Reader reader(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    switch (dtype) {
      case ScalarType::Byte: return read<uint8_t>;
      case ScalarType::Int: return read<int32_t>;
      case ScalarType::Long: return read<int64_t>;
      default: STD_TORCH_CHECK(false, "target: expected uint8, int32 or int64");
    }
    return nullptr;
  }

  static LabelDtype label_dtype(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    return dtype == ScalarType::Byte  ? LabelDtype::kUint8
           : dtype == ScalarType::Int ? LabelDtype::kInt32
                                      : LabelDtype::kInt64;
  }

  const char* data_;
  Reader read_;
  LabelDtype dtype_;
  int64_t element_size_;
  int64_t height_;
  int64_t width_;
  int64_t num_classes_;
  int64_t ignore_index_;
  int64_t stride_[3];
};

}  // namespace heteroakd::cpu
