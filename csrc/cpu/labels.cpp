// Operator heteroakd_fast_c::label_report on the CPU: one read of the labels, in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <exception>
#include <vector>

#include "strided.h"

namespace heteroakd::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor label_report(const Tensor& target, int64_t num_classes, int64_t ignore_index) {
  STD_TORCH_CHECK(target.dim() == 3, "label_report: expected target [B, H, W]");
  const int64_t height = target.size(1);
  const int64_t rows = target.size(0) * height;
  const StridedLabels labels(target, num_classes, ignore_index);
  std::vector<LabelReport> reports(static_cast<size_t>(rows));
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    try {
      std::vector<int32_t> row(static_cast<size_t>(target.size(2)));
      for (int64_t i = begin; i < end; ++i) {
        labels.read_row(i / height, i % height, row.data(), reports[static_cast<size_t>(i)]);
      }
    } catch (const std::exception&) {
      failed = true;
    }
  });
  STD_TORCH_CHECK(!failed, "label_report: out of memory for a row of labels");
  LabelReport total;
  for (const LabelReport& report : reports) merge(total, report);
  Tensor out = torch::stable::empty({3}, ScalarType::Long);
  auto* o = static_cast<int64_t*>(out.mutable_data_ptr());
  o[0] = total.valid;
  o[1] = total.out_of_range;
  o[2] = total.first_out_of_range;
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CPU, m) {
  m.impl("label_report", TORCH_BOX(&label_report));
}

}  // namespace heteroakd::cpu
