// Schemas of the compiled operators. The public operators, with autograd and fake kernels, are
// defined in Python (heteroakd_fast/ops.py) on top of these.
#include <torch/csrc/stable/library.h>

#include <string>

#define HAKD_STRING_(...) #__VA_ARGS__
#define HAKD_STRING(...) HAKD_STRING_(__VA_ARGS__)

namespace {

// key=value lines for `python -m heteroakd_fast.info`.
std::string build_info() {
  std::string info = "compiler=" __VERSION__ "\n";
  info += "torch_target=" HAKD_STRING(HAKD_TORCH_TARGET) "\n";
#ifdef HAKD_WITH_CUDA
  info += "cuda=" HAKD_STRING(HAKD_CUDA_VERSION) "\n";
  info += "cuda_architectures=" HAKD_STRING(HAKD_CUDA_ARCHITECTURES) "\n";
#endif
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY(heteroakd_fast_c, m) {
  m.def("build_info() -> str");
  // [valid, out of range, flat index of the first out of range or -1]
  m.def("label_report(Tensor target, int num_classes, int ignore_index) -> Tensor");
  // sums f64[2]: numerator, denominator; labels: a label_report; grad: of the numerator, [0] if
  // not asked for
  m.def(
      "upsample_cross_entropy(Tensor logits, Tensor target, Tensor? class_weight, "
      "int ignore_index, bool align_corners, float label_smoothing, bool compute_grad) "
      "-> (Tensor sums, Tensor labels, Tensor grad)");
}

STABLE_TORCH_LIBRARY_IMPL(heteroakd_fast_c, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
