// The pass in double, for any processor. A file of its own, to be compiled beside the one in float,
// which takes far longer.
#define HAKD_ISA portable
#include "lanes_portable.h"
//
#include "kernels.h"

namespace heteroakd::cpu {
const Kernels<double>* kernels_double() { return portable::table<double>(); }
}  // namespace heteroakd::cpu
