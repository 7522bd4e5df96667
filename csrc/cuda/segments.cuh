// A kernel by segments and its entry.
#pragma once

#include "kernels.h"
#include "runtime.h"
#include "segment_kernel.h"

namespace heteroakd::cuda {

template <auto kKernel>
void start_segments(const Pass& pass, dim3 grid, int64_t shared_bytes, cudaStream_t stream,
                    const char* name) {
  launch(kKernel, grid, dim3(kSegmentThreads), static_cast<size_t>(shared_bytes), stream,
         name, pass);
}

template <typename F, class Set, int S, Hold kHold>
constexpr Kernel segments_of(const char* name) {
  return {name, kSegmentThreads, S, 0, start_segments<segment_kernel<F, Set, S, kHold>>};
}

// A kernel, and whether it can run a call.
struct SegmentKernel {
  Kernel kernel;
  bool (*covers)(const Pass&);
};

template <class Set>
bool covers_call(const Pass& pass) {
  return covers<Set>(pass, AllTerms());
}

constexpr int kSegmentPixels = 4;      // float: 16 bytes
constexpr int kWideSegmentPixels = 2;  // double

}  // namespace heteroakd::cuda
