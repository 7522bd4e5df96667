// The pass for any processor.
#define HAKD_ISA portable
#include "lanes_portable.h"
//
#include "kernels.h"

namespace heteroakd::cpu {
const Kernels<float>* kernels_portable() { return portable::table<float>(); }
}  // namespace heteroakd::cpu
