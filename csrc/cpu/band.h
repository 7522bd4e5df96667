// One band of one image: the fused pass.
//
// For every pixel of the band: interpolate both models' logits, evaluate every term asked for, and
// send the gradients back through the adjoint of the interpolation. Nothing of B x C x H x W is
// stored: a band holds a few rows of logits and of their gradients, a vector of pixels its tiles.
//
// Order of work. The band's rows of logits are packed (float, dense, padded). Then, vector of
// columns by vector of columns, the label rows are walked downwards: the two rows of logits around
// them are brought to the vector's columns once per row of logits (horizontally), every label row
// is a mixture of the two (vertically, one multiply-add), and its gradient is collected in two
// tiles that return to the logits' columns once per row of logits. So horizontal work is paid per
// row of logits and everything per label row is contiguous, whatever the ratio of the grids.
//
// Cost per pixel and class, preset softmax-kl, ce + hetero, T = 2, stride 4, in operations on a
// vector of pixels (a multiply-add is one): 25 for exponentials and sums, 8 of them exponentials
// (33, 16 and the interpolation among them, where the chain does not hold), 13 for the value of
// KL(m || p_s), 9 for both gradients and the vertical adjoint, 6 for what is done once per row of
// logits: 53. Bytes: each logit read and each gradient written once per band (9/8 of them, for 8
// rows), each label once. docs/benchmarks/cpu has the share of the machine's ceiling reached.
//
// Bands do not depend on the number of threads, and what crosses their border goes to an edge row
// that is added afterwards: the bits of every result are the same for any thread count.
#pragma once

#include "rows.h"
#include "terms.h"

namespace heteroakd::cpu::HAKD_ISA {

// On the label grid: vectors at a time, and what a row of them takes; not a power of two.
constexpr int kChunk = 16;
template <typename T>
constexpr int64_t kChunkStepOf = kChunk * Lanes<T>::N + 16;

// See Kernels. The first loop is one that compilers make vectors of.
template <typename T>
void weigh_row(const T* __restrict weights, int64_t place, int64_t count, int64_t num_classes,
               int32_t* __restrict labels, LabelReport& report) {
  using F = Lanes<T>;
  const auto classes = static_cast<int32_t>(num_classes);
  int32_t labelled = 0, distilled = 0, bad = 0;  // of weight 0, and those that are none
  for (int64_t x = 0; x < count; ++x) {
    const T weight = weights[x];
    const int32_t label = labels[x];
    const int32_t kept = weight == T(0) ? kIgnored : label;
    const int32_t dropped = kept < label;
    distilled += dropped;
    labelled += dropped & (label < classes);
    bad += !(weight >= T(0)) | !(weight < kInfinity<T>);
    labels[x] = kept;
  }
  for (int64_t x = 0; bad > 0 && report.first_bad_weight < 0; ++x) {
    if (!(weights[x] >= T(0) && weights[x] < kInfinity<T>)) report.first_bad_weight = place + x;
  }
  report.labelled -= labelled;
  report.distilled -= distilled;
  report.bad_weights += bad;
  double labelled_weight[F::N] = {}, distilled_weight[F::N] = {};
  const auto add = [&](const T* of_pixels, const int32_t* their_labels) __attribute__((always_inline)) {
    const F weight = F::load(of_pixels);
    const Labels<T> l = load_labels<T>(their_labels);
    add_to(labelled_weight, select(is_labelled(l, num_classes), weight, F(T(0))));
    add_to(distilled_weight, select(is_valid(l), weight, F(T(0))));
  };
  int64_t x = 0;
  for (; x + F::N <= count; x += F::N) add(weights + x, labels + x);
  if (x < count) {
    T last[F::N] = {};
    int32_t last_labels[F::N];
    for (int l = 0; l < F::N; ++l) {
      last[l] = x + l < count ? weights[x + l] : T(0);
      last_labels[l] = x + l < count ? labels[x + l] : kIgnored;
    }
    add(last, last_labels);
  }
  for (int l = 0; l < F::N; ++l) {
    report.labelled_weight += labelled_weight[l];
    report.distilled_weight += distilled_weight[l];
  }
}

template <typename T>
class Band {
  using F = Lanes<T>;
  static constexpr int N = F::N;
  static constexpr int64_t kChunkStep = kChunkStepOf<T>;

