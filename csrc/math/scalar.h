// The operations that the formulas are written in, for one pixel: float and double.
//
// A kernel that holds a vector of pixels brings its own type with the same operations (CPU:
// cpu/lanes_*.h); the formulas of elementary.h and distillation.h then read the same for both.
#pragma once

#include <cmath>

#include "macros.h"

namespace heteroakd {

HAKD_FN float select(bool mask, float a, float b) { return mask ? a : b; }
HAKD_FN double select(bool mask, double a, double b) { return mask ? a : b; }
HAKD_FN bool less(float a, float b) { return a < b; }
HAKD_FN bool less(double a, double b) { return a < b; }
HAKD_FN bool either(bool a, bool b) { return a || b; }
HAKD_FN bool equal(float a, float b) { return a == b; }
HAKD_FN bool equal(double a, double b) { return a == b; }

HAKD_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
HAKD_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }
// c - a * b
HAKD_FN float fnma(float a, float b, float c) { return ::fmaf(-a, b, c); }
HAKD_FN double fnma(double a, double b, double c) { return ::fma(-a, b, c); }
HAKD_FN float abs(float x) { return ::fabsf(x); }
HAKD_FN double abs(double x) { return ::fabs(x); }
// Of max and min a NaN in b comes through, one in a does not.
HAKD_FN float max(float a, float b) { return a > b ? a : b; }
HAKD_FN double max(double a, double b) { return a > b ? a : b; }
HAKD_FN float min(float a, float b) { return a < b ? a : b; }
HAKD_FN double min(double a, double b) { return a < b ? a : b; }

// Double is the plain path: the library's functions, good to an ulp.
HAKD_FN double exp2(double x) { return ::exp2(x); }
HAKD_FN double log2(double x) { return ::log2(x); }
HAKD_FN double log(double x) { return ::log(x); }
HAKD_FN double log1p(double x) { return ::log1p(x); }
HAKD_FN double log1p_unit(double x) { return ::log1p(x); }

}  // namespace heteroakd
