// The pass by segments: any terms, any grids, each pixel with its exact maximum (segment_pass.h).
//
// Student on cells: a lane walks over the pixels of its column of cells, S neighbours at a time.
// Student on the label grid: a lane has S pixels of a row, then S of the row below.
#pragma once

#include "runtime.h"
#include "segment_pass.h"
#include "warp_sums.h"

namespace heteroakd::cuda {

constexpr int kSegmentThreads = 64;

// Labels of a segment whose first `wide` pixels exist (and are inside).
template <typename F, int S>
HAKD_DEVICE void read_labels(const Pass& p, int32_t image, int32_t wide, Segment<F, S>& at,
                             Sums<F>& sums) {
  int32_t label[1][S];
  load_labels<F>(p, image, at.y, at.x, wide > 0 ? 1 : 0, wide, label, sums.valid, sums.bad);
#pragma unroll
  for (int s = 0; s < S; ++s) {
    at.label[s] = label[0][s];
    at.inside[s] = s < wide;
  }
}

template <typename F, int S>
HAKD_DEVICE bool any_valid(const Segment<F, S>& at) {
  bool any = false;
#pragma unroll
  for (int s = 0; s < S; ++s) any |= at.label[s] >= 0;
  return __any_sync(kAllLanes, any);
}

// Calls f(segment, wide, cell_y, cell_x, rows), of which `wide` pixels exist, for every segment of a
// lane's column of cells, the same number of times in every lane.
template <typename F, int S, typename Function>
HAKD_DEVICE void for_each_segment(const Pass& p, int32_t image, const Column& column,
                                  const Function& f) {
  const bool on_labels = p.student.source == Source::kLabels;
  const Axis axis_y = axis_of(p.student.height, p.label_height, p.align_corners);
  const Axis axis_x = axis_of(p.student.width, p.label_width, p.align_corners);
  const int32_t j = column.cell;
  const int32_t x_begin = on_labels ? (j + 1) * S : cell_start(axis_x, j);
  const int32_t x_end = on_labels ? p.label_width : cell_start(axis_x, j + 1);
  const int32_t across = on_labels ? 1 : (p.columns_per_cell + S - 1) / S;
  const int32_t steps = on_labels ? 1 : p.rows_per_cell * across;
#pragma unroll 1
  for (int32_t t = 0; t < p.chunk_rows; ++t) {
    const int32_t row = column.chunk * p.chunk_rows + t;
    const int32_t i = row - 1;
    const int32_t y_begin = on_labels ? row : cell_start(axis_y, i);
    int32_t y_end = on_labels ? row + 1 : cell_start(axis_y, i + 1);
    if (!column.exists || row >= p.rows) y_end = 0;
    RowWriter<F> rows = {};
    if (!on_labels) rows = row_writer<F>(p, image, column, t);
#pragma unroll 1
    for (int32_t step = 0; step < steps; ++step) {
      Segment<F, S> at;
      at.y = y_begin + step / across;
      at.x = x_begin + step % across * S;
      at.fraction_y = fraction_in_cell<F>(axis_y, at.y, i);
#pragma unroll
      for (int s = 0; s < S; ++s) at.fraction_x[s] = fraction_in_cell<F>(axis_x, at.x + s, j);
      // of a row of cells that does not exist: any that does
      const int32_t cell_y = i < p.student.height ? i : p.student.height - 1;
      f(at, at.y < y_end ? x_end - at.x : 0, cell_y, j, rows);
      rows.again = true;
    }
  }
}

template <typename F, class Set, int S, Hold kHold>
__global__ void __launch_bounds__(kSegmentThreads)
    segment_kernel(const __grid_constant__ Pass p) {
  HAKD_SHARED_MEMORY(float4, shared_memory);
  Held<F, S>* held = p.warp_bytes == 0
                         ? nullptr
                         : reinterpret_cast<Held<F, S>*>(shared_memory) + threadIdx.x;
  const Thread thread = this_thread<kSegmentThreads>(p);
  const Column& column = thread.column;
  const Numbers<F> n = numbers_of<Set, F>(p);
  ThreadSums thread_sums;
  for_each_segment<F, S>(
      p, thread.image, column,
      [&](Segment<F, S>& at, int32_t wide, int32_t i, int32_t j, const RowWriter<F>& rows) {
        Sums<F> sums = no_sums<F>();
        read_labels(p, thread.image, wide, at, sums);
        if (!column.own) {  // of a halo: only the gradients are wanted
#pragma unroll
          for (int s = 0; s < S; ++s) at.inside[s] = false;
        }
        // Nothing to learn here: what must be written is zeros.
        const bool writes = p.maps || p.diagnostics || (p.gradients && !rows.again);
        if (writes || any_valid(at)) {
          SegmentPass<F, Set, S, kHold>(p, n, thread.image, at, i, j, held, kSegmentThreads)
              .run(rows, sums);
        }
        thread_sums.template add<Set>(sums);
      });
  write_sums<Set>(p, thread.row, thread_sums, column.own, thread.lane);
}

// Terms over space: the softmax of `first` over the valid pixels of each image and class. A warp leaves
// its maxima and its sums; sums.cu brings an image's warps together. Two exponentials more per pixel
// and class; a variant that is asked for by name, written for exactness and not for speed.
constexpr double kLowest = -1e30;

// Adds to a maximum and a sum of exp relative to it.
template <typename F>
HAKD_DEVICE void add_to_space(F& largest, F& total, F other, F other_total) {
  const F bound = max_or_nan(largest, other);
  total = fma(total, exp2((largest - bound) * F(kLog2E)),
              other_total * exp2((other - bound) * F(kLog2E)));
  largest = bound;
}

template <class Term, typename F, int S>
HAKD_DEVICE void collect_space(const Pass& p, const Thread& thread) {
  const int32_t image = thread.image;
  const Column& column = thread.column;
  const Numbers<F> n = numbers_of<All, F>(p);
  const int32_t variant = p.variant[index_of<Term>];
  for (int32_t c = 0; c < p.classes; ++c) {
    F largest[kMostFirsts], total[kMostFirsts];
    for (int j = 0; j < kMostFirsts; ++j) {
      largest[j] = F(kLowest);
      total[j] = F(0);
    }
    for_each_segment<F, S>(
        p, image, column,
        [&](Segment<F, S>& at, int32_t wide, int32_t i, int32_t j, const RowWriter<F>&) {
          Sums<F> unused = no_sums<F>();
          read_labels(p, image, wide, at, unused);
          const Under<F, S> student = under(p, p.student, image, at, i, j);
          const Under<F, S> teacher = under(p, p.teacher, image, at, i, j);
          F z_s[S], z_t[S];
          read(p.student, student, c, true, at.label, z_s);
          read(p.teacher, teacher, c, true, at.label, z_t);
#pragma unroll
          for (int s = 0; s < S; ++s) {
            if (!column.own || at.label[s] < 0) continue;
            Class<F, bool> k{};
            k.student_z = z_s[s];
            k.teacher_z = z_t[s];
            k.is_label = at.label[s] == c;
            k.unlabelled = at.label[s] == p.classes;
            const F weight =
                p.pixel_weight == nullptr
                    ? F(1)
                    : weight_at<F>(p, place_of(p, image, at.y, at.x + s));
            typename Term::template Known<F> known{};
            const First<F> found =
                Term::first(variant, n.terms.template of<Term>(), n.pass, known, k);
            for (int v = 0; v < Term::kFirsts; ++v) {
              add_to_space(largest[v], total[v], found.v[v], weight);
            }
          }
        });
#pragma unroll
    for (int v = 0; v < Term::kFirsts; ++v) {
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
        const F other = __shfl_down_sync(kAllLanes, largest[v], offset);
        const F other_total = __shfl_down_sync(kAllLanes, total[v], offset);
        add_to_space(largest[v], total[v], other, other_total);
      }
      if (thread.lane == 0 && v < Term::spaces(variant)) {
        const int64_t rows = static_cast<int64_t>(gridDim.x) * (kSegmentThreads / kWarpSize);
        F* out = static_cast<F*>(p.space_found) + ((v * rows + thread.row) * p.classes + c) * 2;
        out[0] = largest[v];
        out[1] = total[v];
      }
    }
  }
}

