// Runs CUDA kernels' own source on the CPU, for tests: g++ finds this header as <cuda_runtime.h>.
//
// The threads of a block are fibres on one OS thread; blocks run one after another. A thread runs
// until it waits for others (a barrier, a shuffle, a vote), so what two barriers enclose runs in an
// order that hardware could have chosen, too. HAKD_SHIM_SEED chooses the order of threads, warps
// and blocks; 0 is the natural one.
//
// Honoured, and an exception (std::runtime_error, from the launch) where it is violated:
// - masks of warp operations: each lane named must arrive with the same operation and mask, and
//   must name itself. One that has returned does not count (hardware would let it pass).
// - __syncthreads is reached by all threads that have not returned, at the same source line
// - shared memory is 0xff (NaN) when a block starts, and nothing is written beyond its ends
// - a shuffle from a lane that takes no part gives 0xff (NaN)
// Honoured by error codes: the limits of grids, blocks and shared memory, and that more than 48 KiB
// are asked for with cudaFuncSetAttribute.
//
// NOT honoured: a data race goes unseen where no seed's order makes it matter; reads beyond shared
// memory (they give NaN; the address sanitizer sees them); writes more than 1 KiB beyond it; blocks
// at the same time, so a block that waits for another hangs; streams, clusters, launch attributes;
// the memory model (fences are nothing, asynchronous copies are done at once); registers, local
// memory, bank conflicts, any cost; approximate functions and inline PTX; another rounding: the
// host's library and compiler compute. After an error, destructors of a block's threads do not run.
// Static __shared__ arrays, float atomics and __activemask do not compile.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>  // before __noinline__ is a macro: libstdc++ uses it as the name of an attribute
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))

// --- types ---------------------------------------------------------------------------------------

#define HAKD_SHIM_VECTORS(T, name, a2, a4)                                       \
  struct alignas(a2) name##2 { T x, y; };                                        \
  struct name##3 { T x, y, z; };                                                 \
  struct alignas(a4) name##4 { T x, y, z, w; };                                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                     \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }             \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
HAKD_SHIM_VECTORS(signed char, char, 2, 4)
HAKD_SHIM_VECTORS(unsigned char, uchar, 2, 4)
HAKD_SHIM_VECTORS(short, short, 4, 8)
HAKD_SHIM_VECTORS(unsigned short, ushort, 4, 8)
HAKD_SHIM_VECTORS(int, int, 8, 16)
HAKD_SHIM_VECTORS(unsigned int, uint, 8, 16)
HAKD_SHIM_VECTORS(float, float, 8, 16)
HAKD_SHIM_VECTORS(double, double, 16, 16)
HAKD_SHIM_VECTORS(long long, longlong, 16, 16)
HAKD_SHIM_VECTORS(unsigned long long, ulonglong, 16, 16)
#undef HAKD_SHIM_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1)
      : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801,
};
using cudaError = cudaError_t;
using cudaStream_t = struct CUstream_st*;

// --- the machine (shim.cpp) ----------------------------------------------------------------------

namespace hakd_shim {

enum class Op { kBarrier, kBarrierOr, kBarrierAnd, kBarrierCount,  // of the block
                kSyncWarp, kAny, kAll, kBallot, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor };

void* shared_memory();
// For error messages; forgotten after the launch.
void name_next_launch(const char* name);
[[noreturn]] void fail(const char* what);
uint64_t barrier(Op op, bool predicate, int line);
// The bits that the lane gets; size, of the value, and width must agree between lanes.
uint64_t warp_operation(Op op, unsigned int mask, uint64_t bits, int operand, int width, int size,
                        int line);
cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   const std::function<void()>& body);
cudaError_t allow_shared_memory(const void* kernel, int bytes);
cudaError_t remember(cudaError_t error);
int device_attribute(int attribute);  // -1: unknown

template <typename T>
T shuffle(Op op, unsigned int mask, T value, int operand, int width, int line) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take int, unsigned, (unsigned) long long, float and double");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_operation(op, mask, bits, operand, width, sizeof(T), line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace hakd_shim

// Of the thread that runs. Set at every switch, so not const; a kernel must not write them.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

// --- what threads say to each other --------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  hakd_shim::barrier(hakd_shim::Op::kBarrier, false, line);
}
inline int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return hakd_shim::barrier(hakd_shim::Op::kBarrierOr, predicate != 0, line) != 0;
}
inline int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return hakd_shim::barrier(hakd_shim::Op::kBarrierAnd, predicate != 0, line) != 0;
}
inline int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return static_cast<int>(
      hakd_shim::barrier(hakd_shim::Op::kBarrierCount, predicate != 0, line));
}

inline void __syncwarp(unsigned int mask = 0xffffffffu, int line = __builtin_LINE()) {
  hakd_shim::warp_operation(hakd_shim::Op::kSyncWarp, mask, 0, 0, 32, 0, line);
}
inline int __any_sync(unsigned int mask, int predicate, int line = __builtin_LINE()) {
  return hakd_shim::warp_operation(hakd_shim::Op::kAny, mask, predicate != 0, 0, 32, 0, line) != 0;
}
inline int __all_sync(unsigned int mask, int predicate, int line = __builtin_LINE()) {
  return hakd_shim::warp_operation(hakd_shim::Op::kAll, mask, predicate != 0, 0, 32, 0, line) != 0;
}
inline unsigned int __ballot_sync(unsigned int mask, int predicate, int line = __builtin_LINE()) {
  return static_cast<unsigned int>(hakd_shim::warp_operation(hakd_shim::Op::kBallot, mask,
                                                             predicate != 0, 0, 32, 0, line));
}

