// One kernel by cells and its entry, for a file of its own: they compile side by side.
#pragma once

#include "cell_kernel.h"
#include "kernels.h"

namespace heteroakd::cuda {

constexpr int kCellSide = 4;  // pixels of a thread along each axis

template <class Set>
void start_cells(const Pass& pass, dim3 grid, int64_t shared_bytes, cudaStream_t stream,
                 const char* name) {
  launch(cell_kernel<Set, kCellSide, kCellSide>, grid, dim3(kCellThreads),
         static_cast<size_t>(shared_bytes), stream, name, pass);
}

template <class Set>
constexpr Kernel cells(const char* name) {
  return {name, kCellThreads, 0, Set::kTeacher ? 2 : 1, start_cells<Set>};
}

}  // namespace heteroakd::cuda
