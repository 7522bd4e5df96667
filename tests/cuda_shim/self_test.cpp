// Kernels that are right, and kernels with one mistake each that the shim must find.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <string>

namespace {

constexpr int kThreads = 256;

struct Job {
  const float* in;
  float* out;
  int count;
  int mode;
};

__forceinline__ __device__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  return value;
}

// out[block] = the sum of a block's part; mode 1 forgets the barrier.
__global__ void __launch_bounds__(kThreads) block_sum(__grid_constant__ const Job job) {
  auto* partial = static_cast<float*>(hakd_shim::shared_memory());
  const unsigned int i = blockIdx.x * kThreads + threadIdx.x;
  const float sum = warp_sum(i < static_cast<unsigned int>(job.count) ? __ldg(job.in + i) : 0.0f);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (job.mode == 0) __syncthreads();
  if (threadIdx.x < 32) {
    const float total = warp_sum(threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) job.out[blockIdx.x] = total;
  }
}

// Every warp operation: out[0] counts the lanes that got a wrong answer.
__global__ void warp_operations(float* out) {
  const unsigned int all = 0xffffffffu;
  const int lane = static_cast<int>(threadIdx.x % 32);
  int wrong = 0;
  wrong += __shfl_sync(all, lane, 5) != 5;
  wrong += __shfl_sync(all, lane, 5, 4) != (lane & ~3) + 1;
  wrong += __shfl_up_sync(all, lane, 3) != (lane >= 3 ? lane - 3 : lane);
  wrong += __shfl_up_sync(all, lane, 1, 8) != (lane % 8 != 0 ? lane - 1 : lane);
  wrong += __shfl_down_sync(all, lane, 3) != (lane + 3 < 32 ? lane + 3 : lane);
  wrong += __shfl_down_sync(all, lane, 1, 8) != (lane % 8 != 7 ? lane + 1 : lane);
  wrong += __shfl_xor_sync(all, lane, 17) != (lane ^ 17);
  wrong += __shfl_xor_sync(all, 0.5 + lane, 2) != 0.5 + (lane ^ 2);
  wrong += __shfl_xor_sync(all, ~0ull - static_cast<unsigned>(lane), 1) !=
           ~0ull - static_cast<unsigned>(lane ^ 1);
  wrong += __ballot_sync(all, lane % 2) != 0xaaaaaaaau;
  wrong += __any_sync(all, lane == 7) != 1 || __any_sync(all, 0) != 0;
  wrong += __all_sync(all, lane != 7) != 0 || __all_sync(all, 2) != 1;
  // two halves on their own, one of which does more
  const unsigned int half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = lane;
  for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(half, sum, offset, 16);
  wrong += sum != (lane < 16 ? 120 : 376);
  if (lane < 16) wrong += __ballot_sync(half, 1) != half;
  __syncwarp();
  // a lane that takes no part
  if (lane != 9) {
    const float got = __shfl_sync(0xfffffdffu, 1.0f, 9);
    wrong += got == got;
  }
  wrong += __syncthreads_or(threadIdx.x == 40) != 1 || __syncthreads_or(0) != 0;
  wrong += __syncthreads_and(threadIdx.x != 40) != 0 || __syncthreads_and(1) != 1;
  wrong += __syncthreads_count(threadIdx.x % 4 == 0) != static_cast<int>(blockDim.x) / 4;
  if (threadIdx.x >= 40) return;  // and the barriers go on without it
  __syncthreads();
  auto* count = static_cast<int*>(hakd_shim::shared_memory());
  if (threadIdx.x == 0) *count = 0;
  __syncthreads();
  atomicAdd(count, wrong);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = static_cast<float>(*count);
}

// out[i] = the position in which thread i, or block i, came
__global__ void order(float* out, int* next) {
  out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(atomicAdd(next, 1));
}

__global__ void mistake(const Job job) {
  const unsigned int t = threadIdx.x;
  auto* memory = static_cast<float*>(hakd_shim::shared_memory());
  const std::string kept(100, 'x');  // on the stack of a thread that is abandoned
  switch (job.mode) {
    case 0: if (t < 40) __syncthreads(); else __syncwarp(); break;
    case 1:
      if (t % 2 != 0) __syncthreads();
      else __syncthreads();
      break;
    case 2: if (t != 3) __syncwarp(); break;
    case 3: if (t != 3) __syncwarp(); else __syncthreads(); break;
    case 4: __syncwarp(t == 3 ? 0xfffffff7u : 0xffffffffu); break;
    case 5: if (t != 3) __syncwarp(); else __shfl_sync(0xffffffffu, 1, 0); break;
    case 6: if (t == 3) memory[job.count] = 1.0f; break;
    case 7: if (t == 3) memory[-1] = 1.0f; break;
    case 8: if (t == 3) __trap(); else __syncthreads(); break;
    case 9: if (t != 3) __syncwarp(); else __syncwarp(0x0000ffffu); break;
    case 10: job.out[0] = job.in[job.count]; break;  // for the address sanitizer
    case 11: job.out[0] = memory[job.count]; break;
    default: break;
  }
}

__global__ void barriers(int count) {
  for (int i = 0; i < count; ++i) __syncthreads();
}
__global__ void shuffles(float* out, int count) {
  float value = 1.0f;
  for (int i = 0; i < count; ++i) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

template <typename... Parameters, typename... Arguments>
std::string run(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                size_t bytes, Arguments... arguments) {
  try {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = bytes;
    hakd_shim::name_next_launch(name);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
  } catch (const std::exception& exception) {
    return exception.what();
  }
}

}  // namespace

// What went wrong, "" for nothing. The last error of the runtime is left as it is.
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void run_kernel(const char* which, const float* in, float* out, int count, int mode,
                       int blocks, int threads, size_t bytes, char* message, size_t length) {
  const std::string name = which;
  const Job job{in, out, count, mode};
  const auto grid = static_cast<unsigned int>(blocks), block = static_cast<unsigned int>(threads);
  int next = 0;
  std::string said = "no such kernel";
  if (name == "block_sum") said = run(which, block_sum, grid, block, bytes, job);
  if (name == "warp_operations") said = run(which, warp_operations, grid, block, bytes, out);
  if (name == "order") said = run(which, order, grid, block, bytes, out, &next);
  if (name == "mistake") said = run(which, mistake, grid, block, bytes, job);
  if (name == "barriers") said = run(which, barriers, grid, block, bytes, count);
  if (name == "shuffles") said = run(which, shuffles, grid, block, bytes, out, count);
  std::snprintf(message, length, "%s", said.c_str());
}

EXPORT int allow_shared_memory(int bytes) {
  return cudaFuncSetAttribute(mistake, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}
EXPORT int take_last_error() { return cudaGetLastError(); }
