#include "cells.cuh"

namespace heteroakd::cuda {

const Kernel& cells_ce_kd() {
  static constexpr Kernel kKernel = cells<CeKd>("cells: ce, kd");
  return kKernel;
}

}  // namespace heteroakd::cuda
