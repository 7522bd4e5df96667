// The pass with AVX-512 instructions; setup.py compiles this file, and no other, for them.
#include "pass.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAKD_ISA avx512
#include "lanes_avx512.h"
//
#include "kernels.h"

namespace heteroakd::cpu {
const Kernels<float>* kernels_avx512() { return avx512::table<float>(); }
}  // namespace heteroakd::cpu
#else
namespace heteroakd::cpu {
const Kernels<float>* kernels_avx512() { return nullptr; }
}  // namespace heteroakd::cpu
#endif
