// The kernels for any terms: float, and double for gradient checks and oracles on the GPU.
#include "kernels.h"
#include "runtime.h"
#include "segment_kernel.h"

namespace heteroakd::cuda {
namespace {

constexpr int kPixels = 4;      // float: 16 bytes
constexpr int kWidePixels = 2;  // double

template <auto kKernel>
void start(const Pass& pass, dim3 grid, int64_t shared_bytes, cudaStream_t stream) {
  launch(kKernel, grid, dim3(kSegmentThreads), static_cast<size_t>(shared_bytes), stream,
         "distillation", pass);
}

constexpr Kernel kSegments = {"segments", kSegmentThreads, kPixels, 0,
                              start<segment_kernel<float, Any, kPixels>>};
constexpr Kernel kWideSegments = {"segments in double", kSegmentThreads, kWidePixels, 0,
                                  start<segment_kernel<double, Any, kWidePixels>>};
constexpr Kernel kSpace = {"space", kSegmentThreads, kPixels, 0,
                           start<space_kernel<float, kPixels>>};
constexpr Kernel kWideSpace = {"space in double", kSegmentThreads, kWidePixels, 0,
                               start<space_kernel<double, kWidePixels>>};

}  // namespace

const Kernel& segments(bool wide) { return wide ? kWideSegments : kSegments; }
const Kernel& space_statistics(bool wide) { return wide ? kWideSpace : kSpace; }

}  // namespace heteroakd::cuda
