// Sixteen pixels in a register of AVX-512 (F, DQ, BW, VL). What each operation means:
// lanes_portable.h.
#pragma once

// GCC 12's own header warns about its _mm512_undefined_ps().
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

#include "../math/elementary.h"
#include "../math/scalar.h"

namespace heteroakd::cpu::HAKD_ISA {

constexpr const char* kIsaName = "avx512";

template <typename T>
struct Mask;
template <typename T>
struct Labels;
template <typename T>
struct Lanes;

template <>
struct Mask<float> {
  __mmask16 v;
};

template <>
struct Labels<float> {
  __m512i v;
};

template <>
struct Lanes<float> {
  using Scalar = float;
  static constexpr int N = 16;
  __m512 v;

  Lanes() = default;
  HAKD_FN Lanes(__m512 x) : v(x) {}                 // NOLINT
  HAKD_FN Lanes(float x) : v(_mm512_set1_ps(x)) {}  // NOLINT

  HAKD_FN static Lanes load(const float* p) { return _mm512_loadu_ps(p); }
  HAKD_FN static Lanes load(const float* p, Mask<float> m) {
    return _mm512_maskz_loadu_ps(m.v, p);
  }
  HAKD_FN void store(float* p) const { _mm512_storeu_ps(p, v); }
  HAKD_FN void stream(float* p) const { _mm512_stream_ps(p, v); }
  HAKD_FN void store(float* p, int count) const {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), v);
  }
};

using F = Lanes<float>;
using M = Mask<float>;

