// Kernels by segments whose terms are known: for logits that are held, in float.
#include "segments.cuh"

namespace heteroakd::cuda {
namespace {

template <class Set>
constexpr SegmentKernel fixed(const char* name) {
  return {segments_of<float, Set, kSegmentPixels, Hold::kAlways>(name), covers_call<Set>};
}

constexpr int32_t kForward = KdTerm::kForward;
constexpr int32_t kPaper = PaperTerm::kMixes | PaperTerm::kEvaluates;

// The first that covers a call is taken.
constexpr SegmentKernel kKernels[] = {
    fixed<Ce>("segments: ce"),
    fixed<CeKdHetero>("segments: ce, kd, hetero"),
    fixed<Fixed<kPlainCe, kForward, HeteroTerm::kLogits>>(
        "segments: ce, kd, hetero of mixed logits"),
    fixed<Fixed<kPlainCe, kForward, -1, kPaper>>("segments: ce, kd, paper"),
    fixed<Fixed<kPlainCe, KdTerm::kReverse>>("segments: ce, reverse kd"),
    fixed<Fixed<kPlainCe, KdTerm::kJs>>("segments: ce, js"),
};

}  // namespace

const Kernel* segments_fixed(const Pass& pass) {
  for (const SegmentKernel& fixed : kKernels) {
    if (fixed.covers(pass)) return &fixed.kernel;
  }
  return nullptr;
}

}  // namespace heteroakd::cuda
