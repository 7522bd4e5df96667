// Kernels by segments whose terms are known: for logits that are held, in float.
#include "segments.cuh"

namespace heteroakd::cuda {
namespace {

template <class Set>
constexpr Kernel fixed(const char* name) {
  return segments_of<float, Set, kSegmentPixels, Hold::kAlways>(name);
}

constexpr Divergence kForward = Divergence::kForward;

constexpr Kernel kCeOnly = fixed<Ce>("segments: ce");
constexpr Kernel kProbs = fixed<CeKdHetero>("segments: ce, kd, hetero");
constexpr Kernel kLogits = fixed<Fixed<true, kForward, Hetero::kSoftmaxKl, Mix::kLogits>>(
    "segments: ce, kd, hetero of mixed logits");
constexpr Kernel kPaper = fixed<Fixed<true, kForward, Hetero::kPaper>>("segments: ce, kd, paper");
constexpr Kernel kReverse =
    fixed<Fixed<true, Divergence::kReverse, Hetero::kNone>>("segments: ce, reverse kd");
constexpr Kernel kJs = fixed<Fixed<true, Divergence::kJs, Hetero::kNone>>("segments: ce, js");

}  // namespace

const Kernel* segments_fixed(Divergence kd, Hetero hetero, Mix mix) {
  if (hetero != Hetero::kNone && mix == Mix::kTeacher) return nullptr;  // an ablation: seldom run
  if (kd == Divergence::kReverse) return hetero == Hetero::kNone ? &kReverse : nullptr;
  if (kd == Divergence::kJs) return hetero == Hetero::kNone ? &kJs : nullptr;
  switch (hetero) {
    case Hetero::kNone: return kd == Divergence::kNone ? &kCeOnly : &kProbs;
    case Hetero::kSoftmaxKl: return mix == Mix::kProbs ? &kProbs : &kLogits;
    case Hetero::kPaper: return &kPaper;
    default: return nullptr;
  }
}

}  // namespace heteroakd::cuda
