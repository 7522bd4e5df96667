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
  // int64 [6]: see heteroakd_fast/labels.py
  m.def(
      "label_report(Tensor target, Tensor? pixel_weight, int num_classes, int ignore_index, "
      "int unlabelled_index) -> Tensor");
  // A call: the pass over the student's logits and that of teacher_ce over the teacher's (spec.h
  // decodes structure and numbers). numerators f64 [terms]; totals f64 [groups], the sum of weight *
  // numerator; denominators f64 [groups]; labels int64 [6] on the CPU (a label_report), [4] on CUDA
  // (its first); maps [2, B, H, W] or [0]; of each pass what `gradient` needs besides its
  // inputs, if its gradient is asked for and its logits have a grid of their own, else [0].
  m.def(
      "sums(Tensor student_logits, Tensor? teacher_logits, Tensor target, Tensor? class_weight, "
      "Tensor? pixel_weight, Tensor numbers, int[] structure, bool student_grad, "
      "bool teacher_grad) -> (Tensor numerators, Tensor totals, Tensor denominators, Tensor labels, Tensor maps, Tensor student_saved, "
      "Tensor teacher_saved)");
  // Of sum over groups of grad_totals * totals, in the form of the logits; [0] where not asked for.
  // Where a pass saved something, of its logits only the form is read, and no labels.
  m.def(
      "gradient(Tensor grad_totals, Tensor student_logits, Tensor? teacher_logits, Tensor? target, "
      "Tensor? class_weight, Tensor? pixel_weight, Tensor numbers, Tensor? student_saved, Tensor? teacher_saved, "
      "int[] structure, bool student_grad, bool teacher_grad) -> (Tensor student, Tensor teacher)");
  // The class of the largest bilinearly upsampled logit at every pixel: [B, height, width], uint8 if
  // `bytes`, else int64.
  m.def(
      "predict(Tensor logits, int height, int width, bool align_corners, bool bytes) -> Tensor");
  // How often each label (row) was predicted as each class (column): int64 [C, C]; and the labels'
  // report as of `sums`.
  m.def(
      "confusion_matrix(Tensor logits, Tensor target, int ignore_index, bool align_corners) -> "
      "(Tensor matrix, Tensor labels)");
  // The instruction set that the CPU kernels use here.
  m.def("cpu_isa() -> str");
  // For tests: exp2, log, log2, log1p or log1p_unit of a float32 vector, by an instruction set.
  m.def("elementary(Tensor x, str function, str isa) -> Tensor");
}

HAKD_TORCH_LIBRARY_IMPL(HAKD_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
