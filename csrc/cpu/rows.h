// Rows of logits: from any dtype and stride into padded rows, from there to the columns of the
// labels, and the way back for the gradient (the adjoint).
#pragma once

#include "gradients.h"
#include "pass.h"

namespace heteroakd::cpu::HAKD_ISA {

// --- memory of 16 bits ---------------------------------------------------------------------------

HAKD_FN float bits_to_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
HAKD_FN uint32_t float_to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

HAKD_FN float bfloat16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
HAKD_FN uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

HAKD_FN float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return bits_to_float(sign | (rest + 0x1c000u) << 13);
  return bits_to_float(sign | float_to_bits(static_cast<float>(rest) * 0x1p-24f));
}
HAKD_FN uint16_t float_to_half(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (rest < 0x38800000u) {  // denormal: let the adder round to a multiple of 2^-24
    const float y = bits_to_float(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(y) - 0x3f000000u));
  }
  const uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

template <typename T>
HAKD_FN T read_element(const LogitsView& view, int64_t offset) {
  switch (view.dtype) {
    case Dtype::kFloat: return static_cast<T>(reinterpret_cast<const float*>(view.data)[offset]);
    case Dtype::kDouble: return static_cast<T>(reinterpret_cast<const double*>(view.data)[offset]);
    case Dtype::kHalf:
      return static_cast<T>(half_to_float(reinterpret_cast<const uint16_t*>(view.data)[offset]));
    default:
      return static_cast<T>(
          bfloat16_to_float(reinterpret_cast<const uint16_t*>(view.data)[offset]));
  }
}

template <typename T>
HAKD_FN void write_element(const LogitsView& view, int64_t offset, T x) {
  char* data = const_cast<char*>(view.data);
  switch (view.dtype) {
    case Dtype::kFloat: reinterpret_cast<float*>(data)[offset] = static_cast<float>(x); break;
    case Dtype::kDouble: reinterpret_cast<double*>(data)[offset] = static_cast<double>(x); break;
    case Dtype::kHalf:
      reinterpret_cast<uint16_t*>(data)[offset] = float_to_half(static_cast<float>(x));
      break;
    default:
      reinterpret_cast<uint16_t*>(data)[offset] = float_to_bfloat16(static_cast<float>(x));
  }
}

// in[0 .. count) with stride 1, widened. The count need not be a multiple of the lanes.
template <typename T>
HAKD_FN void read_dense(const LogitsView& view, int64_t offset, int64_t count, T* out) {
  int64_t x = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    constexpr int N = Lanes<T>::N;
    const auto* half = reinterpret_cast<const uint16_t*>(view.data) + offset;
    if (view.dtype == Dtype::kHalf) {
      for (; x + N <= count; x += N) from_half(half + x).store(out + x);
    } else if (view.dtype == Dtype::kBFloat16) {
      for (; x + N <= count; x += N) from_bfloat16(half + x).store(out + x);
    }
  }
#endif
  if (view.dtype == Dtype::kFloat) {
    const float* in = reinterpret_cast<const float*>(view.data) + offset;
    for (; x < count; ++x) out[x] = static_cast<T>(in[x]);
  }
  for (; x < count; ++x) out[x] = read_element<T>(view, offset + x);
}

// out[0 .. count) = x, rounded once, with stride 1.
template <typename T>
HAKD_FN void write_dense(const LogitsView& view, int64_t offset, int64_t count, const T* in) {
  int64_t x = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    constexpr int N = Lanes<T>::N;
    if (view.dtype == Dtype::kHalf) {
      auto* half = reinterpret_cast<uint16_t*>(const_cast<char*>(view.data)) + offset;
      for (; x + N <= count; x += N) to_half(half + x, Lanes<T>::load(in + x));
    }
  }
#endif
  if (view.dtype == Dtype::kFloat) {
    float* out = reinterpret_cast<float*>(const_cast<char*>(view.data)) + offset;
    for (; x < count; ++x) out[x] = static_cast<float>(in[x]);
  } else if (view.dtype == Dtype::kBFloat16) {
    auto* out = reinterpret_cast<uint16_t*>(const_cast<char*>(view.data)) + offset;
    for (; x < count; ++x) out[x] = float_to_bfloat16(static_cast<float>(in[x]));
  }
  for (; x < count; ++x) write_element<T>(view, offset + x, in[x]);
}

// --- padded rows ---------------------------------------------------------------------------------

// Columns before and behind a row. Behind: one repeats the row's end, the others are only loaded.
constexpr int64_t kPadBefore = 1;

// Columns [x0, x0 + count) of one row of every class: out[C][step].
template <typename T>
void read_columns(const LogitsView& view, int64_t classes, int64_t b, int64_t row, int64_t x0,
                  int64_t count, int64_t step, T* out) {
  const int64_t offset = b * view.stride[0] + row * view.stride[2] + x0 * view.stride[3];
  if (view.stride[3] == 1 || count == 1) {
    for (int64_t c = 0; c < classes; ++c) {
      read_dense<T>(view, offset + c * view.stride[1], count, out + c * step);
    }
    return;
  }
  // channels_last and its like: blocks of columns, so that a line of memory serves all classes
  for (int64_t first = 0; first < count; first += 16) {
    const int64_t end = first + 16 < count ? first + 16 : count;
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t x = first; x < end; ++x) {
        out[c * step + x] =
            read_element<T>(view, offset + c * view.stride[1] + x * view.stride[3]);
      }
    }
  }
}

