// Operator heteroakd_fast_c::label_report on the CPU: one read of the labels, in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <exception>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "strided.h"

namespace heteroakd::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor label_report(const Tensor& target, const std::optional<Tensor>& pixel_weight,
                    int64_t num_classes, int64_t ignore_index, int64_t unlabelled_index) {
  STD_TORCH_CHECK(target.dim() == 3, "label_report: expected target [B, H, W]");
  const int64_t height = target.size(1), width = target.size(2);
  const int64_t rows = target.size(0) * height;
  const StridedLabels labels(target, num_classes, ignore_index, unlabelled_index);
  std::optional<Tensor> dense;
  const double* weights = nullptr;
  if (pixel_weight.has_value()) {
    dense = dense_weights(*pixel_weight, target, ScalarType::Double);
    weights = static_cast<const double*>(dense->const_data_ptr());
  }
  const auto weigh_row = choose_kernels<double>().weigh_row;
  std::vector<LabelReport> reports(static_cast<size_t>(rows));
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    try {
      std::vector<int32_t> row(static_cast<size_t>(width));
      for (int64_t i = begin; i < end; ++i) {
        LabelReport& report = reports[static_cast<size_t>(i)];
        labels.read_row(i / height, i % height, row.data(), report);
        if (weights == nullptr) continue;
        weigh_row(weights + i * width, i * width, width, num_classes, row.data(), report);
      }
    } catch (const std::exception&) {
      failed = true;
    }
  });
  STD_TORCH_CHECK(!failed, "label_report: out of memory for a row of labels");
  LabelReport total;
  for (const LabelReport& report : reports) merge(total, report);
  return report_tensor(total);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CPU, m) {
  m.impl("label_report", TORCH_BOX(&label_report));
}

}  // namespace heteroakd::cpu
