// Operator heteroakd_fast_c::label_report on CUDA: one read of the labels, B*H*W elements.
//
// Integer atomics: sums and minima of integers do not depend on their order, so the result is
// deterministic. Memory bound: 1, 4 or 8 bytes per pixel.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "cells.h"
#include "runtime.h"

namespace heteroakd::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr unsigned long long kNone = ~0ull;

struct Strides {
  int64_t batch, row, column;
};

// report[3]: valid, out of range, first out of range (kNone when there is none)
template <typename Label>
__global__ void __launch_bounds__(kThreads)
    label_report_kernel(const Label* __restrict__ target,  // [B, H, W], any strides
                        Strides stride, int64_t height, int64_t width, int64_t count,
                        int64_t num_classes, int64_t ignore_index,
                        unsigned long long* __restrict__ report) {
  unsigned long long valid = 0;
  unsigned long long out_of_range = 0;
  unsigned long long first = kNone;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const int64_t row = divide(i, width);
    const int64_t x = i - row * width;
    const int64_t b = divide(row, height);
    const int64_t y = row - b * height;
    const auto label = static_cast<int64_t>(
        target[b * stride.batch + y * stride.row + x * stride.column]);
    const LabelKind kind = label_kind(label, num_classes, ignore_index);
    valid += kind == LabelKind::kClass;
    if (kind == LabelKind::kOutOfRange) {
      if (out_of_range++ == 0) first = static_cast<unsigned long long>(i);
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    valid += __shfl_down_sync(0xffffffffu, valid, offset);
    out_of_range += __shfl_down_sync(0xffffffffu, out_of_range, offset);
    const unsigned long long other = __shfl_down_sync(0xffffffffu, first, offset);
    first = other < first ? other : first;
  }
  if (threadIdx.x % 32 == 0) {
    if (valid != 0) atomicAdd(&report[0], valid);
    if (out_of_range != 0) {
      atomicAdd(&report[1], out_of_range);
      atomicMin(&report[2], first);
    }
  }
}

template <typename Label>
void report_labels(const Tensor& target, int64_t num_classes, int64_t ignore_index,
                   unsigned long long* report, cudaStream_t stream) {
  const int64_t count = target.numel();
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  const auto grid = static_cast<unsigned int>(blocks < 1024 ? blocks : 1024);
  launch(label_report_kernel<Label>, grid, kThreads, 0, stream, "label_report",
         static_cast<const Label*>(target.const_data_ptr()),
         Strides{target.stride(0), target.stride(1), target.stride(2)}, target.size(1),
         target.size(2), count, num_classes, ignore_index, report);
}

Tensor label_report(const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.dim() == 3, "label_report: expected target [B, H, W]");
  const OnDevice device(target.get_device_index());
  const cudaStream_t stream = current_stream(target.get_device_index());
  Tensor out = torch::stable::new_empty(target, {3}, ScalarType::Long);
  auto* report = static_cast<unsigned long long*>(out.mutable_data_ptr());
  check(cudaMemsetAsync(report, 0x00, 2 * sizeof(*report), stream), "label_report: memset");
  // kNone read as int64 is -1: "none", as on the CPU.
  check(cudaMemsetAsync(report + 2, 0xff, sizeof(*report), stream), "label_report: memset");
  if (target.numel() == 0) return out;
  switch (target.scalar_type()) {
    case ScalarType::Byte:
      report_labels<uint8_t>(target, num_classes, ignore_index, report, stream);
      break;
    case ScalarType::Int:
      report_labels<int32_t>(target, num_classes, ignore_index, report, stream);
      break;
    case ScalarType::Long:
      report_labels<int64_t>(target, num_classes, ignore_index, report, stream);
      break;
    default:
      STD_TORCH_CHECK(false, "target: expected uint8, int32 or int64");
  }
  return out;
}

}  // namespace

HAKD_REGISTER(m) {
  m.impl("label_report", TORCH_BOX(&label_report));
}

}  // namespace heteroakd::cuda
