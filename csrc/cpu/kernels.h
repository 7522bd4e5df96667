// The table of kernels that one translation unit offers; included once per instruction set.
#pragma once

#include "band.h"

namespace heteroakd::cpu::HAKD_ISA {

template <typename T>
void run_band(const Pass<T>& pass, int64_t band, void* workspace, LabelReport& report) {
  Band<T>(pass, workspace, band).run(report);
}

// One plane [h][w] of the gradient: the weighted sum of the terms' gradients, rounded once.
template <typename T>
void combine(const Combine& job, int64_t plane) {
  constexpr int64_t kBlock = 256;
  const int64_t elements = job.height * job.width;
  const int64_t all = job.batch * job.classes * elements;
  const T* gradient = static_cast<const T*>(job.gradient) + plane * elements;
  const int64_t base =
      plane / job.classes * job.out.stride[0] + plane % job.classes * job.out.stride[1];
  T sum[kBlock];
  for (int64_t y = 0; y < job.height; ++y) {
    for (int64_t x0 = 0; x0 < job.width; x0 += kBlock) {
      const int64_t count = job.width - x0 < kBlock ? job.width - x0 : kBlock;
      for (int32_t k = 0; k < job.count; ++k) {
        const T scale = static_cast<T>(job.scale[k]);
        const T* in = gradient + k * all + y * job.width + x0;
        for (int64_t i = 0; i < count; ++i) {
          sum[i] = k == 0 ? scale * in[i] : sum[i] + scale * in[i];
        }
      }
      const int64_t offset = base + y * job.out.stride[2] + x0 * job.out.stride[3];
      if (job.out.stride[3] == 1 || job.width == 1) {
        write_dense<T>(job.out, offset, count, sum);
      } else {
        for (int64_t i = 0; i < count; ++i) {
          write_element<T>(job.out, offset + i * job.out.stride[3], sum[i]);
        }
      }
    }
  }
}

template <typename T>
void elementary(int64_t which, const T* x, T* out, int64_t count) {
  using F = Lanes<T>;
  for (int64_t i = 0; i < count; i += F::N) {
    const F v = F::load(x + i);
    const F y = which == 0   ? exp2(v)
                : which == 1 ? log(v)
                : which == 2 ? log2(v)
                : which == 3 ? log1p(v)
                             : log1p_unit(v);
    y.store(out + i);
  }
}

template <typename T>
const Kernels<T>* table() {
  static constexpr Kernels<T> kTable = {kIsaName,
                                        Lanes<T>::N,
                                        Band<T>::workspace_bytes,
                                        run_band<T>,
                                        combine<T>,
                                        weigh_row<T>,
                                        elementary<T>};
  return &kTable;
}

}  // namespace heteroakd::cpu::HAKD_ISA