 public:
  Band(const Pass<T>& pass, void* workspace, int64_t band)
      : p(pass), band_(band), terms_(pass), reads_pair_(terms_.reads_pair) {
    lay_out(workspace);
  }

  static size_t workspace_bytes(const Pass<T>& pass) {
    return Band(pass, nullptr, 0).bytes_ + 64;
  }

  void run(LabelReport& report) {
    image_ = band_ / p.bands_per_image;
    const int64_t k = band_ % p.bands_per_image;
    first_row_ = k * p.band_rows;
    end_row_ = first_row_ + p.band_rows < p.student.height ? first_row_ + p.band_rows
                                                            : p.student.height;
    first_label_row_ = p.first_label_row[k];
    end_label_row_ = p.first_label_row[k + 1];
    read_labels(report);
    terms_.labels = labels_;
    terms_.weights = weights_;
    terms_.begin(image_);
    if (p.identity) {
      run_identity();
    } else {
      run_interpolated();
    }
    terms_.end(band_);
  }

 private:
  // --- memory ------------------------------------------------------------------------------------

  void lay_out(void* workspace) {
    Arena arena(workspace);
    int64_t label_rows = 0;
    for (int64_t k = 0; k < p.bands_per_image; ++k) {
      const int64_t rows = p.first_label_row[k + 1] - p.first_label_row[k];
      label_rows = rows > label_rows ? rows : label_rows;
    }
    label_row_ = arena.take<int32_t>(p.label_width);
    labels_ = arena.take<int32_t>(label_rows * p.vectors * N);
    if (p.pixel_weight != nullptr) weights_ = arena.take<T>(label_rows * p.vectors * N);
    terms_.lay_out(arena);
    const int64_t gradients = p.gradients ? p.gradient_count : 0;
    if (p.identity) {
      student_rows_ = arena.take<T>(p.classes * kChunkStep);
      if (reads_pair_) teacher_rows_ = arena.take<T>(p.classes * kChunkStep);
      if (p.gradients) row_gradients_ = arena.take<T>(p.classes * kChunkStep);
    } else {
      const int64_t rows = p.band_rows + 1;
      student_rows_ = arena.take<T>(rows * p.classes * p.student.padded);
      student_.lay_out(arena, p.classes);
      if (reads_pair_) {
        teacher_rows_ = arena.take<T>(p.teacher.max_rows * p.classes * p.teacher.padded);
        teacher_.lay_out(arena, p.classes);
      }
      row_gradients_ = arena.take<T>(gradients * rows * p.classes * p.student.padded);
      for (int64_t s = 0; s < gradients; ++s) {
        gradient_sum_[s] = arena.take<T>(p.classes * N);
        gradient_upper_[s] = arena.take<T>(p.classes * N);
      }
    }
    bytes_ = arena.used();
  }

  HAKD_FN static void swap(T*& a, T*& b) {
    T* t = a;
    a = b;
    b = t;
  }

  HAKD_FN static void fill(T* p, int64_t count, T value) {
    for (int64_t i = 0; i < count; ++i) p[i] = value;
  }

  // --- labels ------------------------------------------------------------------------------------

  void read_labels(LabelReport& report) {
    for (int64_t y = first_label_row_; y < end_label_row_; ++y) {
      int32_t* row = label_row_;
      if (!read_dense_labels(y, row, report)) p.read_labels(p.labels.reader, image_, y, row, report);
      const int64_t first = (y - first_label_row_) * p.vectors * N;
      if (p.pixel_weight != nullptr) {
        const int64_t place = (image_ * p.label_height + y) * p.label_width;
        const T* weights = p.pixel_weight + place;
        weigh_row(weights, place, p.label_width, p.classes, row, report);
        to_lanes(weights, T(0), weights_ + first);
      }
      to_lanes(row, kIgnored, labels_ + first);
    }
  }

