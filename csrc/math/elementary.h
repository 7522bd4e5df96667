// Exponential and logarithms in single precision, of known error, from a handful of multiply-adds.
//
// `F` is a float or a vector of floats with the operations of scalar.h and, where said, two more:
//   round_to_integer(x)          nearest integer, |x| < 2^22
//   scale_by_power_of_two(p, n)  p * 2^n for an integer n <= 127 and p in [1/2, 2]; below the
//                                normal range 0 or the denormal
//   split_exponent(x, n)         x = 2^n * returned value, which lies in [sqrt(1/2), sqrt(2))
// Bounds are against the exact function of the float argument, found by trying every float of the
// reduced range (tests/kernels/test_cpu_kernels.py repeats it by sampling). The coefficients are
// minimax fits of our own. log2 is log times log2(e) where a vector type brings none: 1e-7 and two
// roundings.
#pragma once

#include "macros.h"

namespace heteroakd {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Where dividing is not an operation of its own (CUDA), more special overloads take their place.
template <typename F>
HAKD_FN F reciprocal(F x) {
  return F(1) / x;
}
template <typename F>
HAKD_FN F quotient(F a, F b) {
  return a / b;
}

// 2^x for x <= 127, at most 2 ulp; 0 or denormal below -126. NaN gives NaN; x must not be infinite.
template <typename F>
HAKD_FN F exp2_polynomial(F x) {
  const F n = round_to_integer(x);
  const F r = x - n;
  F p = F(0.00015353361959569156f);
  p = fma(p, r, F(0.0013398873852565885f));
  p = fma(p, r, F(0.00961843691766262f));
  p = fma(p, r, F(0.055503323674201965f));
  p = fma(p, r, F(0.24022647738456726f));
  p = fma(p, r, F(0.6931471824645996f));
  p = fma(p, r, F(1.0f));
  return scale_by_power_of_two(p, n);
}

// ln(1 + t) for 1 + t in [sqrt(1/2), sqrt(2)).
template <typename F>
HAKD_FN F log1p_near_zero(F t) {
  F p = F(-0.07634497433900833f);
  p = fma(p, t, F(0.1276157796382904f));
  p = fma(p, t, F(-0.13160182535648346f));
  p = fma(p, t, F(0.14201757311820984f));
  p = fma(p, t, F(-0.16623356938362122f));
  p = fma(p, t, F(0.20001226663589478f));
  p = fma(p, t, F(-0.2500081956386566f));
  p = fma(p, t, F(0.3333333134651184f));
  const F square = t * t;
  return t + fma(square, F(-0.5f), square * t * p);
}

// ln x for normal x > 0, at most 2 ulp. NaN gives NaN.
template <typename F>
HAKD_FN F log_polynomial(F x) {
  F n;
  const F mantissa = split_exponent(x, n);
  const F y = log1p_near_zero(mantissa - F(1.0f));
  // ln 2 in two parts: n * the first is exact
  return fma(n, F(0.693359375f), fma(n, F(-2.12194440e-4f), y));
}

// ln(1 + x) for x >= 0, at most 3 ulp; the sum's rounding is given back.
template <typename F>
HAKD_FN F log1p_polynomial(F x) {
  const F u = x + F(1.0f);
  const F lost = x - (u - F(1.0f));
  return log_polynomial(u) + lost / u;
}

// ln(1 + x) for x in [0, 1], at most 3 ulp: log1p without a logarithm, for sums over classes.
template <typename F>
HAKD_FN F log1p_unit_polynomial(F x) {
  F p = F(-0.003242799313738942f);
  p = fma(p, x, F(0.0198456309735775f));
  p = fma(p, x, F(-0.05694785714149475f));
  p = fma(p, x, F(0.10602375864982605f));
  p = fma(p, x, F(-0.1530475914478302f));
  p = fma(p, x, F(0.19675610959529877f));
  p = fma(p, x, F(-0.24954058229923248f));
  p = fma(p, x, F(0.33329951763153076f));
  p = fma(p, x, F(-0.4999990165233612f));
  return fma(p * x, x, x);
}

}  // namespace heteroakd
