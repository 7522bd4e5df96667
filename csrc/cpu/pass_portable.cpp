// The pass for any processor, and in double.
#define HAKD_ISA portable
#include "lanes_portable.h"
//
#include "kernels.h"

namespace heteroakd::cpu {
const Kernels<float>* kernels_portable() { return portable::table<float>(); }
const Kernels<double>* kernels_double() { return portable::table<double>(); }
}  // namespace heteroakd::cpu