  // A row of pixels by lanes; `none` where a lane has no pixel.
  template <typename V>
  void to_lanes(const V* row, V none, V* out) const {
    const int64_t block = p.apart * N;
    const int64_t blocks = p.label_width / block;
    switch (p.apart) {
      case 1: blocks_to_lanes<1>(row, blocks, 1, out); break;
      case 2: blocks_to_lanes<2>(row, blocks, 2, out); break;
      case 4: blocks_to_lanes<4>(row, blocks, 4, out); break;
      case 8: blocks_to_lanes<8>(row, blocks, 8, out); break;
      default: blocks_to_lanes<0>(row, blocks, p.apart, out);
    }
    for (int64_t i = blocks * block; i < p.vectors * N; ++i) {
      out[i] = p.pixel[i] < 0 ? none : row[p.pixel[i]];
    }
  }

  // kApart: `apart` where it is known to the compiler, or 0.
  template <int kApart, typename V>
  static void blocks_to_lanes(const V* row, int64_t blocks, int64_t apart, V* out) {
    if constexpr (kApart > 0) apart = kApart;
    for (int64_t b = 0; b < blocks; ++b, row += apart * N, out += apart * N) {
      for (int l = 0; l < N; ++l) {
        for (int64_t v = 0; v < apart; ++v) out[v * N + l] = row[l * apart + v];
      }
    }
  }

  // A row that lies densely in memory and has no label out of range; false where that is not so.
  bool read_dense_labels(int64_t y, int32_t* out, LabelReport& report) const {
    const LabelsView& view = p.labels;
    if (view.stride[2] != 1 && p.label_width > 1) return false;
    const int64_t offset = image_ * view.stride[0] + y * view.stride[1];
    if (view.dtype == LabelDtype::kUint8) {
      return read_labels_as(reinterpret_cast<const uint8_t*>(view.data) + offset, out, report);
    }
    if (view.dtype == LabelDtype::kInt32) {
      return read_labels_as(reinterpret_cast<const int32_t*>(view.data) + offset, out, report);
    }
    return read_labels_as(reinterpret_cast<const int64_t*>(view.data) + offset, out, report);
  }

  template <typename S>
  bool read_labels_as(const S* in, int32_t* out, LabelReport& report) const {
    const int64_t classes = p.labels.num_classes;
    const int64_t ignore = p.labels.ignore_index;
    int64_t labelled = 0, unlabelled = 0, bad = 0;
    for (int64_t x = 0; x < p.label_width; ++x) {
      const int64_t label = static_cast<int64_t>(in[x]);
      const bool in_range = static_cast<uint64_t>(label) < static_cast<uint64_t>(classes);
      const bool ignored = label == ignore;
      out[x] = in_range && !ignored ? static_cast<int32_t>(label) : kIgnored;
      labelled += in_range && !ignored;
      bad += !in_range && !ignored;
    }
    if (p.unlabelled) {  // which came out as ignored, and as bad
      const int64_t without = p.labels.unlabelled_index;
      for (int64_t x = 0; x < p.label_width; ++x) {
        const bool none = static_cast<int64_t>(in[x]) == without;
        out[x] = none ? static_cast<int32_t>(classes) : out[x];
        unlabelled += none;
      }
    }
    if (bad > unlabelled) return false;
    report.labelled += labelled;
    report.distilled += labelled + unlabelled;
    return true;
  }

  const int32_t* labels_of(int64_t y, int64_t vector) const {
    return labels_ + ((y - first_label_row_) * p.vectors + vector) * N;
  }

  // --- logits on the label grid ------------------------------------------------------------------

  // By chunks of columns: the planes of the classes lie at large, often even distances, so that
  // lines of the same column compete for the same sets of a cache. A run of each is copied.
  void run_identity() {
    for (int64_t y = first_label_row_; y < end_label_row_; ++y) {
      for (int64_t first = 0; first < p.vectors; first += kChunk) {
        const int64_t end = first + kChunk < p.vectors ? first + kChunk : p.vectors;
        identity_chunk(y, first, end);
      }
    }
    if (p.gradients && p.streams) fence();
  }

