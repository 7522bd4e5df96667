// Schemas of the compiled operators. The public operators, with autograd and fake kernels, are
// defined in Python (heteroakd_fast/ops.py) on top of these.
#include <torch/csrc/stable/library.h>

#include <string>

#define HAKD_STRING_(...) #__VA_ARGS__
#define HAKD_STRING(...) HAKD_STRING_(__VA_ARGS__)

// Another name only in tests (tests/cuda_shim). Torch's macros paste their arguments as they stand:
// one more level expands them first.
#ifndef HAKD_LIBRARY
#define HAKD_LIBRARY heteroakd_fast_c
#endif
#define HAKD_TORCH_LIBRARY(library, m) STABLE_TORCH_LIBRARY(library, m)
#define HAKD_TORCH_LIBRARY_IMPL(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

namespace {

// key=value lines for `python -m heteroakd_fast.info`.
std::string build_info() {
  std::string info = "compiler=" __VERSION__ "\n";
  info += "torch_target=" HAKD_STRING(HAKD_TORCH_TARGET) "\n";
#ifdef HAKD_WITH_CUDA
  info += "cuda=" HAKD_STRING(HAKD_CUDA_VERSION) "\n";
  info += "cuda_architectures=" HAKD_STRING(HAKD_CUDA_ARCHITECTURES) "\n";
#endif
#ifdef HAKD_CUDA_ABSENT
  info += "cuda_absent=" HAKD_CUDA_ABSENT "\n";
#endif
  return info;
}

}  // namespace

HAKD_TORCH_LIBRARY(HAKD_LIBRARY, m) {
  m.def("build_info() -> str");
  // [valid, out of range, flat index of the first out of range or -1]
  m.def("label_report(Tensor target, int num_classes, int ignore_index) -> Tensor");
  // One pass over the label grid; the numbers are those of csrc/cpu/pass.h. Without
  // grad_numerators: sums f64[4, 2] (numerator and denominator by term), labels (a label_report),
  // maps [2, B, H, W] or [0], and, if compute_grad, the gradients of the numerators
  // [terms asked for, B, C, h, w], [0] where every grid is the label grid. With grad_numerators
  // f64[4], for those grids only: the gradient in the form of student_logits, nothing else.
  m.def(
      "distillation(Tensor student_logits, Tensor? teacher_logits, Tensor target, "
      "Tensor? class_weight, int terms, int kd_divergence, int hetero, int mix, bool evaluation, "
      "float kd_beta, float temperature, float tau, int ignore_index, bool align_corners, "
      "float label_smoothing, bool maps, bool compute_grad, Tensor? grad_numerators) "
      "-> (Tensor sums, Tensor labels, Tensor maps, Tensor gradients)");
  // sum over k of scales[k] * gradients[k], in the form of like
  m.def("combine_gradients(Tensor gradients, Tensor scales, Tensor like) -> Tensor");
  // The same on CUDA, without a copy to the host (csrc/cuda/operators.cu): numerators and
  // denominators are written at each term's place (-1: not asked for), report (valid labels, and
  // labels out of range) and maps where there are any; returns the gradients of the numerators.
  m.def(
      "cuda_forward(Tensor student_logits, Tensor? teacher_logits, Tensor target, "
      "Tensor? class_weight, Tensor(a!) numerators, Tensor(b!) denominators, Tensor(c!)? report, "
      "Tensor(d!)? maps, int place_ce, int place_kd, int place_hetero, "
      "int place_feature, int kd_divergence, int hetero, int mix, bool evaluation, float kd_beta, "
      "float temperature, float tau, int ignore_index, bool align_corners, float label_smoothing, "
      "bool compute_grad) -> Tensor");
  // For logits on the label grid: the gradient in their form.
  m.def(
      "cuda_backward(Tensor student_logits, Tensor? teacher_logits, Tensor target, "
      "Tensor? class_weight, Tensor grad_numerators, int place_ce, int place_kd, int place_hetero, "
      "int place_feature, int kd_divergence, int hetero, int mix, bool evaluation, float kd_beta, "
      "float temperature, float tau, int ignore_index, bool align_corners, float label_smoothing) -> Tensor");
  // sum over k of grad_numerators[place_k] * saved[k], in the form of like
  m.def(
      "cuda_combine(Tensor saved, Tensor grad_numerators, int place_0, int place_1, int place_2, "
      "int place_3, Tensor like) -> Tensor");
  // The kernel that such a call gets.
  m.def(
      "cuda_kernel(Tensor student_logits, Tensor? teacher_logits, Tensor target, int place_ce, "
      "int place_kd, int place_hetero, int place_feature, int kd_divergence, int hetero, int mix, "
      "bool align_corners, float label_smoothing, bool maps) -> str");
  // The instruction set that the CPU kernels use here.
  m.def("cpu_isa() -> str");
  // For tests: exp2, log, log2, log1p or log1p_unit of a float32 vector, by an instruction set.
  m.def("elementary(Tensor x, str function, str isa) -> Tensor");
}

HAKD_TORCH_LIBRARY_IMPL(HAKD_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
