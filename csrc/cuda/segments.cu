// The kernels for any terms: float, and double for gradient checks and oracles on the GPU.
#include "segments.cuh"

namespace heteroakd::cuda {
namespace {

template <class Set>
constexpr SegmentKernel any_terms(const char* name) {
  return {segments_of<float, Set, kSegmentPixels, Hold::kWherePossible>(name), covers_call<Set>};
}

// The first that covers a call is taken.
constexpr SegmentKernel kSegments[] = {any_terms<Usual>("segments"),
                                       any_terms<UsualPaper>("segments: paper"),
                                       any_terms<All>("segments: all terms")};
constexpr Kernel kWideSegments =
    segments_of<double, All, kWideSegmentPixels, Hold::kWherePossible>("segments in double");
constexpr Kernel kSpace = {"space", kSegmentThreads, kSegmentPixels, 0,
                           start_segments<space_kernel<float, kSegmentPixels>>};
constexpr Kernel kWideSpace = {"space in double", kSegmentThreads, kWideSegmentPixels, 0,
                               start_segments<space_kernel<double, kWideSegmentPixels>>};
constexpr Kernel kTally = {"tally", kSegmentThreads, kSegmentPixels, 0,
                           start_segments<tally_kernel<float, kSegmentPixels>>};
constexpr Kernel kWideTally = {"tally in double", kSegmentThreads, kWideSegmentPixels, 0,
                               start_segments<tally_kernel<double, kWideSegmentPixels>>};

}  // namespace

const Kernel& segments(const Pass& pass, bool wide) {
  if (wide) return kWideSegments;
  const SegmentKernel* found = kSegments;
  while (!found->covers(pass)) ++found;
  return found->kernel;
}
const Kernel& class_tallies(bool wide) { return wide ? kWideTally : kTally; }
const Kernel& space_statistics(bool wide) { return wide ? kWideSpace : kSpace; }

}  // namespace heteroakd::cuda
