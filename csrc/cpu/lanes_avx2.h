// Eight pixels in a register of AVX2, with FMA and F16C. What each operation means:
// lanes_portable.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "../math/elementary.h"
#include "../math/scalar.h"

namespace heteroakd::cpu::HAKD_ISA {

constexpr const char* kIsaName = "avx2";

template <typename T>
struct Mask;
template <typename T>
struct Labels;
template <typename T>
struct Lanes;

template <>
struct Mask<float> {
  __m256 v;
};

template <>
struct Labels<float> {
  __m256i v;
};

template <>
struct Lanes<float> {
  using Scalar = float;
  static constexpr int N = 8;
  __m256 v;

  Lanes() = default;
  HAKD_FN Lanes(__m256 x) : v(x) {}                 // NOLINT
  HAKD_FN Lanes(float x) : v(_mm256_set1_ps(x)) {}  // NOLINT

  HAKD_FN static Lanes load(const float* p) { return _mm256_loadu_ps(p); }
  HAKD_FN static Lanes load(const float* p, Mask<float> m) {
    return _mm256_maskload_ps(p, _mm256_castps_si256(m.v));
  }
  HAKD_FN void store(float* p) const { _mm256_storeu_ps(p, v); }
  HAKD_FN void stream(float* p) const { _mm256_stream_ps(p, v); }
  HAKD_FN void store(float* p, int count) const {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane), v);
  }
};

using F = Lanes<float>;
using M = Mask<float>;

HAKD_FN F operator+(F a, F b) { return _mm256_add_ps(a.v, b.v); }
HAKD_FN F operator-(F a, F b) { return _mm256_sub_ps(a.v, b.v); }
HAKD_FN F operator*(F a, F b) { return _mm256_mul_ps(a.v, b.v); }
HAKD_FN F operator/(F a, F b) { return _mm256_div_ps(a.v, b.v); }
HAKD_FN F fma(F a, F b, F c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
HAKD_FN F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
HAKD_FN F max(F a, F b) { return _mm256_max_ps(a.v, b.v); }
HAKD_FN F min(F a, F b) { return _mm256_min_ps(a.v, b.v); }
HAKD_FN F abs(F a) {
  return _mm256_and_ps(a.v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)));
}

HAKD_FN M less(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
HAKD_FN M equal(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
HAKD_FN F select(M m, F a, F b) { return _mm256_blendv_ps(b.v, a.v, m.v); }
HAKD_FN M not_less(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)}; }
HAKD_FN M either(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
HAKD_FN bool all(M m) { return _mm256_movemask_ps(m.v) == 0xff; }
HAKD_FN bool any(M m) { return _mm256_movemask_ps(m.v) != 0; }

template <typename T>
HAKD_FN Labels<T> load_labels(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
HAKD_FN M is_valid(Labels<float> labels) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(labels.v, _mm256_set1_epi32(-1)))};
}
HAKD_FN M is_labelled(Labels<float> labels, int64_t classes) {
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(classes)), labels.v);
  return {_mm256_and_ps(_mm256_castsi256_ps(below), is_valid(labels).v)};
}
HAKD_FN M is_class(Labels<float> labels, int32_t c) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(labels.v, _mm256_set1_epi32(c)))};
}
HAKD_FN F gather_tile(const float* tile, const int32_t* labels) {
  const __m256i l = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(labels));
  const __m256i c = _mm256_max_epi32(l, _mm256_setzero_si256());
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_i32gather_ps(tile, _mm256_add_epi32(_mm256_slli_epi32(c, 3), lane), 4);
}
HAKD_FN F add_unless(M m, F acc, F x) {
  return _mm256_add_ps(acc.v, _mm256_andnot_ps(m.v, x.v));
}

HAKD_FN F permute_two(const float* row, int32_t base, const int32_t* index) {
  const __m256i i = _mm256_sub_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)),
                                     _mm256_set1_epi32(base));
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(row + base), i);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(row + base + 8), i);
  return _mm256_blendv_ps(low, high,
                          _mm256_castsi256_ps(_mm256_cmpgt_epi32(i, _mm256_set1_epi32(7))));
}

HAKD_FN F shift_up(F a) {
  const __m256i up = _mm256_setr_epi32(0, 0, 1, 2, 3, 4, 5, 6);
  return _mm256_blend_ps(_mm256_permutevar8x32_ps(a.v, up), _mm256_setzero_ps(), 1);
}
HAKD_FN float last_lane(F a) {
  return _mm_cvtss_f32(_mm_permute_ps(_mm256_extractf128_ps(a.v, 1), 0xff));
}

HAKD_FN void add_to(double* sums, F a) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
}

HAKD_FN F round_to_integer(F x) {
  return _mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HAKD_FN F scale_by_power_of_two(F p, F n) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23);
  const __m256 scaled =
      _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), shifted));
  // Below 2^-125 the exponent would wrap. A NaN converts to 0x80000000, which is shifted to 0: the
  // NaN that is in p then stays.
  const __m256 tiny = _mm256_cmp_ps(n.v, _mm256_set1_ps(-125.0f), _CMP_LT_OQ);
  return _mm256_andnot_ps(tiny, scaled);
}
HAKD_FN F split_exponent(F x, F& n) {
  const __m256i bits = _mm256_castps_si256(x.v);
  const __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3));
  n = _mm256_cvtepi32_ps(_mm256_srai_epi32(above, 23));
  const __m256i exponent = _mm256_and_si256(above, _mm256_set1_epi32(0xff800000));
  const __m256 mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, exponent));
  const __m256 nan = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
  return _mm256_blendv_ps(mantissa, x.v, nan);
}

HAKD_FN F exp2(F x) { return exp2_polynomial(x); }
HAKD_FN F log(F x) { return log_polynomial(x); }
HAKD_FN F log2(F x) { return log_polynomial(x) * F(1.44269504f); }
HAKD_FN F log1p(F x) { return log1p_polynomial(x); }
HAKD_FN F log1p_unit(F x) { return log1p_unit_polynomial(x); }

HAKD_FN F from_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
HAKD_FN F from_bfloat16(const uint16_t* p) {
  const __m256i wide =
      _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
HAKD_FN void to_half(uint16_t* p, F a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// Orders what was streamed before what follows.
HAKD_FN void fence() { _mm_sfence(); }

}  // namespace heteroakd::cpu::HAKD_ISA
