// Marks functions that the CPU and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define HAKD_FN __host__ __device__ __forceinline__
#else
#define HAKD_FN inline
#endif
