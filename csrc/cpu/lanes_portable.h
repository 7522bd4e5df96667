// A vector of pixels in plain C++: for every processor, and for double.
//
// This file is also the description of what a vector type offers to the kernels. A lane is a pixel.
// The operations of math/scalar.h act lane by lane; beyond them: memory, labels, and what
// interpolation along a row needs.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/elementary.h"
#include "../math/scalar.h"

namespace heteroakd::cpu::HAKD_ISA {

constexpr const char* kIsaName = "portable";

template <typename T>
struct WidthOf;
template <>
struct WidthOf<float> {
  static constexpr int kLanes = 8;
};
template <>
struct WidthOf<double> {
  static constexpr int kLanes = 4;
};

template <typename T>
struct Mask {
  static constexpr int N = WidthOf<T>::kLanes;
  bool v[N];
};

template <typename T>
struct Labels {
  static constexpr int N = WidthOf<T>::kLanes;
  int32_t v[N];
};

#define HAKD_LANES for (int l = 0; l < N; ++l)

template <typename T>
struct Lanes {
  using Scalar = T;
  static constexpr int N = WidthOf<T>::kLanes;
  T v[N];

  Lanes() = default;
  HAKD_FN Lanes(T x) { HAKD_LANES v[l] = x; }  // NOLINT: scalars are vectors of equal lanes

