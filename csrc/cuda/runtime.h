// The current stream and error checks, without linking libtorch_cuda.
//
// One library serves CPU-only and CUDA builds of torch: the one libtorch_cuda symbol it needs is
// weak, so that it loads where there is none (and is never called there, for want of a tensor).
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace heteroakd::cuda {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(int32_t device_index) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0,
                  "the current CUDA stream could not be read");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace heteroakd::cuda
