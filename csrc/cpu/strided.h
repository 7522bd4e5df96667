// Reads labels of any dtype and strides, row by row.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
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

inline void merge_first(int64_t& into, int64_t other) {
  if (into < 0 || (other >= 0 && other < into)) into = other;
}

// In the order of the pixels: the weights are not integers.
inline void merge(LabelReport& into, const LabelReport& other) {
  into.labelled += other.labelled;
  into.distilled += other.distilled;
  into.bad_labels += other.bad_labels;
  into.bad_weights += other.bad_weights;
  merge_first(into.first_bad_label, other.first_bad_label);
  merge_first(into.first_bad_weight, other.first_bad_weight);
  into.labelled_weight += other.labelled_weight;
  into.distilled_weight += other.distilled_weight;
}

// As heteroakd_fast/labels.py has it.
inline torch::stable::Tensor report_tensor(const LabelReport& report) {
  torch::stable::Tensor out =
      torch::stable::empty({6}, torch::headeronly::ScalarType::Long);
  const int64_t values[] = {report.labelled,    report.distilled,       report.bad_labels,
                            report.bad_weights, report.first_bad_label, report.first_bad_weight};
  std::copy_n(values, 6, static_cast<int64_t*>(out.mutable_data_ptr()));
  return out;
}

// pixel_weight of these labels [B, H, W], without gaps and in the type of the arithmetic.
inline torch::stable::Tensor dense_weights(const torch::stable::Tensor& pixel_weight,
                                           const torch::stable::Tensor& target,
                                           torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(pixel_weight.dim() == 3 && pixel_weight.size(0) == target.size(0) &&
                      pixel_weight.size(1) == target.size(1) &&
                      pixel_weight.size(2) == target.size(2),
                  "pixel_weight: expected [B, H, W], as target");
  data_of(pixel_weight, "pixel_weight");
  return torch::stable::contiguous(torch::stable::to(pixel_weight, dtype));
}

// Labels [B, H, W] with any strides.
class StridedLabels {
 public:
  StridedLabels(const torch::stable::Tensor& target, int64_t num_classes, int64_t ignore_index,
                int64_t unlabelled_index)
      : data_(data_of(target, "target")),
        read_(reader(target.scalar_type())),
        dtype_(label_dtype(target.scalar_type())),
        element_size_(static_cast<int64_t>(target.element_size())),
        height_(target.size(1)),
        width_(target.size(2)),
        num_classes_(num_classes),
        ignore_index_(ignore_index),
        unlabelled_index_(unlabelled_index) {
    for (int d = 0; d < 3; ++d) stride_[d] = target.stride(d);
  }

  // out[x] = the label as the kernels have it, kIgnored where it is out of range.
  void read_row(int64_t b, int64_t y, int32_t* out, LabelReport& report) const {
    read_(*this, b, y, out, report);
  }

  LabelsView view() const {
    return {data_,        dtype_,        {stride_[0], stride_[1], stride_[2]},
            num_classes_, ignore_index_, unlabelled_index_,
            this};
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
      const LabelKind kind =
          label_kind(label, self.num_classes_, self.ignore_index_, self.unlabelled_index_);
      out[x] = kind == LabelKind::kClass        ? static_cast<int32_t>(label)
               : kind == LabelKind::kUnlabelled ? static_cast<int32_t>(self.num_classes_)
                                                : kIgnored;
      row.labelled += kind == LabelKind::kClass;
      row.distilled += out[x] >= 0;
      if (kind == LabelKind::kOutOfRange && row.bad_labels++ == 0) {
        row.first_bad_label = (b * self.height_ + y) * self.width_ + x;
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
  int64_t ignore_index_, unlabelled_index_;
  int64_t stride_[3];
};

}  // namespace heteroakd::cpu
