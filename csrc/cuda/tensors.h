// What the operators read off tensors: types, strides, sizes that the kernels count to.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>

#include "pass.h"

namespace heteroakd::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline int32_t narrow(int64_t n, const char* what) {
  STD_TORCH_CHECK(n >= 0 && n <= std::numeric_limits<int32_t>::max() - 1024, what, ": ", n,
                  " is more than the kernels count to");
  return static_cast<int32_t>(n);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::Double: return Dtype::kDouble;
    case ScalarType::Half: return Dtype::kHalf;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16");
  }
  return Dtype::kFloat;
}

inline const void* data_of(const Tensor& tensor, const char* name) {
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(data != nullptr || tensor.numel() == 0, name, ": the tensor has no memory");
  return data;
}

inline Logits logits_of(const Tensor& tensor, const char* name) {
  Logits logits{};
  logits.data = data_of(tensor, name);
  logits.batch_stride = tensor.stride(0);
  logits.class_stride = tensor.stride(1);
  logits.row_stride = tensor.stride(2);
  logits.column_stride = tensor.stride(3);
  logits.height = narrow(tensor.size(2), "height of the logits");
  logits.width = narrow(tensor.size(3), "width of the logits");
  logits.dtype = dtype_of(tensor, name);
  logits.source = Source::kNone;
  const auto address = reinterpret_cast<uintptr_t>(logits.data);
  const bool apart = (logits.batch_stride | logits.class_stride | logits.row_stride) % 4 == 0;
  logits.vectors = logits.column_stride == 1 && logits.width % 4 == 0 && apart &&
                   address % (4 * static_cast<size_t>(tensor.element_size())) == 0;
  return logits;
}

inline Labels labels_of(const Tensor& target) {
  LabelDtype dtype = LabelDtype::kInt64;
  switch (target.scalar_type()) {
    case ScalarType::Byte: dtype = LabelDtype::kUint8; break;
    case ScalarType::Int: dtype = LabelDtype::kInt32; break;
    case ScalarType::Long: break;
    default:
      STD_TORCH_CHECK(false, "target: expected uint8, int32 or int64");
  }
  return {data_of(target, "target"), target.stride(0), target.stride(1), target.stride(2), dtype};
}

// The most pixels that a cell has along an axis.
inline int64_t most_pixels(int64_t logits, int64_t labels, bool align_corners) {
  if (align_corners) {
    return logits == 1 || labels == 1 ? labels : ceil_div(labels - 1, logits - 1);
  }
  return ceil_div(labels, logits);
}

// Whether cells are that many pixels high (or wide).
inline bool cells_have(int64_t pixels, int64_t logits, int64_t labels, bool align_corners) {
  return align_corners ? labels - 1 >= pixels * (logits - 1) : labels >= pixels * logits;
}

inline void check_device(const Tensor& first, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(first.get_device_index() == other.get_device_index(), name,
                  ": not on the device of the logits");
}

}  // namespace heteroakd::cuda
