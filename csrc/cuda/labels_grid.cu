#include "kernels.h"
#include "label_kernel.h"

namespace heteroakd::cuda {
namespace {

template <class Set, int S>
void start(const Pass& pass, dim3 grid, int64_t, cudaStream_t stream, const char* name) {
  const auto kernel = pass.gradients ? label_kernel<Set, S, true> : label_kernel<Set, S, false>;
  constexpr int kModels = Set::kTeacher ? 2 : 1;
  const size_t bytes = static_cast<size_t>(pass.classes) * kModels * sizeof(Pixels<S>) * kLabelThreads;
  launch(kernel, grid, dim3(kLabelThreads), bytes, stream, name, pass);
}

template <class Set, int S>
constexpr Kernel on_labels(const char* name) {
  return {name, kLabelThreads, S, 0, start<Set, S>};
}

}  // namespace

const Kernel* labels_grid(int64_t classes, bool teacher) {
  static constexpr Kernel kKernels[2][2] = {
      {on_labels<Ce, 4>("label grid: ce"),
       on_labels<CeKdHetero, 4>("label grid: ce, kd, hetero")},
      {on_labels<Ce, 1>("label grid: ce, many classes"),
       on_labels<CeKdHetero, 1>("label grid: ce, kd, hetero, many classes")}};
  const int64_t models = teacher ? 2 : 1;
  const int64_t bytes = classes * models * static_cast<int64_t>(sizeof(float)) * kLabelThreads;
  // Four pixels a thread while that leaves room for eight warps on a multiprocessor; one as long as
  // a block fits what any device of these architectures has (99 KiB).
  if (bytes * 4 <= 56 * 1024) return &kKernels[0][teacher ? 1 : 0];
  return bytes <= 99 * 1024 ? &kKernels[1][teacher ? 1 : 0] : nullptr;
}

}  // namespace heteroakd::cuda
