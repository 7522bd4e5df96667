#include "cells.cuh"

namespace heteroakd::cuda {

const Kernel& cells_ce() {
  static constexpr Kernel kKernel = cells<Fixed<true, false, false>>("cells: ce");
  return kKernel;
}

}  // namespace heteroakd::cuda
