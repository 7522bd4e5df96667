// Evaluation for any processor, in float and in double.
#define HAKD_ISA portable
#include "lanes_portable.h"
//
#include "predict_kernel.h"

namespace heteroakd::cpu {
const Predictor<float>* predictor_portable() { return portable::predictor<float>(); }
const Predictor<double>* predictor_double() { return portable::predictor<double>(); }
}  // namespace heteroakd::cpu
