#include "cells.cuh"

namespace heteroakd::cuda {

const Kernel& cells_ce_kd_hetero() {
  static constexpr Kernel kKernel = cells<CeKdHetero>("cells: ce, kd, hetero");
  return kKernel;
}

}  // namespace heteroakd::cuda
