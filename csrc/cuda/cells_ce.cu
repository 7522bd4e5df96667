#include "cells.cuh"

namespace heteroakd::cuda {

const Kernel& cells_ce() {
  static constexpr Kernel kKernel = cells<Ce>("cells: ce");
  return kKernel;
}

}  // namespace heteroakd::cuda
