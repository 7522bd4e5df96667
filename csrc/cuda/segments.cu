// The kernels for any terms: float, and double for gradient checks and oracles on the GPU.
#include "segments.cuh"

namespace heteroakd::cuda {
namespace {

template <typename F, class Set>
constexpr Kernel any_terms(const char* name) {
  return segments_of<F, Set, sizeof(F) == 8 ? kWideSegmentPixels : kSegmentPixels,
                     Hold::kWherePossible>(name);
}

constexpr Kernel kSegments[2][2] = {
    {any_terms<float, Any>("segments"), any_terms<float, AnyPaper>("segments: paper")},
    {any_terms<double, Any>("segments in double"),
     any_terms<double, AnyPaper>("segments in double: paper")}};
constexpr Kernel kSpace = {"space", kSegmentThreads, kSegmentPixels, 0,
                           start_segments<space_kernel<float, kSegmentPixels>>};
constexpr Kernel kWideSpace = {"space in double", kSegmentThreads, kWideSegmentPixels, 0,
                               start_segments<space_kernel<double, kWideSegmentPixels>>};

}  // namespace

const Kernel& segments(bool wide, bool paper) { return kSegments[wide ? 1 : 0][paper ? 1 : 0]; }
const Kernel& space_statistics(bool wide) { return wide ? kWideSpace : kSpace; }

}  // namespace heteroakd::cuda