HAKD_FN F operator+(F a, F b) { return _mm512_add_ps(a.v, b.v); }
HAKD_FN F operator-(F a, F b) { return _mm512_sub_ps(a.v, b.v); }
HAKD_FN F operator*(F a, F b) { return _mm512_mul_ps(a.v, b.v); }
HAKD_FN F operator/(F a, F b) { return _mm512_div_ps(a.v, b.v); }
HAKD_FN F fma(F a, F b, F c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
HAKD_FN F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
HAKD_FN F max(F a, F b) { return _mm512_max_ps(a.v, b.v); }
HAKD_FN F min(F a, F b) { return _mm512_min_ps(a.v, b.v); }
HAKD_FN F abs(F a) { return _mm512_abs_ps(a.v); }

HAKD_FN M less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
HAKD_FN M equal(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
HAKD_FN F select(M m, F a, F b) { return _mm512_mask_blend_ps(m.v, b.v, a.v); }
HAKD_FN M not_less(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }
HAKD_FN M either(M a, M b) { return {static_cast<__mmask16>(a.v | b.v)}; }
HAKD_FN bool all(M m) { return m.v == 0xffff; }
HAKD_FN bool any(M m) { return m.v != 0; }

template <typename T>
HAKD_FN Labels<T> load_labels(const int32_t* p) {
  return {_mm512_loadu_si512(p)};
}
HAKD_FN M is_valid(Labels<float> labels) {
  return {_mm512_cmpge_epi32_mask(labels.v, _mm512_setzero_si512())};
}
HAKD_FN M is_labelled(Labels<float> labels, int64_t classes) {
  return {_mm512_cmplt_epu32_mask(labels.v, _mm512_set1_epi32(static_cast<int32_t>(classes)))};
}
HAKD_FN M is_class(Labels<float> labels, int32_t c) {
  return {_mm512_cmpeq_epi32_mask(labels.v, _mm512_set1_epi32(c))};
}
HAKD_FN F gather_tile(const float* tile, const int32_t* labels) {
  const __m512i c = _mm512_max_epi32(_mm512_loadu_si512(labels), _mm512_setzero_si512());
  const __m512i lane =
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_i32gather_ps(_mm512_add_epi32(_mm512_slli_epi32(c, 4), lane), tile, 4);
}
HAKD_FN F add_unless(M m, F acc, F x) {
  return _mm512_mask_add_ps(acc.v, static_cast<__mmask16>(~m.v), acc.v, x.v);
}

HAKD_FN F permute_two(const float* row, int32_t base, const int32_t* index) {
  const __m512i i = _mm512_sub_epi32(_mm512_loadu_si512(index), _mm512_set1_epi32(base));
  return _mm512_permutex2var_ps(_mm512_loadu_ps(row + base), i, _mm512_loadu_ps(row + base + 16));
}

HAKD_FN F shift_up(F a) {
  return _mm512_castsi512_ps(
      _mm512_alignr_epi32(_mm512_castps_si512(a.v), _mm512_setzero_si512(), 15));
}
HAKD_FN float last_lane(F a) {
  return _mm_cvtss_f32(_mm_permute_ps(_mm512_extractf32x4_ps(a.v, 3), 0xff));
}

HAKD_FN void add_to(double* sums, F a) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

HAKD_FN F split_exponent(F x, F& n) {
  // [3/4, 3/2) from the hardware, moved to [sqrt(1/2), sqrt(2)) as the polynomial wants it
  F mantissa = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  n = _mm512_getexp_ps(x.v);
  const __mmask16 large = _mm512_cmp_ps_mask(mantissa.v, _mm512_set1_ps(1.41421356f), _CMP_GE_OQ);
  n.v = _mm512_mask_add_ps(n.v, large, n.v, _mm512_set1_ps(1.0f));
  return _mm512_mask_mul_ps(mantissa.v, large, mantissa.v, _mm512_set1_ps(0.5f));
}

// 2^x, at most 2 ulp: x = n + r with n a multiple of 1/32; 2^(fraction of n) from a table of two
// registers, a quadratic for 2^r, |r| <= 1/64, and the integer part of n by scalef. Fewer of the
// multiply-adds that everything else here is short of than the polynomial. Same range as
// exp2_polynomial.
HAKD_FN F exp2(F x) {
  alignas(64) static constexpr float kTable[32] = {
      1.0f,          1.021897149f,  1.044273782f,  1.067140401f,  1.090507733f,  1.114386743f,
      1.138788635f,  1.163724859f,  1.189207115f,  1.215247360f,  1.241857812f,  1.269050957f,
      1.296839555f,  1.325236643f,  1.354255547f,  1.383909882f,  1.414213562f,  1.445180807f,
      1.476826146f,  1.509164428f,  1.542210825f,  1.575980845f,  1.610490332f,  1.645755478f,
      1.681792831f,  1.718619298f,  1.756252160f,  1.794709074f,  1.834008086f,  1.874167634f,
      1.915206561f,  1.957144124f};
  const F magic(12582912.0f / 32.0f);
  const F t = x + magic;
  const F n = t - magic;
  const F r = x - n;
  const F scale = _mm512_permutex2var_ps(_mm512_load_ps(kTable), _mm512_castps_si512(t.v),
                                         _mm512_load_ps(kTable + 16));
  const F p = fma(r, F(0.24022871255874634f), F(0.6931573152542114f));
  return _mm512_scalef_ps(fma(p * r, scale, scale).v, n.v);
}

// log2 x for x > 0, within 1e-7 + one rounding of the result, and exact for powers of 2: mantissa
// times a table of reciprocals, a quartic for the rest. The table's first and last reciprocal are
// powers of 2 themselves, so that the logarithm of 1 is 0 from both sides. For sums of m log m,
// where m weighs the error.
HAKD_FN F log2(F x) {
  alignas(64) static constexpr float kReciprocal[16] = {
      1.0f,         0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f,
      0.711111128f, 0.680851042f, 0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f,
      0.561403513f, 0.542372882f, 0.524590135f, 0.5f};
  alignas(64) static constexpr float kLog2[16] = {
      0.0f,         0.129283011f, 0.209453329f, 0.285402209f, 0.357552052f, 0.426264763f,
      0.491853058f, 0.554588914f, 0.614709854f, 0.67242527f,  0.727920413f, 0.781359732f,
      0.832889974f, 0.882643044f, 0.930737436f, 1.0f};
  const F mantissa = _mm512_getmant_ps(x.v, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero);
  const __m512i j = _mm512_srli_epi32(_mm512_castps_si512(x.v), 19);
  const F r = fma(mantissa, F(_mm512_permutexvar_ps(j, _mm512_load_ps(kReciprocal))), F(-1.0f));
  const F base = F(_mm512_permutexvar_ps(j, _mm512_load_ps(kLog2))) + F(_mm512_getexp_ps(x.v));
  F p = fma(r, F(-0.3406268358230591f), F(0.4810091257095337f));
  p = fma(p, r, F(-0.7213671803474426f));
  p = fma(p, r, F(1.4426950216293335f));
  return fma(p, r, base);
}
HAKD_FN F log(F x) { return log_polynomial(x); }
HAKD_FN F log1p(F x) { return log1p_polynomial(x); }
HAKD_FN F log1p_unit(F x) { return log1p_unit_polynomial(x); }

// Sixteen logits of 16 bits, widened; and a row of results, rounded to nearest even.
HAKD_FN F from_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
HAKD_FN F from_bfloat16(const uint16_t* p) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
HAKD_FN void to_half(uint16_t* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Orders what was streamed before what follows.
HAKD_FN void fence() { _mm_sfence(); }

}  // namespace heteroakd::cpu::HAKD_ISA
