// Which instruction set the kernels use: the best that this processor has, or HETEROAKD_CPU_ISA.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "pass.h"

namespace heteroakd::cpu {

inline bool processor_has(const std::string& isa) {
#if defined(__x86_64__) || defined(__i386__)
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  }
  if (isa == "avx2") {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
  }
#endif
  return isa == "portable";
}

inline const Kernels<float>* float_kernels(const std::string& isa) {
  const Kernels<float>* kernels = isa == "avx512"   ? kernels_avx512()
                                  : isa == "avx2"     ? kernels_avx2()
                                  : isa == "portable" ? kernels_portable()
                                                      : nullptr;
  return kernels != nullptr && processor_has(isa) ? kernels : nullptr;
}

// Read at every call: a setting of the environment, for tests and measurements.
template <typename T>
const Kernels<T>& choose_kernels() {
  if constexpr (sizeof(T) == 8) {
    return *kernels_double();
  } else {
    const char* wanted = std::getenv("HETEROAKD_CPU_ISA");
    if (wanted != nullptr && *wanted != '\0') {
      const Kernels<float>* kernels = float_kernels(wanted);
      STD_TORCH_CHECK(kernels != nullptr, "HETEROAKD_CPU_ISA: got '", wanted,
                      "', which this processor or this build does not have; expected avx512, avx2 "
                      "or portable, or nothing for the best there is");
      return *kernels;
    }
    static const Kernels<float>* const best = [] {
      for (const char* isa : {"avx512", "avx2"}) {
        if (const Kernels<float>* kernels = float_kernels(isa)) return kernels;
      }
      return kernels_portable();
    }();
    return *best;
  }
}

}  // namespace heteroakd::cpu