  void identity_chunk(int64_t y, int64_t first, int64_t end) {
    const int64_t x0 = first * N;
    const int64_t count = (end * N < p.label_width ? end * N : p.label_width) - x0;
    const int64_t vectors_end = end - (end - first) % kMaxRows;
    student_careful_ = load_chunk(p.student_logits, y, x0, count, student_rows_);
    if (reads_pair_) {
      teacher_careful_ = load_chunk(p.teacher_logits, y, x0, count, teacher_rows_);
    }
    if (p.gradients) fill(row_gradients_, p.classes * kChunkStep, T(0));
    for (int64_t v = first; v < vectors_end; v += kMaxRows) identity_group<kMaxRows>(y, v, v - first);
    for (int64_t v = vectors_end; v < end; ++v) identity_group<1>(y, v, v - first);
    if (p.gradients) {
      write_columns<T>(p.out, p.classes, image_, y, x0, count, kChunkStep, row_gradients_,
                       p.streams);
    }
  }

  bool load_chunk(const LogitsView& view, int64_t y, int64_t x0, int64_t count, T* rows) {
    read_columns<T>(view, p.classes, image_, y, x0, count, kChunkStep, rows);
    for (int64_t c = 0; c < p.classes; ++c) {
      for (int64_t x = count; x % N != 0; ++x) rows[c * kChunkStep + x] = T(0);
    }
    return any_huge<T>(p.classes, rows, count, kChunkStep, p.huge);
  }

  // Neighbouring vectors of a row take the place of the rows of `group`.
  template <int kVectors>
  void identity_group(int64_t y, int64_t vector, int64_t in_chunk) {
    Mask<T> valid[kVectors];
    bool some = false;
    for (int r = 0; r < kVectors; ++r) {
      valid[r] = is_valid(load_labels<T>(labels_of(y, vector + r)));
      some = some || any(valid[r]);
    }
    if (!some) return;
    const int64_t x = in_chunk * N;
    const int64_t ahead = (vector + kChunk) * N;
    load_identity<kVectors>(student_rows_ + x, valid, terms_.student_z, terms_.student_maximum,
                            p.student_logits, y, ahead);
    if (reads_pair_) {
      load_identity<kVectors>(teacher_rows_ + x, valid, terms_.teacher_z, terms_.teacher_maximum,
                              p.teacher_logits, y, ahead);
    }
    Group<T> group{y, vector, {}, student_careful_, teacher_careful_};
    for (int r = 0; r < kVectors; ++r) group.labels[r] = labels_of(y, vector + r);
    const Sink<T> sink{row_gradients_ + x, nullptr, false, false, nullptr, kChunkStep, nullptr};
    terms_.template process<kVectors, false>(group, false, [&](int) { return sink; });
  }

  template <int kVectors>
  void load_identity(const T* row, const Mask<T>* valid, T* z, T* maximum, const LogitsView& view,
                     int64_t y, int64_t ahead) {
    const int64_t tile = p.classes * N;
    // The same columns of the next chunk, so that memory works while the arithmetic does.
    const int64_t size = view.dtype == Dtype::kDouble ? 8 : view.dtype == Dtype::kFloat ? 4 : 2;
    const char* next = view.data + (image_ * view.stride[0] + y * view.stride[2] + ahead) * size;
    const int64_t next_step = view.stride[1] * size;
    const int64_t bytes = kVectors * N * size;
    F m[kVectors];
    for (int r = 0; r < kVectors; ++r) m[r] = F(-kInfinity<T>);
    for (int64_t c = 0; c < p.classes; ++c) {
      for (int64_t byte = 0; byte < bytes; byte += 64) {
        __builtin_prefetch(next + c * next_step + byte, 0, 2);
      }
      for (int r = 0; r < kVectors; ++r) {
        const F x = F::load(row + c * kChunkStep + r * N, valid[r]);
        x.store(z + r * tile + c * N);
        m[r] = max(x, m[r]);
      }
    }
    for (int r = 0; r < kVectors; ++r) m[r].store(maximum + r * N);
  }

  // --- logits on a grid of their own -------------------------------------------------------------

