#include "cells.cuh"

namespace heteroakd::cuda {

const Kernel& cells_ce_hetero() {
  static constexpr Kernel kKernel = cells<CeHetero>("cells: ce, hetero");
  return kKernel;
}

}  // namespace heteroakd::cuda