template <typename F, int S>
__global__ void __launch_bounds__(kSegmentThreads)
    space_kernel(const __grid_constant__ Pass p) {
  const Thread thread = this_thread<kSegmentThreads>(p);
  for_each([&](auto tag) {
    using Term = typename decltype(tag)::type;
    if constexpr (Term::kOverSpace) {
      if (p.collected == index_of<Term>) collect_space<Term, F, S>(p, thread);
    }
  });
}

// Terms over classes: their sums over the labelled pixels of a warp. Of each class a sum over the warp
// for each of the numbers: written for exactness and not for speed.
template <typename F, int S>
__global__ void __launch_bounds__(kSegmentThreads)
    tally_kernel(const __grid_constant__ Pass p) {
  const Thread thread = this_thread<kSegmentThreads>(p);
  const Numbers<F> n = numbers_of<All, F>(p);
  const int64_t count = static_cast<int64_t>(kMostTallies) * p.classes;
  double* out = p.tallies + thread.row * count;
  for (int64_t i = thread.lane; i < count; i += kWarpSize) out[i] = 0.0;
  __syncwarp();
  for_each_segment<F, S>(
      p, thread.image, thread.column,
      [&](Segment<F, S>& at, int32_t wide, int32_t i, int32_t j, const RowWriter<F>&) {
        Sums<F> unused = no_sums<F>();
        read_labels(p, thread.image, thread.column.own ? wide : 0, at, unused);
        if (!any_valid(at)) return;
        SegmentPass<F, All, S, Hold::kNever> pass(p, n, thread.image, at, i, j, nullptr, 0);
        for_each([&](auto tag) {
          using Term = typename decltype(tag)::type;
          if constexpr (Term::kTallies > 0) {
            if (p.collected == index_of<Term>) pass.template tally<Term>(out, thread.lane);
          }
        });
      });
}

}  // namespace heteroakd::cuda
