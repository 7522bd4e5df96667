// The current stream and error checks, without linking libtorch_cuda.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace heteroakd::cuda {

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// One library serves torch with and without CUDA, so it must not link libtorch_cuda. Where there is
// a CUDA tensor that library is loaded, but locally: its symbols are found through its handle only.
inline cudaStream_t current_stream(int32_t device_index) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(getter != nullptr, "libtorch_cuda.so is not loaded: a torch without CUDA?");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(device_index, &stream) == 0, "the current CUDA stream could not be read");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace heteroakd::cuda