  HAKD_FN static Lanes load(const T* p) {
    Lanes r;
    HAKD_LANES r.v[l] = p[l];
    return r;
  }
  // 0 where the mask is not set; that memory is not read.
  HAKD_FN static Lanes load(const T* p, Mask<T> m) {
    Lanes r;
    HAKD_LANES r.v[l] = m.v[l] ? p[l] : T(0);
    return r;
  }
  HAKD_FN void store(T* p) const { HAKD_LANES p[l] = v[l]; }
  // Past the caches; p is aligned to the vector.
  HAKD_FN void stream(T* p) const { store(p); }
  HAKD_FN void store(T* p, int count) const {
    for (int l = 0; l < count; ++l) p[l] = v[l];
  }
};

#define HAKD_BINARY(op)                                                \
  template <typename T>                                                \
  HAKD_FN Lanes<T> operator op(Lanes<T> a, Lanes<T> b) {               \
    constexpr int N = Lanes<T>::N;                                     \
    HAKD_LANES a.v[l] = a.v[l] op b.v[l];                              \
    return a;                                                          \
  }
HAKD_BINARY(+)
HAKD_BINARY(-)
HAKD_BINARY(*)
HAKD_BINARY(/)
#undef HAKD_BINARY

// Multiply-add without promise of a single rounding: a call of libm's fma is slower than all else.
template <typename T>
HAKD_FN Lanes<T> fma(Lanes<T> a, Lanes<T> b, Lanes<T> c) {
  return a * b + c;
}
// c - a * b
template <typename T>
HAKD_FN Lanes<T> fnma(Lanes<T> a, Lanes<T> b, Lanes<T> c) {
  return c - a * b;
}
template <typename T>
HAKD_FN Lanes<T> max(Lanes<T> a, Lanes<T> b) {
  constexpr int N = Lanes<T>::N;
  HAKD_LANES b.v[l] = a.v[l] > b.v[l] ? a.v[l] : b.v[l];
  return b;
}
template <typename T>
HAKD_FN Lanes<T> min(Lanes<T> a, Lanes<T> b) {
  constexpr int N = Lanes<T>::N;
  HAKD_LANES b.v[l] = a.v[l] < b.v[l] ? a.v[l] : b.v[l];
  return b;
}
template <typename T>
HAKD_FN Lanes<T> abs(Lanes<T> a) {
  constexpr int N = Lanes<T>::N;
  HAKD_LANES a.v[l] = heteroakd::abs(a.v[l]);
  return a;
}

template <typename T>
HAKD_FN Mask<T> less(Lanes<T> a, Lanes<T> b) {
  constexpr int N = Lanes<T>::N;
  Mask<T> m;
  HAKD_LANES m.v[l] = a.v[l] < b.v[l];
  return m;
}
template <typename T>
HAKD_FN Mask<T> equal(Lanes<T> a, Lanes<T> b) {
  constexpr int N = Lanes<T>::N;
  Mask<T> m;
  HAKD_LANES m.v[l] = a.v[l] == b.v[l];
  return m;
}
template <typename T>
HAKD_FN Lanes<T> select(Mask<T> m, Lanes<T> a, Lanes<T> b) {
  constexpr int N = Lanes<T>::N;
  HAKD_LANES b.v[l] = m.v[l] ? a.v[l] : b.v[l];
  return b;
}
// !(a < b): true where one of them is NaN.
template <typename T>
HAKD_FN Mask<T> not_less(Lanes<T> a, Lanes<T> b) {
  constexpr int N = Lanes<T>::N;
  Mask<T> m;
  HAKD_LANES m.v[l] = !(a.v[l] < b.v[l]);
  return m;
}
template <typename T>
HAKD_FN Mask<T> either(Mask<T> a, Mask<T> b) {
  constexpr int N = Mask<T>::N;
  HAKD_LANES a.v[l] = a.v[l] || b.v[l];
  return a;
}
template <typename T>
HAKD_FN bool all(Mask<T> m) {
  constexpr int N = Mask<T>::N;
  bool r = true;
  HAKD_LANES r = r && m.v[l];
  return r;
}
template <typename T>
HAKD_FN bool any(Mask<T> m) {
  constexpr int N = Mask<T>::N;
  bool r = false;
  HAKD_LANES r |= m.v[l];
  return r;
}

// Labels of the pixels; negative where there is nothing to learn.
template <typename T>
HAKD_FN Labels<T> load_labels(const int32_t* p) {
  constexpr int N = Labels<T>::N;
  Labels<T> r;
  HAKD_LANES r.v[l] = p[l];
  return r;
}
template <typename T>
HAKD_FN Mask<T> is_valid(Labels<T> labels) {
  constexpr int N = Labels<T>::N;
  Mask<T> m;
  HAKD_LANES m.v[l] = labels.v[l] >= 0;
  return m;
}
template <typename T>
HAKD_FN Mask<T> is_labelled(Labels<T> labels, int64_t classes) {
  constexpr int N = Labels<T>::N;
  Mask<T> m;
  HAKD_LANES m.v[l] = labels.v[l] >= 0 && labels.v[l] < classes;
  return m;
}
template <typename T>
HAKD_FN Mask<T> is_class(Labels<T> labels, int32_t c) {
  constexpr int N = Labels<T>::N;
  Mask<T> m;
  HAKD_LANES m.v[l] = labels.v[l] == c;
  return m;
}
// Lane l of class labels[l] in a tile [C][N]; of class 0 where a label is negative.
template <typename T>
HAKD_FN Lanes<T> gather_tile(const T* tile, const int32_t* labels) {
  constexpr int N = Lanes<T>::N;
  Lanes<T> r;
  HAKD_LANES r.v[l] = tile[(labels[l] < 0 ? 0 : static_cast<int64_t>(labels[l])) * N + l];
  return r;
}
// acc + (m ? 0 : x)
template <typename T>
HAKD_FN Lanes<T> add_unless(Mask<T> m, Lanes<T> acc, Lanes<T> x) {
  constexpr int N = Lanes<T>::N;
  HAKD_LANES acc.v[l] += m.v[l] ? T(0) : x.v[l];
  return acc;
}

// row[index[l]] for indices within [base, base + 2N): two loads and a permutation elsewhere.
template <typename T>
HAKD_FN Lanes<T> permute_two(const T* row, int32_t base, const int32_t* index) {
  constexpr int N = Lanes<T>::N;
  (void)base;
  Lanes<T> r;
  HAKD_LANES r.v[l] = row[index[l]];
  return r;
}

// Lane l becomes lane l + 1; lane 0 becomes 0.
template <typename T>
HAKD_FN Lanes<T> shift_up(Lanes<T> a) {
  constexpr int N = Lanes<T>::N;
  Lanes<T> r;
  r.v[0] = T(0);
  for (int l = 1; l < N; ++l) r.v[l] = a.v[l - 1];
  return r;
}
template <typename T>
HAKD_FN T last_lane(Lanes<T> a) {
  return a.v[Lanes<T>::N - 1];
}

template <typename T>
HAKD_FN void add_to(double* sums, Lanes<T> a) {
  constexpr int N = Lanes<T>::N;
  HAKD_LANES sums[l] += static_cast<double>(a.v[l]);
}

// For elementary.h; not defined for double, which has the library's functions.
HAKD_FN Lanes<float> round_to_integer(Lanes<float> x) {
  constexpr int N = Lanes<float>::N;
  HAKD_LANES x.v[l] = (x.v[l] + 12582912.0f) - 12582912.0f;
  return x;
}
HAKD_FN Lanes<float> scale_by_power_of_two(Lanes<float> p, Lanes<float> n) {
  constexpr int N = Lanes<float>::N;
  HAKD_LANES {
    const int32_t exponent = static_cast<int32_t>(n.v[l] >= -125.0f ? n.v[l] : -127.0f);
    const int32_t bits = (exponent + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    p.v[l] = p.v[l] * scale;
  }
  return p;
}
HAKD_FN Lanes<float> split_exponent(Lanes<float> x, Lanes<float>& n) {
  constexpr int N = Lanes<float>::N;
  HAKD_LANES {
    int32_t bits;
    std::memcpy(&bits, &x.v[l], 4);
    const int32_t exponent = (bits - 0x3f3504f3) >> 23;
    n.v[l] = static_cast<float>(exponent);
    const int32_t mantissa = bits - exponent * 0x800000;
    float m;
    std::memcpy(&m, &mantissa, 4);
    // a NaN's bits make a number: keep it one
    x.v[l] = x.v[l] == x.v[l] ? m : x.v[l];
  }
  return x;
}

HAKD_FN Lanes<float> exp2(Lanes<float> x) { return exp2_polynomial(x); }
HAKD_FN Lanes<float> log(Lanes<float> x) { return log_polynomial(x); }
HAKD_FN Lanes<float> log2(Lanes<float> x) { return log_polynomial(x) * Lanes<float>(1.44269504f); }
HAKD_FN Lanes<float> log1p(Lanes<float> x) { return log1p_polynomial(x); }
HAKD_FN Lanes<float> log1p_unit(Lanes<float> x) { return log1p_unit_polynomial(x); }

#define HAKD_LIBRARY(name)                                       \
  HAKD_FN Lanes<double> name(Lanes<double> x) {                  \
    constexpr int N = Lanes<double>::N;                          \
    HAKD_LANES x.v[l] = heteroakd::name(x.v[l]);                 \
    return x;                                                    \
  }
HAKD_LIBRARY(exp2)
HAKD_LIBRARY(log)
HAKD_LIBRARY(log2)
HAKD_LIBRARY(log1p)
HAKD_LIBRARY(log1p_unit)
#undef HAKD_LIBRARY
#undef HAKD_LANES

// Orders what was streamed before what follows.
HAKD_FN void fence() {}

}  // namespace heteroakd::cpu::HAKD_ISA
