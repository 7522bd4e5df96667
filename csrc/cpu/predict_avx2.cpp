// Evaluation with AVX2 instructions; setup.py compiles this file for them.
#include "predict.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define HAKD_ISA avx2
#include "lanes_avx2.h"
//
#include "predict_kernel.h"

namespace heteroakd::cpu {
const Predictor<float>* predictor_avx2() { return avx2::predictor<float>(); }
}  // namespace heteroakd::cpu
#else
namespace heteroakd::cpu {
const Predictor<float>* predictor_avx2() { return nullptr; }
}  // namespace heteroakd::cpu
#endif
