// The pass by cells: the usual terms, both models on one grid of cells at least 3 pixels high.
//
// Per step of a lane (R x S pixels of its cell):
//
//     staging      logits in shared memory, bounded by their maxima (staging.h)
//     statistics   what softmax, KL and reliability need to know of a pixel
//     pixel        reliability, mixed_target, discrepancy, values, coefficients of the gradients
//     gradients    sum_c m_c log2 m_c, and each term's gradient, added to the logits' corners
//     the rest     pixels around logits further below their maximum than the limit, infinite ones
//                  or NaN: segment_pass.h, with their exact maximum
//
// Full-resolution logits, probabilities and gradients exist in registers only. Deterministic: tiles
// depend on shapes only, every sum has one order, nothing is atomic. Bytes: both low-resolution
// logits are read twice (once from memory), each term's gradient is written once and a row in
// chunk_rows read again, each label is read once.
#pragma once

#include "cell_pass.h"
#include "runtime.h"
#include "segment_kernel.h"

namespace heteroakd::cuda {

constexpr int kCellThreads = 64;
constexpr int kHandedOver = 4;  // pixels at a time

// Pixels of a row that the pass by cells could not do; not inlined, because it is rare and large.
// Bits of `mask` say which of the pixels from x on.
static __device__ __noinline__ Sums<float> hand_over(const Pass& p, int32_t image, int32_t cell_y,
                                              int32_t cell_x, int32_t y, int32_t x, uint32_t mask,
                                              bool own, RowWriter<float> rows) {
  const Axis axis_y = axis_of(p.student.height, p.label_height, p.align_corners);
  const Axis axis_x = axis_of(p.student.width, p.label_width, p.align_corners);
  const Numbers<float> n = numbers_of<Usual, float>(p);
  Segment<float, kHandedOver> at;
  at.y = y;
  at.x = x;
  at.fraction_y = fraction_in_cell<float>(axis_y, y, cell_y);
#pragma unroll
  for (int s = 0; s < kHandedOver; ++s) {
    const bool asked = (mask >> s & 1u) != 0;
    at.fraction_x[s] = fraction_in_cell<float>(axis_x, x + s, cell_x);
    at.inside[s] = asked && own;
  }
  int32_t label[1][kHandedOver];
  int32_t counted = 0;
  load_labels<float>(p, image, y, x, 1, mask == 0 ? 0 : 32 - __clz(static_cast<int>(mask)), label, counted,
              counted);
#pragma unroll
  for (int s = 0; s < kHandedOver; ++s) at.label[s] = (mask >> s & 1u) != 0 ? label[0][s] : -1;
  Sums<float> sums = no_sums<float>();
  rows.again = true;
  SegmentPass<float, Usual, kHandedOver, Hold::kNever>(p, n, image, at, cell_y, cell_x, nullptr, 0)
      .run(rows, sums);
  return sums;
}

template <class Set, int R, int S>
class CellPass {
  static constexpr int kModels = Set::kTeacher ? 2 : 1;

 public:
  HAKD_DEVICE CellPass(const Pass& pass, int32_t image, const Staging<kModels>& staging,
                       const Numbers<float>& numbers)
      : p(pass),
        n(numbers),
        staging_(staging),
        image_(image),
        lane_(staging.lane),
        own_(staging.own),
        whole_(pass.staged_classes >= pass.classes) {}

  HAKD_DEVICE void run(ThreadSums& thread_sums) {
    staging_.begin(p, image_);
    if (whole_) {
      if (p.chunk_rows == kMostChunkRows) {
        staging_.template bring<kRows>(p, image_, 0, p.classes, 0);
      } else {
        staging_.template bring<2>(p, image_, 0, p.classes, 0);
      }
    }
    const Axis axis_y = axis_of(p.student.height, p.label_height, p.align_corners);
    const Axis axis_x = axis_of(p.student.width, p.label_width, p.align_corners);
    const int32_t j = own_.cell;
    const int32_t x_begin = cell_start(axis_x, j);
    const int32_t x_end = cell_start(axis_x, j + 1);
    const int32_t across = (p.columns_per_cell + S - 1) / S;
    const int32_t steps = (p.rows_per_cell + R - 1) / R * across;
#pragma unroll 1
    for (int32_t t = 0; t < p.chunk_rows; ++t) {
      const int32_t i = own_.chunk * p.chunk_rows + t - 1;
      const bool exists = own_.exists && i < p.student.height;
      const int32_t y_begin = cell_start(axis_y, i);
      const int32_t y_end = exists ? cell_start(axis_y, i + 1) : 0;
      RowWriter<float> rows = row_writer<float>(p, image_, own_, t);
#pragma unroll 1
      for (int32_t k = 0; k < steps; ++k) {
        y_ = y_begin + k / across * R;
        x_ = x_begin + k % across * S;
        high_ = y_end - y_;
        wide_ = x_end - x_;
        Sums<float> sums = no_sums<float>();
        step(t, axis_y, axis_x, i, rows, sums);
        thread_sums.template add<Set>(sums);
        rows.again = true;
      }
    }
  }

