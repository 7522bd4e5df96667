// The pass in double, for any processor. A file of its own because loops over lanes take the
// compiler half a minute for each type.
#define HAKD_ISA portable
#include "lanes_portable.h"
//
#include "kernels.h"

namespace heteroakd::cpu {
const Kernels<double>* kernels_double() { return portable::table<double>(); }
}  // namespace heteroakd::cpu
