// The operations of ../math/scalar.h that the GPU has instructions for, then the formulas.
//
// float: 2^x, 1/x and log2 are one special-function instruction each (16 lanes per clock and
// multiprocessor), in their flush-to-zero forms: without it each grows by three instructions that
// bring denormals back, which are 2^-94 of what they are added to. Logarithms whose relative
// precision near 1 matters are the polynomials of ../math/elementary.h.
//
// | function    | error                                                  |
// | exp2        | 2 ulp; 0 below 2^-126                                   |
// | reciprocal  | 1 ulp; infinity for 0 and denormals, 0 above 2^126      |
// | fast_log2   | 2^-22 absolute for x in (0, 1]                          |
// | log, log2   | 2 ulp (log2: 1e-7 and an ulp); x normal and > 0, or NaN |
//
// Two-phase lookup finds functions of float by declaration only, hence the order of this file.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/scalar.h"

namespace heteroakd {

HAKD_FN float exp2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}

HAKD_FN float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}
HAKD_FN double reciprocal(double x) { return 1.0 / x; }
HAKD_FN float quotient(float a, float b) { return a * reciprocal(b); }
HAKD_FN double quotient(double a, double b) { return a / b; }

// For sums of m_c log2 m_c, whose rounding costs as much.
HAKD_FN float fast_log2(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::log2f(x);
#endif
}
HAKD_FN double fast_log2(double x) { return ::log2(x); }

// The larger of two; NaN where either is NaN.
HAKD_FN float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}
HAKD_FN double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// Of a share that may have underflowed.
HAKD_FN float log2_of_share(float x) { return fast_log2(max_or_nan(x, 1.17549435e-38f)); }
HAKD_FN double log2_of_share(double x) { return ::log2(max_or_nan(x, 2.2250738585072014e-308)); }

// The smaller of two; NaN where either is NaN.
HAKD_FN float min_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a < b || a != a ? a : b;
#endif
}

// The larger of two; where one is NaN the other.
HAKD_FN float max_number(float a, float b) { return ::fmaxf(a, b); }
HAKD_FN double max_number(double a, double b) { return ::fmax(a, b); }
HAKD_FN float min_number(float a, float b) { return ::fminf(a, b); }
HAKD_FN double min_number(double a, double b) { return ::fmin(a, b); }

HAKD_FN bool is_finite(float x) { return x - x == 0.0f; }
HAKD_FN bool is_finite(double x) { return x - x == 0.0; }

HAKD_FN uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

HAKD_FN float from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// x = 2^n * result of normal x > 0, the result in [sqrt(1/2), sqrt(2)).
HAKD_FN float split_exponent(float x, float& n) {
  const uint32_t bits = bits_of(x);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  n = static_cast<float>(exponent);
  return from_bits(bits - (static_cast<uint32_t>(exponent) << 23));
}

}  // namespace heteroakd

#include "../math/elementary.h"

namespace heteroakd {

// x - x is 0, or NaN where x is.
HAKD_FN float log(float x) { return log_polynomial(x) + (x - x); }
HAKD_FN float log2(float x) {
  float n;
  const float mantissa = split_exponent(x, n);
  return fma(log1p_near_zero(mantissa - 1.0f), static_cast<float>(kLog2E), n) + (x - x);
}
HAKD_FN float log1p_unit(float x) { return log1p_unit_polynomial(x); }

}  // namespace heteroakd

#include "../math/distillation.h"