#define HAKD_SHIM_SHUFFLE(name, operand_type, op)                                              \
  template <typename T>                                                                        \
  T name(unsigned int mask, T value, operand_type operand, int width = 32,                     \
         int line = __builtin_LINE()) {                                                        \
    return hakd_shim::shuffle(hakd_shim::Op::op, mask, value, static_cast<int>(operand), width, \
                              line);                                                           \
  }
HAKD_SHIM_SHUFFLE(__shfl_sync, int, kShuffle)
HAKD_SHIM_SHUFFLE(__shfl_up_sync, unsigned int, kShuffleUp)
HAKD_SHIM_SHUFFLE(__shfl_down_sync, unsigned int, kShuffleDown)
HAKD_SHIM_SHUFFLE(__shfl_xor_sync, int, kShuffleXor)
#undef HAKD_SHIM_SHUFFLE

// One thread runs at a time, and switches elsewhere: plain arithmetic is atomic.
#define HAKD_SHIM_ATOMICS(T)                                                             \
  inline T atomicAdd(T* p, T v) { T old = *p; *p = static_cast<T>(static_cast<uint64_t>(old) + \
                                              static_cast<uint64_t>(v)); return old; }   \
  inline T atomicMin(T* p, T v) { T old = *p; *p = v < old ? v : old; return old; }      \
  inline T atomicMax(T* p, T v) { T old = *p; *p = v > old ? v : old; return old; }      \
  inline T atomicExch(T* p, T v) { T old = *p; *p = v; return old; }                     \
  inline T atomicOr(T* p, T v) { T old = *p; *p = old | v; return old; }                 \
  inline T atomicAnd(T* p, T v) { T old = *p; *p = old & v; return old; }
HAKD_SHIM_ATOMICS(int)
HAKD_SHIM_ATOMICS(unsigned int)
HAKD_SHIM_ATOMICS(unsigned long long)
#undef HAKD_SHIM_ATOMICS
// A sum of floats depends on its order: such a kernel would not be deterministic.
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;

inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { hakd_shim::fail("__trap()"); }

// --- loads, bits and arithmetic ------------------------------------------------------------------

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> T __ldcg(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T v) { *p = v; }
template <typename T> void __stcg(T* p, T v) { *p = v; }

inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }
inline unsigned int __float_as_uint(float x) { return hakd_shim::bit_cast<unsigned int>(x); }
inline int __float_as_int(float x) { return hakd_shim::bit_cast<int>(x); }
inline float __uint_as_float(unsigned int x) { return hakd_shim::bit_cast<float>(x); }
inline float __int_as_float(int x) { return hakd_shim::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return hakd_shim::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return hakd_shim::bit_cast<double>(x); }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

#define HAKD_SHIM_MIN_MAX(T)                           \
  inline T min(T a, T b) { return b < a ? b : a; }     \
  inline T max(T a, T b) { return a < b ? b : a; }
HAKD_SHIM_MIN_MAX(int)
HAKD_SHIM_MIN_MAX(unsigned int)
HAKD_SHIM_MIN_MAX(long)
HAKD_SHIM_MIN_MAX(unsigned long)
HAKD_SHIM_MIN_MAX(long long)
HAKD_SHIM_MIN_MAX(unsigned long long)
#undef HAKD_SHIM_MIN_MAX
// of a number and NaN, the number, as CUDA's
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// --- host ----------------------------------------------------------------------------------------

struct cudaLaunchAttribute;  // none is honoured
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned int numAttrs;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (config->numAttrs != 0) return hakd_shim::remember(cudaErrorNotSupported);
  // every thread gets its own copy of parameters that are passed by value
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  return hakd_shim::launch(reinterpret_cast<const void*>(kernel), config->gridDim,
                           config->blockDim, config->dynamicSmemBytes,
                           [&] { std::apply(kernel, values); });
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
                         cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, maxDynamicSharedSizeBytes;
};
// The numbers are CUDA's.
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute which,
                                 int value) {
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return hakd_shim::allow_shared_memory(reinterpret_cast<const void*>(kernel), value);
}
template <typename... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, void (*)(Parameters...)) {
  *out = {0, 0, 0, 1024, 32, 48 * 1024};
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int /*device*/) {
  *value = hakd_shim::device_attribute(which);
  return hakd_shim::remember(*value < 0 ? cudaErrorInvalidValue : cudaSuccess);
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...),
                                                          int threads, size_t shared_bytes) {
  const auto by_threads = static_cast<size_t>(2048 / threads);
  const size_t by_memory = 228 * 1024 / (shared_bytes + 1024);
  const size_t most = by_threads < by_memory ? by_threads : by_memory;
  *blocks = static_cast<int>(most < 32 ? most : 32);
  return cudaSuccess;
}

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);

inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost,
                      cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  if (bytes != 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}
