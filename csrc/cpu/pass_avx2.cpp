// The pass with AVX2 instructions; setup.py compiles this file, and no other, for them.
#include "pass.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HAKD_ISA avx2
#include "lanes_avx2.h"
//
#include "kernels.h"

namespace heteroakd::cpu {
const Kernels<float>* kernels_avx2() { return avx2::table<float>(); }
}  // namespace heteroakd::cpu
#else
namespace heteroakd::cpu {
const Kernels<float>* kernels_avx2() { return nullptr; }
}  // namespace heteroakd::cpu
#endif
