// Evaluation with AVX-512 instructions; setup.py compiles this file for them.
#include "predict.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAKD_ISA avx512
#include "lanes_avx512.h"
//
#include "predict_kernel.h"

namespace heteroakd::cpu {
const Predictor<float>* predictor_avx512() { return avx512::predictor<float>(); }
}  // namespace heteroakd::cpu
#else
namespace heteroakd::cpu {
const Predictor<float>* predictor_avx512() { return nullptr; }
}  // namespace heteroakd::cpu
#endif
