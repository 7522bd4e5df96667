// Operator heteroakd_fast_c::upsample_cross_entropy on the CPU; see cross_entropy.h.
#include "cross_entropy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <exception>
#include <optional>
#include <tuple>

namespace heteroakd::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Beyond this many label pixels per logit along an axis, float sums of their gradients lose more
// than the contract allows; the logits are then so few that double costs nothing but time.
constexpr int64_t kMaxFloatRatio = 64;

template <typename T>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& logits, const Tensor& target,
                                       const std::optional<Tensor>& class_weight,
                                       int64_t ignore_index, bool align_corners,
                                       double label_smoothing, bool compute_grad,
                                       ScalarType dtype) {
  const CrossEntropyShape shape{logits.size(0), logits.size(1), logits.size(2),
                                logits.size(3), target.size(1), target.size(2)};
  Tensor sums = torch::stable::empty({2}, ScalarType::Double);
  Tensor labels = torch::stable::empty({3}, ScalarType::Long);
  Tensor grad = compute_grad ? torch::stable::empty({shape.batch, shape.classes, shape.in_height,
                                                     shape.in_width},
                                                    dtype)
                             : torch::stable::empty({0}, dtype);
  std::optional<Tensor> weight;
  if (class_weight.has_value()) {
    data_of(*class_weight, "class_weight");
    weight = torch::stable::contiguous(torch::stable::to(*class_weight, dtype));
  }

  UpsampleCrossEntropy<T> kernel(
      shape, StridedLogits<T>(logits), StridedLabels(target, shape.classes, ignore_index),
      weight.has_value() ? static_cast<const T*>(weight->const_data_ptr()) : nullptr,
      align_corners, label_smoothing,
      compute_grad ? static_cast<T*>(grad.mutable_data_ptr()) : nullptr);

  // No exception may cross the C interface of parallel_for: only an allocation can fail here.
  std::atomic<bool> failed{false};
  torch::stable::parallel_for(0, kernel.bands(), 1, [&](int64_t begin, int64_t end) {
    try {
      typename UpsampleCrossEntropy<T>::Scratch scratch(kernel);
      for (int64_t band = begin; band < end; ++band) kernel.run_band(band, scratch);
    } catch (const std::exception&) {
      failed = true;
    }
  });
  STD_TORCH_CHECK(!failed, "upsample_cross_entropy: out of memory for the row buffers");
  torch::stable::parallel_for(0, kernel.bands(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) kernel.add_edge(band);
  });

  const CrossEntropySums total = kernel.total();
  auto* s = static_cast<double*>(sums.mutable_data_ptr());
  s[0] = total.numerator;
  s[1] = total.denominator;
  auto* l = static_cast<int64_t*>(labels.mutable_data_ptr());
  l[0] = total.labels.valid;
  l[1] = total.labels.out_of_range;
  l[2] = total.labels.first_out_of_range;
  return {sums, labels, grad};
}

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy(
    const Tensor& logits, const Tensor& target, const std::optional<Tensor>& class_weight,
    int64_t ignore_index, bool align_corners, double label_smoothing, bool compute_grad) {
  STD_TORCH_CHECK(logits.dim() == 4 && target.dim() == 3 && logits.size(0) == target.size(0),
                  "upsample_cross_entropy: expected logits [B, C, h, w] and target [B, H, W]");
  STD_TORCH_CHECK(target.numel() == 0 || logits.numel() > 0,
                  "upsample_cross_entropy: empty logits for a target that is not empty");
  STD_TORCH_CHECK(!class_weight.has_value() ||
                      (class_weight->dim() == 1 && class_weight->size(0) == logits.size(1)),
                  "upsample_cross_entropy: expected class_weight [C]");
  if (logits.scalar_type() == ScalarType::Double) {
    return run<double>(logits, target, class_weight, ignore_index, align_corners, label_smoothing,
                       compute_grad, ScalarType::Double);
  }
  if (target.size(1) > kMaxFloatRatio * logits.size(2) ||
      target.size(2) > kMaxFloatRatio * logits.size(3)) {
    auto [sums, labels, grad] = run<double>(logits, target, class_weight, ignore_index,
                                            align_corners, label_smoothing, compute_grad,
                                            ScalarType::Double);
    return {sums, labels, torch::stable::to(grad, ScalarType::Float)};
  }
  return run<float>(logits, target, class_weight, ignore_index, align_corners, label_smoothing,
                    compute_grad, ScalarType::Float);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CPU, m) {
  m.impl("upsample_cross_entropy", TORCH_BOX(&upsample_cross_entropy));
}

}  // namespace heteroakd::cpu