// The reverse, rounded once. `streams`: past the caches where alignment allows it.
template <typename T>
void write_columns(const LogitsView& view, int64_t classes, int64_t b, int64_t row, int64_t x0,
                   int64_t count, int64_t step, const T* in, bool streams) {
  constexpr int N = Lanes<T>::N;
  const int64_t offset = b * view.stride[0] + row * view.stride[2] + x0 * view.stride[3];
  const Dtype own = sizeof(T) == 4 ? Dtype::kFloat : Dtype::kDouble;
  if (view.stride[3] != 1 && count > 1) {
    for (int64_t x = 0; x < count; ++x) {
      for (int64_t c = 0; c < classes; ++c) {
        write_element<T>(view, offset + c * view.stride[1] + x * view.stride[3],
                         in[c * step + x]);
      }
    }
    return;
  }
  for (int64_t c = 0; c < classes; ++c) {
    const T* from = in + c * step;
    if (streams && view.dtype == own) {
      T* out = reinterpret_cast<T*>(const_cast<char*>(view.data)) + offset + c * view.stride[1];
      int64_t x = 0;
      if (reinterpret_cast<uintptr_t>(out) % 64 == 0) {
        for (; x + N <= count; x += N) Lanes<T>::load(from + x).stream(out + x);
      }
      for (; x < count; ++x) out[x] = from[x];
    } else {
      write_dense<T>(view, offset + c * view.stride[1], count, from);
    }
  }
}

// Whether one of [C][step] logits is huge, infinite or NaN; count is rounded up to whole vectors.
template <typename T>
bool any_huge(int64_t classes, const T* rows, int64_t count, int64_t step, double huge) {
  using F = Lanes<T>;
  const F limit(static_cast<T>(huge));
  auto bad = less(limit, limit);
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t x = 0; x < count; x += F::N) {
      bad = either(bad, not_less(abs(F::load(rows + c * step + x)), limit));
    }
  }
  return any(bad);
}

// Rows [row, row + count) of image b as out[row][C][padded], the first element of a row at
// kPadBefore. Returns whether some logit is huge, infinite or NaN.
template <typename T>
bool pack_rows(const LogitsView& view, const Geometry<T>& g, int64_t classes, int64_t b,
               int64_t row, int64_t count, double huge, T* out) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  bool careful = false;
  for (int64_t r = 0; r < count; ++r) {
    T* rows = out + r * classes * g.padded + kPadBefore;
    read_columns<T>(view, classes, b, row + r, 0, g.width, g.padded, rows);
    for (int64_t c = 0; c < classes; ++c) {
      T* line = rows + c * g.padded;
      line[-1] = line[0];
      const F end(line[g.width - 1]);
      for (int64_t x = g.width; x < g.padded - kPadBefore - N; x += N) end.store(line + x);
      end.store(line + g.padded - kPadBefore - N);
    }
    careful = any_huge<T>(classes, rows, g.width, g.padded, huge) || careful;
  }
  return careful;
}

// --- along a row ---------------------------------------------------------------------------------

// (1 - f) row[j] + f row[j + 1] at the columns of one vector, for every class: out[C][N]. Their
// maximum and minimum over the classes: range[2][N].
template <typename T>
void expand_row(const Geometry<T>& g, int64_t vector, int64_t classes, const T* row, bool careful,
                T huge, T* out, T* range) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const F fraction = F::load(g.column_fraction + vector * N);
  const int32_t base = g.column_base[vector];
  const int32_t* lower = g.column_lower + vector * N;
  const ColumnMode mode = g.column_mode[vector];
  F largest(-kInfinity<T>), least(kInfinity<T>);
  int32_t upper[N];
  for (int l = 0; l < N; ++l) upper[l] = lower[l] + 1;
  row += kPadBefore;
  for (int64_t c = 0; c < classes; ++c, row += g.padded, out += N) {
    F a, b;
    if (mode == ColumnMode::kConsecutive) {
      a = F::load(row + base);
      b = F::load(row + base + 1);
    } else if (mode == ColumnMode::kPermuted) {
      a = permute_two(row, base, lower);
      b = permute_two(row, base, upper);
    } else {
      T both[2][N];
      for (int l = 0; l < N; ++l) {
        both[0][l] = row[lower[l]];
        both[1][l] = row[upper[l]];
      }
      a = F::load(both[0]);
      b = F::load(both[1]);
    }
    F y = fma(fraction, b - a, a);
    if (careful) y = between_huge(a, b, fraction, huge, y);
    y.store(out);
    largest = max(y, largest);
    least = min(y, least);
  }
  largest.store(range);
  least.store(range + N);
}

// The adjoint: adds in[C][N] to the columns it came from, row[C][padded].
template <typename T>
void fold_columns(const Geometry<T>& g, int64_t vector, int64_t classes, const T* in, T* row) {
  using F = Lanes<T>;
  constexpr int N = F::N;
  const F fraction = F::load(g.column_fraction + vector * N);
  const int32_t base = g.column_base[vector];
  row += kPadBefore;
  if (g.column_mode[vector] == ColumnMode::kConsecutive) {
    row += base;
    for (int64_t c = 0; c < classes; ++c, row += g.padded, in += N) {
      fold_lanes<T>(F::load(in), fraction, row);
    }
    return;
  }
  const int32_t* lower = g.column_lower + vector * N;
  const T* f = g.column_fraction + vector * N;
  for (int64_t c = 0; c < classes; ++c, row += g.padded, in += N) {
    for (int l = 0; l < N; ++l) {
      const T upper = f[l] * in[l];
      row[lower[l]] += in[l] - upper;
      row[lower[l] + 1] += upper;
    }
  }
}

}  // namespace heteroakd::cpu::HAKD_ISA
