// Kernels by segments whose terms are known: for logits that are held, in float.
#include "segments.cuh"

namespace heteroakd::cuda {
namespace {

// A set of terms, and whether a call has no other ones.
struct FixedKernel {
  Kernel kernel;
  bool (*covers)(const Pass&);
};

template <class Set, class... Terms>
bool covers(const Pass& p, TermTypes<Terms...>) {
  return ((!p.has[index_of<Terms>] ||
           p.variant[index_of<Terms>] == Set::template fixed<Terms>()) &&
          ...);
}

template <class Set>
constexpr FixedKernel fixed(const char* name) {
  return {segments_of<float, Set, kSegmentPixels, Hold::kAlways>(name),
          [](const Pass& p) { return covers<Set>(p, AllTerms()); }};
}

constexpr int32_t kForward = KdTerm::kForward;
constexpr int32_t kPaper = PaperTerm::kMixes | PaperTerm::kEvaluates;

// The first that covers a call is taken.
constexpr FixedKernel kKernels[] = {
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
  for (const FixedKernel& fixed : kKernels) {
    if (fixed.covers(pass)) return &fixed.kernel;
  }
  return nullptr;
}

}  // namespace heteroakd::cuda
