// The kernels for any terms: float, and double for gradient checks and oracles on the GPU.
#include "segments.cuh"

namespace heteroakd::cuda {
namespace {

constexpr Kernel kSegments =
    segments_of<float, Any, kSegmentPixels, Hold::kWherePossible>("segments");
constexpr Kernel kWideSegments =
    segments_of<double, Any, kWideSegmentPixels, Hold::kWherePossible>("segments in double");
constexpr Kernel kSpace = {"space", kSegmentThreads, kSegmentPixels, 0,
                           start_segments<space_kernel<float, kSegmentPixels>>};
constexpr Kernel kWideSpace = {"space in double", kSegmentThreads, kWideSegmentPixels, 0,
                               start_segments<space_kernel<double, kWideSegmentPixels>>};

}  // namespace

const Kernel& segments(bool wide) { return wide ? kWideSegments : kSegments; }
const Kernel& space_statistics(bool wide) { return wide ? kWideSpace : kSpace; }

}  // namespace heteroakd::cuda