 private:
  HAKD_DEVICE bool inside(int r, int s) const { return r < high_ && s < wide_; }

  HAKD_DEVICE void step(int32_t t, const Axis& axis_y, const Axis& axis_x, int32_t i,
                        const RowWriter<float>& rows, Sums<float>& sums) {
    int32_t label[R][S];
    load_labels<float>(p, image_, y_, x_, high_, wide_, label, sums.valid, sums.bad);
    const bool middle = i >= 0 && i < p.student.height - 1 && axis_y.step > 0;
    at_.y[0] = fraction_in_cell<float>(axis_y, y_, i);
    at_.y_step = middle ? fraction_of<float>(axis_y.step, axis_y.unit) : 0.0f;
#pragma unroll
    for (int r = 1; r < R; ++r) at_.y[r] = fma(static_cast<float>(r), at_.y_step, at_.y[0]);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      at_.x[s] = fraction_in_cell<float>(axis_x, x_ + s, own_.cell);
    }

    PixelTerms<float, Set, R * S> terms(p, n, image_);
    const uint32_t left_over = pixels(t, label, terms, sums);
    if (p.gradients || terms.values_late()) gradients(t, label, terms, rows);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        terms.finish(r * S + s, label[r][s] >= 0, sums);
      }
    }
    if (__any_sync(kAllLanes, left_over != 0)) finish(i, left_over, rows, sums);
  }

  HAKD_DEVICE const float* corner(int32_t t) const {
    return staging_.region.logits + t * kPitch + lane_;
  }

  // f(corner, begin, end) for all classes, by blocks that fit.
  template <typename Function>
  HAKD_DEVICE void for_each_block(int32_t t, const Function& f) const {
#pragma unroll 1
    for (int32_t begin = 0; begin < p.classes; begin += p.staged_classes) {
      const int32_t end =
          begin + p.staged_classes < p.classes ? begin + p.staged_classes : p.classes;
      if (!whole_) staging_.template bring<2>(p, image_, begin, end, t);
      f(corner(t), begin, end);
    }
  }

  HAKD_DEVICE void statistics(int32_t t, const int32_t (&label)[R][S],
                              Totals<float> (&s)[R][S]) const {
    for_each_block(t, [&](const float* corner, int32_t begin, int32_t end) {
      const float exponent = n.hard_exponent;
      switch (fixed_power<Set>(p)) {
        case 1: cell_statistics<Set, 1>(p, corner, begin, end, at_, exponent, label, s); break;
        case 2: cell_statistics<Set, 2>(p, corner, begin, end, at_, exponent, label, s); break;
        default: cell_statistics<Set, 0>(p, corner, begin, end, at_, exponent, label, s);
      }
    });
  }

  // Statistics, values and coefficients; returns the pixels that are left over, a bit each, which
  // from then on are invalid here.
  HAKD_DEVICE uint32_t pixels(int32_t t, int32_t (&label)[R][S], PixelTerms<float, Set, R * S>& terms,
                              Sums<float>& sums) const {
    Totals<float> s[R][S];
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < S; ++c) s[r][c] = no_totals<float>();
    }
    statistics(t, label, s);
    float student_label[R][S], teacher_label[R][S];
    constexpr Needs needs = Set::kNeeds;
    if (needs.student_nll) label_logits(0, t, label, student_label);
    if (needs.teacher_nll) label_logits(1, t, label, teacher_label);
    const bool sound = !flagged(t);
    uint32_t left_over = 0;
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int c = 0; c < S; ++c) {
        Totals<float>& totals = s[r][c];
        find_totals<Set>(p, totals, needs.student_nll ? student_label[r][c] : 0.0f,
                         needs.teacher_nll ? teacher_label[r][c] : 0.0f, label[r][c]);
        if (label[r][c] >= 0 && !sound) {
          left_over |= 1u << (r * S + c);
          label[r][c] = -1;
        }
        terms.begin(totals, r * S + c);
        terms.find_coefficients(totals, r * S + c, label[r][c], y_ + r, x_ + c, sums);
        terms.write(r * S + c, label[r][c] >= 0, own_.own && inside(r, c), y_ + r, x_ + c);
      }
    }
    return left_over;
  }

  // Whether a corner of the cell has a logit beyond the limit. The right one of the last cell has no
  // weight, and may be another image row's.
  HAKD_DEVICE bool flagged(int32_t t) const {
    const uint32_t* flags = staging_.region.flags + t * kPitch + lane_;
    uint32_t found = flags[0] | flags[kPitch];
    if (own_.cell < p.student.width - 1) found |= flags[1] | flags[kPitch + 1];
    return found != 0;
  }

  // z_label - m of every pixel of model m.
  HAKD_DEVICE void label_logits(int m, int32_t t, const int32_t (&label)[R][S],
                                float (&out)[R][S]) const {
    if (whole_) {
#pragma unroll
      for (int r = 0; r < R; ++r) {
#pragma unroll
        for (int s = 0; s < S; ++s) {
          const int32_t c = class_or_0(p, label[r][s]);
          const float* at = corner(t) + (c * kModels + m) * kPlane;
          out[r][s] = between_corners(at[0], at[1], at[kPitch], at[kPitch + 1], r, s);
        }
      }
      return;
    }
    const Logits& model = m == 0 ? p.student : p.teacher;
    const float* maxima = staging_.region.maxima + m * kPlane + t * kPitch + lane_;
    const int32_t i = own_.chunk * p.chunk_rows + t - 1;
    int64_t place[2][2];
    float maximum[2][2];
    // The right side of the last cell has no weight; its neighbour's column may be another chunk's.
    const bool last = own_.cell >= model.width - 1;
#pragma unroll
    for (int down = 0; down < 2; ++down) {
#pragma unroll
      for (int right = 0; right < 2; ++right) {
        place[down][right] = image_ * model.batch_stride +
                             clamp(i + down, model.height) * model.row_stride +
                             clamp(own_.cell + right, model.width) * model.column_stride;
        maximum[down][right] = maxima[down * kPitch + (last ? 0 : right)];
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int s = 0; s < S; ++s) {
        const int64_t plane = class_or_0(p, label[r][s]) * model.class_stride;
        float a[2][2];
#pragma unroll
        for (int down = 0; down < 2; ++down) {
#pragma unroll
          for (int right = 0; right < 2; ++right) {
            const float z = load_narrow(model.data, model.dtype, plane + place[down][right]);
            a[down][right] =
                max_number((z - maximum[down][right]) * staging_.scale, -staging_.limit);
          }
        }
        out[r][s] = between_corners(a[0][0], a[0][1], a[1][0], a[1][1], r, s);
      }
    }
  }

  HAKD_DEVICE float between_corners(float a00, float a01, float a10, float a11, int r,
                                    int s) const {
    const float left = fma(at_.y[r], a10 - a00, a00);
    const float right = fma(at_.y[r], a11 - a01, a01);
    return fma(at_.x[s], right - left, left) * n.to_logits;
  }

  HAKD_DEVICE void gradients(int32_t t, const int32_t (&label)[R][S],
                             PixelTerms<float, Set, R * S>& terms,
                             const RowWriter<float>& rows) const {
    for_each_block(t, [&](const float* corner, int32_t begin, int32_t end) {
      const float exponent = n.hard_exponent;
      if (!p.gradients) {
        cell_gradients<Set, 1, false>(p, corner, begin, end, at_, exponent, label, terms, rows);
        return;
      }
      switch (fixed_power<Set>(p)) {
        case 1:
          cell_gradients<Set, 1, true>(p, corner, begin, end, at_, exponent, label, terms, rows);
          break;
        case 2:
          cell_gradients<Set, 2, true>(p, corner, begin, end, at_, exponent, label, terms, rows);
          break;
        default: cell_gradients<Set, 0, true>(p, corner, begin, end, at_, exponent, label, terms, rows);
      }
    });
  }

  HAKD_DEVICE void finish(int32_t i, uint32_t left_over, const RowWriter<float>& rows,
                          Sums<float>& sums) const {
    const int32_t cell_y = i < p.student.height ? i : p.student.height - 1;
#pragma unroll 1
    for (int r = 0; r < R; ++r) {
#pragma unroll 1
      for (int s = 0; s < S; s += kHandedOver) {
        const uint32_t mask = left_over >> (r * S + s) & ((1u << kHandedOver) - 1u);
        if (!__any_sync(kAllLanes, mask != 0)) continue;
        const Sums<float> more =
            hand_over(p, image_, cell_y, own_.cell, y_ + r, x_ + s, mask, own_.own, rows);
        sums.template add<Set>(more);
      }
    }
  }

  const Pass& p;
  const Numbers<float>& n;
  const Staging<kModels>& staging_;
  int32_t image_, lane_;
  Column own_;
  bool whole_;
  int32_t y_ = 0, x_ = 0, high_ = 0, wide_ = 0;
  Fractions<R, S> at_;
};

template <class Set, int R, int S>
__global__ void __launch_bounds__(kCellThreads) cell_kernel(const __grid_constant__ Pass p) {
  HAKD_SHARED_MEMORY(float4, shared_memory);
  static_assert(S % kHandedOver == 0, "pixels are handed over by whole rows");
  constexpr int kModels = Set::kTeacher ? 2 : 1;
  const Thread thread = this_thread<kCellThreads>(p);
  const Numbers<float> n = numbers_of<Set, float>(p);
  auto* memory = reinterpret_cast<float*>(reinterpret_cast<char*>(shared_memory) +
                                          static_cast<int64_t>(thread.warp) * p.warp_bytes);
  const float largest_exponent = n.hard_exponent > 1.0f ? n.hard_exponent : 1.0f;
  const Staging<kModels> staging = {Region<kModels>(memory), thread.column,
                                    column_of(p, thread.first + kWarpSize, true), thread.lane,
                                    n.pass.scale, kLimit / largest_exponent};
  ThreadSums sums;
  CellPass<Set, R, S>(p, thread.image, staging, n).run(sums);
  write_sums<Set>(p, thread.row, sums, thread.column.own, thread.lane);
}

}  // namespace heteroakd::cuda
