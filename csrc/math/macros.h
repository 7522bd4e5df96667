// Marks functions that the CPU and the CUDA kernels share.
//
// On the host they are always inlined: the same header is compiled once per instruction set, and
// a copy left in an object file could be the one that the linker keeps for all of them.
#pragma once

#if defined(_MSC_VER)
#define HAKD_HOST_FN __forceinline
#else
#define HAKD_HOST_FN inline __attribute__((always_inline))
#endif

#if defined(__CUDACC__)
#define HAKD_FN __host__ __device__ __forceinline__
#else
#define HAKD_FN HAKD_HOST_FN
#endif
