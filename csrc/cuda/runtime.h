// Devices, streams, launches and error checks, without linking libtorch_cuda.
//
// HAKD_CUDA_SHIM: tests compile these sources for the CPU (tests/cuda_shim); there is one device
// then, without streams, and its tensors are CPU tensors.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <utility>

// What the operators are registered as: HAKD_REGISTER(m) { m.impl(...); }
#ifndef HAKD_LIBRARY
#define HAKD_LIBRARY heteroakd_fast_c
#endif
#ifndef HAKD_CUDA_KEY
#define HAKD_CUDA_KEY CUDA
#endif
// Torch's macro pastes its arguments as they stand: one more level expands them first.
#define HAKD_TORCH_LIBRARY_IMPL(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define HAKD_REGISTER(m) HAKD_TORCH_LIBRARY_IMPL(HAKD_LIBRARY, HAKD_CUDA_KEY, m)

// The dynamic shared memory of a block, in a kernel: HAKD_SHARED_MEMORY(float4, memory);
#ifdef HAKD_CUDA_SHIM
#define HAKD_SHARED_MEMORY(type, name) \
  type* const name = static_cast<type*>(hakd_shim::shared_memory())
#else
#define HAKD_SHARED_MEMORY(type, name) extern __shared__ type name[]
#endif

namespace heteroakd::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, not once more at the next launch
  STD_TORCH_CHECK(false, what, ": ", cudaGetErrorString(error));
}

#ifdef HAKD_CUDA_SHIM
struct OnDevice {
  explicit OnDevice(int32_t) {}
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }
#else
// The current device is this one while it lives.
using OnDevice = torch::stable::accelerator::DeviceGuard;

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
#endif

// Launches a kernel, with shared_bytes of dynamic shared memory; `what` begins the error message.
// More than 48 KiB have to be asked for; how much there is depends on the device
// (cudaDevAttrMaxSharedMemoryPerBlockOptin).
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const char* what, Arguments&&... arguments) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          what);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
#ifdef HAKD_CUDA_SHIM
  hakd_shim::name_next_launch(what);
#endif
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), what);
}

}  // namespace heteroakd::cuda