  void run_interpolated() {
    const int64_t rows = end_row_ - first_row_ + 1;
    const int64_t row_elements = p.classes * p.student.padded;
    if (p.gradients) fill(row_gradients_, p.gradient_count * (p.band_rows + 1) * row_elements, T(0));
    // no pixel, and then perhaps no logits either
    if (first_label_row_ < end_label_row_ && p.label_width > 0) {
      const int64_t packed = end_row_ < p.student.height ? rows : rows - 1;
      student_careful_ = pack_rows<T>(p.student_logits, p.student, p.classes, image_, first_row_,
                                      packed, p.huge, student_rows_);
      if (reads_pair_) {
        teacher_first_ = p.teacher.row_lower[first_label_row_];
        int64_t last = p.teacher.row_lower[end_label_row_ - 1] + 1;
        last = last < p.teacher.height ? last : p.teacher.height - 1;
        teacher_careful_ =
            pack_rows<T>(p.teacher_logits, p.teacher, p.classes, image_, teacher_first_,
                         last - teacher_first_ + 1, p.huge, teacher_rows_);
      }
      for (int64_t vector = 0; vector < p.vectors; ++vector) sweep(vector);
    }
    if (p.gradients) write_rows();
  }

  void sweep(int64_t vector) {
    student_.lo_row = student_.hi_row = teacher_.lo_row = teacher_.hi_row = -1;
    gradient_row_ = -1;
    for (int64_t y = first_label_row_; y < end_label_row_;) {
      const int32_t lower = p.student.row_lower[y];
      int rows = 1;
      while (rows < kMaxRows && y + rows < end_label_row_ &&
             p.student.row_lower[y + rows] == lower &&
             (!reads_pair_ || p.teacher.row_lower[y + rows] == p.teacher.row_lower[y])) {
        ++rows;
      }
      if (rows == 4) {
        group<4>(y, vector);
      } else if (rows >= 2) {
        rows = 2;
        group<2>(y, vector);
      } else {
        group<1>(y, vector);
      }
      y += rows;
    }
    finish_gradient(vector);
  }

  template <int kRows>
  void group(int64_t y, int64_t vector) {
    Mask<T> valid[kRows];
    bool some = false;
    for (int r = 0; r < kRows; ++r) {
      valid[r] = is_valid(load_labels<T>(labels_of(y + r, vector)));
      some = some || any(valid[r]);
    }
    if (!some) return;
    move(student_, p.student, p.student.row_lower[y], student_rows_, first_row_, student_careful_,
         vector);
    if (reads_pair_) {
      move(teacher_, p.teacher, p.teacher.row_lower[y], teacher_rows_, teacher_first_,
           teacher_careful_, vector);
    }
    if (p.gradients) move_gradient(p.student.row_lower[y], vector);
    Group<T> group{y, vector, {}, student_careful_, teacher_careful_};
    for (int r = 0; r < kRows; ++r) group.labels[r] = labels_of(y + r, vector);
    const bool chained = kRows == kMaxRows && terms_.chain(group, student_, teacher_, valid);
    if (!chained) {
      const T huge = static_cast<T>(p.huge);
      interpolate<T, kRows>(p.classes, student_.lo, student_.hi, p.student.row_fraction + y, valid,
                            student_careful_, huge, terms_.student_z, terms_.student_maximum);
      if (reads_pair_) {
        interpolate<T, kRows>(p.classes, teacher_.lo, teacher_.hi, p.teacher.row_fraction + y,
                              valid, teacher_careful_, huge, terms_.teacher_z,
                              terms_.teacher_maximum);
      }
    }
    const int64_t next = y + kRows;
    gradient_folded_ =
        p.student.column_mode[vector] == ColumnMode::kConsecutive &&
        (next == end_label_row_ || p.student.row_lower[next] != p.student.row_lower[y]);
    terms_.template process<kRows, true>(group, chained, [&](int term) {
      const int s = p.gradient_of[term];
      return Sink<T>{gradient_sum_[s],    gradient_upper_[s],
                     gradient_first_ && p.begins[term],
                     gradient_folded_ && p.ends[term],
                     fold_row(s, vector), p.student.padded,
                     p.student.column_fraction + vector * N};
    });
    gradient_first_ = false;
  }

  void move(Cell<T>& cell, const Geometry<T>& g, int64_t row, const T* rows, int64_t first,
            bool careful, int64_t vector) {
    if (cell.lo_row == row) return;
    const int64_t step = p.classes * g.padded;
    if (cell.hi_row == row) {
      swap(cell.lo, cell.hi);
      swap(cell.lo_range, cell.hi_range);
    } else {
      expand_row<T>(g, vector, p.classes, rows + (row - first) * step, careful,
                    static_cast<T>(p.huge), cell.lo, cell.lo_range);
    }
    cell.lo_row = row;
    const int64_t next = row + 1 < g.height ? row + 1 : row;
    expand_row<T>(g, vector, p.classes, rows + (next - first) * step, careful,
                  static_cast<T>(p.huge), cell.hi, cell.hi_range);
    cell.hi_row = next > row ? next : -1;
  }

  // Gradients are collected for the rows `row` and `row + 1`; going down by one, what was the upper
  // row's share starts the new sum.
  void move_gradient(int64_t row, int64_t vector) {
    if (gradient_row_ == row) return;
    if (gradient_row_ >= 0 && gradient_row_ + 1 == row) {
      for (int64_t s = 0; s < p.gradient_count; ++s) {
        if (!gradient_folded_) fold_lower(s, vector);
        swap(gradient_sum_[s], gradient_upper_[s]);
      }
    } else {
      finish_gradient(vector);
      for (int64_t s = 0; s < p.gradient_count; ++s) fill(gradient_sum_[s], p.classes * N, T(0));
    }
    gradient_row_ = row;
    gradient_first_ = true;
    gradient_folded_ = false;
  }

  T* fold_row(int64_t index, int64_t vector) {
    return gradient_rows(index, gradient_row_) + kPadBefore + p.student.column_base[vector];
  }

  T* gradient_rows(int64_t index, int64_t row) {
    return row_gradients_ +
           (index * (p.band_rows + 1) + row - first_row_) * p.classes * p.student.padded;
  }

  void fold_lower(int64_t index, int64_t vector) {
    T* sum = gradient_sum_[index];
    const T* upper = gradient_upper_[index];
    for (int64_t i = 0; i < p.classes * N; i += N) (F::load(sum + i) - F::load(upper + i)).store(sum + i);
    fold_columns<T>(p.student, vector, p.classes, sum, gradient_rows(index, gradient_row_));
  }

  void finish_gradient(int64_t vector) {
    if (!p.gradients || gradient_row_ < 0) return;
    for (int64_t s = 0; s < p.gradient_count; ++s) {
      if (!gradient_folded_) fold_lower(s, vector);
      if (gradient_row_ + 1 < p.student.height) {  // else its weights are 0
        fold_columns<T>(p.student, vector, p.classes, gradient_upper_[s],
                        gradient_rows(s, gradient_row_ + 1));
      }
    }
  }

  // What went to the padding belongs to the row's ends; then the rows leave the band.
  void write_rows() {
    const Geometry<T>& g = p.student;
    const int64_t count = end_row_ - first_row_;
    for (int64_t s = 0; s < p.gradient_count; ++s) {
      for (int64_t c = 0; c < p.classes; ++c) {
        for (int64_t r = 0; r <= count; ++r) {
          T* row = gradient_rows(s, first_row_ + r) + c * g.padded + kPadBefore;
          row[0] += row[-1];
          row[g.width - 1] += row[g.width];
          T* out = r < count
                       ? p.gradient + (((s * p.batch + image_) * p.classes + c) * g.height +
                                       first_row_ + r) * g.width
                       : p.edges + ((s * p.batch * p.bands_per_image + band_) * p.classes + c) *
                                       g.width;
          for (int64_t x = 0; x < g.width; ++x) out[x] = row[x];
        }
      }
    }
  }

  const Pass<T>& p;
  int64_t band_;
  Terms<T> terms_;
  bool reads_pair_, student_careful_ = false, teacher_careful_ = false;
  bool gradient_first_ = true, gradient_folded_ = false;
  size_t bytes_ = 0;
  int64_t image_ = 0, first_row_ = 0, end_row_ = 0, first_label_row_ = 0, end_label_row_ = 0;
  int64_t teacher_first_ = 0, gradient_row_ = -1;
  int32_t* label_row_ = nullptr;
  int32_t* labels_ = nullptr;
  T* weights_ = nullptr;
  T *student_rows_ = nullptr, *teacher_rows_ = nullptr, *row_gradients_ = nullptr;
  Cell<T> student_, teacher_;
  T *gradient_sum_[kTerms] = {}, *gradient_upper_[kTerms] = {};
};

}  // namespace heteroakd::cpu::HAKD_ISA
